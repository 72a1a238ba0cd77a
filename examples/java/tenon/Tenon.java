package tenon;

import java.lang.ref.Reference;
import java.nio.charset.StandardCharsets;

/** The library: load it once, before anything else of this package is used. */
public final class Tenon {
  private static boolean loaded;

  private Tenon() {}

  /** Loads libtenon.so.1 from where the dynamic linker finds it. */
  public static void load() {
    load("libtenon.so.1");
  }

  /**
   * Loads the library from a path, through libtenon_jni.so on java.library.path.
   *
   * @throws TenonException with the reason if it cannot be loaded or is too old
   */
  public static synchronized void load(String library) {
    if (loaded) return;
    try {
      System.loadLibrary("tenon_jni");
    } catch (UnsatisfiedLinkError error) {
      throw new TenonException(Status.UNAVAILABLE, error.getMessage());
    }
    checkLayout();
    open(library);
    loaded = true;
    try {
      checkVersion(library);
    } catch (TenonException e) {
      loaded = false;
      throw e;
    }
  }

  /** The library's release, such as "0.1.0". */
  public static String version() {
    byte[] text = Native.text(Native.call(symbol("tenon_version_string"), 0, 0, 0, 0));
    return new String(text, StandardCharsets.UTF_8);
  }

  static synchronized long symbol(String name) {
    if (!loaded) throw new IllegalStateException("call Tenon.load() first");
    Memory text = Memory.of(name);
    long address = Native.symbol(text.word());
    Reference.reachabilityFence(text);
    if (address != 0) return address;
    throw new TenonException(Status.UNIMPLEMENTED, "the library has no function " + name);
  }

  private static void open(String library) {
    Memory path = Memory.of(library);
    byte[] problem = Native.open(path.word());
    Reference.reachabilityFence(path);
    if (problem == null) return;
    throw new TenonException(Status.UNAVAILABLE, new String(problem, StandardCharsets.UTF_8));
  }

  private static void checkVersion(String library) {
    int version = (int) Native.call(symbol("tenon_abi_version"), 0, 0, 0, 0);
    int major = version >>> 16;
    int minor = version & 0xffff;
    if (major == Layout.ABI_MAJOR && minor >= Layout.ABI_MINOR) return;
    throw new TenonException(
        Status.FAILED_PRECONDITION,
        "%s has ABI %d.%d, expected %d.%d or a later %d"
            .formatted(
                library, major, minor, Layout.ABI_MAJOR, Layout.ABI_MINOR, Layout.ABI_MAJOR));
  }

  /** Compares Layout.java with what the C compiler made of tenon.h. */
  private static void checkLayout() {
    int[] compiled = Native.layout();
    int expected = Layout.ALL.stream().mapToInt(type -> 1 + 2 * type.fields().size()).sum();
    checkLayout("the structs", compiled.length, expected);
    int i = 0;
    for (Struct.Type type : Layout.ALL) {
      checkLayout(type.name, compiled[i++], type.size);
      for (Struct.Field field : type.fields()) {
        checkLayout(type.name + "." + field.name(), compiled[i++], field.offset());
        checkLayout(type.name + "." + field.name(), compiled[i++], field.size());
      }
    }
  }

  private static void checkLayout(String name, int compiled, int expected) {
    if (compiled == expected) return;
    throw new TenonException(
        Status.FAILED_PRECONDITION,
        "libtenon_jni.so has %d for %s where Layout.java has %d: build both from one release"
            .formatted(compiled, name, expected));
  }
}
