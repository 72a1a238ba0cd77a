package tenon;

import java.nio.file.Path;

/** The weights of a checkpoint. Any number of threads and sessions may use one. */
public final class Model extends Handle {
  private static final Function LOAD = new Function("tenon_model_load");
  private static final Function QUERY = new Function("tenon_model_query");
  private static final Function DESTROY = new Function("tenon_model_destroy");

  /** Told now and then how much of a model is loaded, on the thread that loads it. */
  @FunctionalInterface
  public interface Progress {
    /** Returns whether to go on. An exception stops the load too, which then throws it. */
    boolean update(long bytesDone, long bytesTotal);
  }

  /** What a model is. */
  public record Info(
      int vocabSize,
      int hiddenSize,
      int numLayers,
      int numExperts,
      int maxPositionEmbeddings,
      long weightBytes) {}

  private Model(long handle) {
    super(DESTROY, handle);
  }

  /** Reads config.json and safetensors of a directory, for the CPU. The files stay mapped. */
  public static Model load(Path directory) {
    return load(directory, (done, total) -> true);
  }

  public static Model load(Path directory, Progress progress) {
    Struct args = new Struct(Layout.MODEL_LOAD_ARGS);
    args.set("device_type", Layout.DEVICE_CPU);
    args.point("directory", Memory.of(directory.toString()));
    Memory handle = Memory.number();
    Reporter reporter = new Reporter(progress);
    try {
      LOAD.load(args, handle, reporter);
    } catch (TenonException e) {
      reporter.rethrow();
      throw e;
    }
    Model model = new Model(handle.bytes.getLong(0));
    if (reporter.thrown != null) model.close();
    reporter.rethrow();
    return model;
  }

  public Info info() {
    Struct info = new Struct(Layout.MODEL_INFO);
    QUERY.call(this, info);
    return new Info(
        info.getInt("vocab_size"),
        info.getInt("hidden_size"),
        info.getInt("num_layers"),
        info.getInt("num_experts"),
        info.getInt("max_position_embeddings"),
        info.getLong("weight_bytes"));
  }

  /** Keeps what the listener throws away from C, for the end of the load. */
  private static final class Reporter implements Native.Reporter {
    private final Progress progress;
    private Throwable thrown;

    Reporter(Progress progress) {
      this.progress = progress;
    }

    @Override
    public int report(long bytesDone, long bytesTotal) {
      try {
        return progress.update(bytesDone, bytesTotal) ? 0 : 1;
      } catch (RuntimeException | Error e) {
        thrown = e;
        return 1;
      }
    }

    void rethrow() {
      if (thrown instanceof RuntimeException e) throw e;
      if (thrown instanceof Error e) throw e;
    }
  }
}
