package tenon;

import java.nio.ByteBuffer;

/** The functions of tenon_jni.c. Pointers are longs; nothing is checked. */
final class Native {
  private Native() {}

  /** Opens libtenon at a path, a C string; null, or the reason why that failed. */
  static native byte[] open(long path);

  /** The address of an exported function by its name, a C string; 0 if there is none. */
  static native long symbol(long name);

  /** Sizes and offsets as the C compiler sees them, in the order of {@link Layout#ALL}. */
  static native int[] layout();

  static native long address(ByteBuffer direct);

  /** The bytes of a C string. */
  static native byte[] text(long address);

  /** Calls a function of up to four arguments; one that returns int32_t sets the low half. */
  static native long call(long function, long a, long b, long c, long d);

  /** Calls tenon_model_load, which reports to {@code progress} on this thread. */
  static native int load(long function, long args, long model, long error, Reporter progress);

  /** What the C side calls back. It must not throw. */
  interface Reporter {
    /** Returns 0 to go on. */
    int report(long bytesDone, long bytesTotal);
  }
}
