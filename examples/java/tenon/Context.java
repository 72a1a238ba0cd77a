package tenon;

/** What ops of a device share: the CPU's threads. Any number of threads may use one. */
public final class Context extends Handle {
  private static final Function CREATE = new Function("tenon_context_create");
  private static final Function SET_MOE_KERNELS = new Function("tenon_context_set_moe_kernels");
  private static final Function DESTROY = new Function("tenon_context_destroy");

  private Context(long handle) {
    super(DESTROY, handle);
  }

  /** A context with so many threads, the caller's included; 0: one for each usable CPU. */
  public static Context cpu(int numThreads) {
    Struct options = new Struct(Layout.CONTEXT_OPTIONS);
    options.set("device_type", Layout.DEVICE_CPU).set("num_threads", numThreads);
    Memory context = Memory.number();
    CREATE.call(options, context);
    return new Context(context.bytes.getLong(0));
  }

  /**
   * Sizes of the expert kernels on a GPU: the text of a file of tools/tune. Once for a context.
   */
  public Context setMoeKernels(String json) {
    SET_MOE_KERNELS.call(this, Memory.of(json));
    return this;
  }
}
