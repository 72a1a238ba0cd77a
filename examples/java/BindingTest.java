import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.function.Consumer;
import tenon.Context;
import tenon.DType;
import tenon.Model;
import tenon.Op;
import tenon.Ops;
import tenon.SamplingParams;
import tenon.Sequence;
import tenon.Session;
import tenon.Status;
import tenon.Tenon;
import tenon.TenonException;
import tenon.Tensor;

/** What the binding adds to the library: lifetimes, errors, bounds, callbacks, overhead. */
public final class BindingTest {
  private static int failures = 0;

  public static void main(String[] args) {
    if (args.length != 2) throw new IllegalArgumentException("BindingTest MODEL_DIR LIBTENON");
    Path modelDirectory = Path.of(args[0]);

    expect(IllegalStateException.class, "Tenon.load", () -> Context.cpu(1));
    expect(TenonException.class, "nowhere.so", () -> Tenon.load("/nowhere.so"));
    Tenon.load(args[1]);
    Tenon.load(args[1]);
    check(Tenon.version().matches("\\d+\\.\\d+\\.\\d+"), "version " + Tenon.version());

    testOps();
    testLifetimes();
    testBounds();
    measureOverhead();
    testProgress(modelDirectory);
    testSequences(modelDirectory);
    System.out.println(failures == 0 ? "PASS" : failures + " failures");
    System.exit(failures == 0 ? 0 : 1);
  }

  private static void testOps() {
    Tensor x = Tensor.of(new float[] {3, 4, 0, 0, 1, 1, 1, 1}, 2, 4);
    Tensor weight = Tensor.of(new float[] {1, 2, 1, 1}, 4);
    Tensor out = Tensor.zeros(DType.FLOAT32, 2, 4);
    Ops.RmsNorm norm = new Ops.RmsNorm().x(x).weight(weight).out(out).epsilon(1e-6f);
    try (Context context = Context.cpu(1)) {
      norm.run(context);
      check(Math.abs(out.floats().get(1) - 3.2f) < 1e-5f, "rms_norm: " + out.floats().get(1));
      norm.run(null);
      norm.epsilon(-1);
      expect(TenonException.class, "epsilon is -1", () -> norm.run(context));
    }
    expect(IllegalArgumentException.class, "no_such", () -> norm.set("no_such", 1));
    expect(IllegalArgumentException.class, "frobnicate", () -> Op.named("frobnicate"));
    expect(IllegalArgumentException.class, "rounding", () -> norm.set("rounding", 1L << 31));
  }

  private static void testLifetimes() {
    Context context = Context.cpu(1);
    expect(TenonException.class, "format is missing", () -> context.setMoeKernels("{}"));
    context.close();
    context.close();
    Ops.RmsNorm norm = rmsNorm(2);
    TenonException stale =
        expect(TenonException.class, "context", () -> norm.run(context));
    check(stale != null && stale.status() == Status.NOT_FOUND, "a closed context: " + stale);

    // An op keeps its tensors, and they their memory, whatever else is forgotten.
    List<Op> ops = new ArrayList<>();
    for (int i = 0; i < 200; ++i) ops.add(rmsNorm(1000));
    System.gc();
    for (int i = 0; i < 200; ++i) ByteBuffer.allocateDirect(40_000);
    for (Op op : ops) op.run(null);

    // Contexts that nobody closes are destroyed: there can be 4096 at once.
    int created = 0;
    for (int waits = 0; created < 5000 && waits < 200; ) {
      try {
        Context.cpu(1);
        ++created;
      } catch (TenonException e) {
        check(e.status() == Status.RESOURCE_EXHAUSTED, "creating many contexts: " + e);
        collect();
        ++waits;
      }
    }
    check(created == 5000, created + " contexts created and forgotten");
  }

  /** Lets the cleaner run. */
  private static void collect() {
    System.gc();
    try {
      Thread.sleep(50);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  private static void testBounds() {
    ByteBuffer data = ByteBuffer.allocateDirect(64);
    long[] shape = {4, 4};
    Tensor.wrap(data, DType.FLOAT32, shape);
    Tensor.wrap(data, DType.FLOAT16, shape, new long[] {-4, 1}, 24);
    expect(
        IllegalArgumentException.class, "68", () -> Tensor.wrap(data, DType.FLOAT32, shape, null, 4));
    expect(
        IllegalArgumentException.class,
        "buffer with 64",
        () -> Tensor.wrap(data, DType.FLOAT32, shape, new long[] {-4, 1}, 0));
    expect(
        IllegalArgumentException.class,
        "direct",
        () -> Tensor.wrap(ByteBuffer.allocate(64), DType.FLOAT32, shape));
    expect(
        IllegalArgumentException.class, "2 GiB", () -> Tensor.zeros(DType.FLOAT32, 1 << 16, 1 << 16));
    expect(
        ArithmeticException.class, "overflow", () -> Tensor.zeros(DType.FLOAT32, 1L << 40, 1L << 40));
    expect(IllegalArgumentException.class, "3 values", () -> Tensor.of(new float[3], 2, 2));
    expect(IllegalArgumentException.class, "-1", () -> Tensor.zeros(DType.FLOAT32, -1));
  }

  private static void testProgress(Path directory) {
    long[] last = new long[2];
    Consumer<Boolean> load =
        goOn ->
            Model.load(
                    directory,
                    (done, total) -> {
                      last[0] = done;
                      last[1] = total;
                      return goOn;
                    })
                .close();
    load.accept(true);
    check(last[0] > 0 && last[0] == last[1], "progress ends at " + last[0] + " of " + last[1]);
    TenonException stopped = expect(TenonException.class, "", () -> load.accept(false));
    check(stopped != null && stopped.status() == Status.CANCELLED, "stopped: " + stopped);

    RuntimeException thrown = new RuntimeException("of the listener");
    RuntimeException caught =
        expect(
            RuntimeException.class,
            "of the listener",
            () ->
                Model.load(
                    directory,
                    (done, total) -> {
                      throw thrown;
                    }));
    check(caught == thrown, "the listener's exception comes back");
    TenonException missing =
        expect(TenonException.class, "/nowhere", () -> Model.load(Path.of("/nowhere")));
    check(missing != null && missing.status() == Status.NOT_FOUND, "missing: " + missing);
  }

  private static void testSequences(Path directory) {
    Session closed;
    Sequence orphan;
    int[] prompt = {'S', 'h', 'e'};
    try (Model model = Model.load(directory);
        Session session = Session.create(model)) {
      check(model.info().vocabSize() == 256, "vocab_size " + model.info().vocabSize());
      Sequence first = session.createSequence();
      session.step(new Session.Row(first, prompt, null));
      Sequence second = first.fork();
      check(second.length() == 3, "a fork has " + second.length() + " tokens");
      List<Session.Result> results =
          session.step(
              new Session.Row(first, new int[] {' '}, SamplingParams.greedy()),
              new Session.Row(second, new int[] {' '}, SamplingParams.greedy()));
      check(results.get(0).equals(results.get(1)), "equal sequences go on alike: " + results);
      second.truncate(1);
      check(second.length() == 1, "truncated to " + second.length());
      second.close();
      expect(TenonException.class, "sequence", second::length);
      expect(
          TenonException.class,
          "",
          () -> session.step(new Session.Row(first, new int[] {256}, null)));
      closed = session;
      orphan = first;
    }
    expect(TenonException.class, "session", closed::createSequence);
    orphan.close(); // after its session: nothing is left to do
  }

  /** A call that does nothing: what is left is the way there and back. */
  private static void measureOverhead() {
    Ops.RmsNorm norm = rmsNorm(0);
    try (Context context = Context.cpu(1)) {
      double best = Double.MAX_VALUE;
      for (int round = 0; round < 2000; ++round) { // the best one was not interrupted
        int calls = 500;
        long start = System.nanoTime();
        for (int i = 0; i < calls; ++i) norm.run(context);
        best = Math.min(best, (System.nanoTime() - start) / (double) calls);
      }
      System.out.printf("rms_norm of no rows: %.0f ns a call%n", best);
    }
  }

  private static Ops.RmsNorm rmsNorm(int rows) {
    Tensor x = Tensor.zeros(DType.FLOAT32, rows, 8);
    return new Ops.RmsNorm()
        .x(x)
        .weight(Tensor.zeros(DType.FLOAT32, 8))
        .out(x)
        .epsilon(1e-6f);
  }

  private static void check(boolean condition, String message) {
    if (condition) return;
    System.out.println("FAIL: " + message);
    ++failures;
  }

  /** Runs what must throw an exception of this type with this part in its message. */
  private static <T extends Exception> T expect(Class<T> type, String part, Runnable body) {
    try {
      body.run();
    } catch (RuntimeException e) {
      check(type.isInstance(e) && e.getMessage().contains(part), part + ": " + e);
      return type.isInstance(e) ? type.cast(e) : null;
    }
    check(false, "nothing thrown: " + part);
    return null;
  }
}
