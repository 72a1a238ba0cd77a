package tenon;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;

/** Native memory that lives as long as this object is reachable. */
final class Memory implements Word {
  private static final int ALIGNMENT = 64; // of workspaces on the CPU

  /** All of it, from position 0 on, in native byte order. */
  final ByteBuffer bytes;

  private final long address;

  private Memory(ByteBuffer bytes) {
    this.bytes = bytes.order(ByteOrder.nativeOrder());
    try {
      this.address = Native.address(bytes);
    } catch (UnsatisfiedLinkError e) {
      throw new IllegalStateException("call Tenon.load() first", e);
    }
  }

  /** Zeroed. */
  static Memory allocate(long size) {
    if (size > Integer.MAX_VALUE - 2 * ALIGNMENT) {
      throw new IllegalArgumentException(
          size + " bytes do not fit in a ByteBuffer, which holds less than 2 GiB");
    }
    // An aligned slice is cut at both ends.
    ByteBuffer room = ByteBuffer.allocateDirect((int) size + 2 * ALIGNMENT);
    return new Memory(room.alignedSlice(ALIGNMENT).limit((int) size).slice());
  }

  /** Between position and limit of a direct buffer. */
  static Memory of(ByteBuffer buffer) {
    if (!buffer.isDirect()) {
      throw new IllegalArgumentException("not a direct buffer: see ByteBuffer.allocateDirect");
    }
    return new Memory(buffer.slice());
  }

  /** A zero-terminated copy. */
  static Memory of(String text) {
    byte[] utf8 = text.getBytes(StandardCharsets.UTF_8);
    Memory memory = allocate(utf8.length + 1L);
    memory.bytes.put(0, utf8);
    return memory;
  }

  static Memory of(int[] values) {
    Memory memory = allocate((long) Integer.BYTES * values.length);
    memory.bytes.asIntBuffer().put(values);
    return memory;
  }

  static Memory of(long[] values) {
    Memory memory = allocate((long) Long.BYTES * values.length);
    memory.bytes.asLongBuffer().put(values);
    return memory;
  }

  /** Room for a number that a function writes. */
  static Memory number() {
    return allocate(Long.BYTES);
  }

  @Override
  public long word() {
    return address;
  }
}
