package tenon;

import java.lang.ref.Reference;

/** A function of libtenon that returns a status and whose last parameter is a tenon_error. */
final class Function {
  private static final ThreadLocal<Struct> ERROR =
      ThreadLocal.withInitial(() -> new Struct(Layout.ERROR));

  private final String name;
  private long address;

  Function(String name) {
    this.name = name;
  }

  /**
   * Calls it with up to three arguments (null: 0) and the error. All arguments, and so what they
   * point to, stay alive until it returns.
   */
  void call(Word... arguments) {
    Struct error = ERROR.get();
    long[] words = new long[4];
    for (int i = 0; i < arguments.length; ++i) {
      words[i] = arguments[i] == null ? 0 : arguments[i].word();
    }
    words[arguments.length] = error.word();
    int code = (int) Native.call(address(), words[0], words[1], words[2], words[3]);
    Reference.reachabilityFence(arguments);
    check(code, error);
  }

  /** The same for tenon_model_load, which reports to {@code reporter} unless that is null. */
  void load(Struct args, Memory model, Native.Reporter reporter) {
    Struct error = ERROR.get();
    int code = Native.load(address(), args.word(), model.word(), error.word(), reporter);
    Reference.reachabilityFence(args);
    Reference.reachabilityFence(model);
    check(code, error);
  }

  private static void check(int code, Struct error) {
    if (code != 0) throw new TenonException(code, error.getText("message"));
  }

  private long address() {
    if (address == 0) address = Tenon.symbol(name);
    return address;
  }
}
