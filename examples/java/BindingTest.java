import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.function.UnaryOperator;
import java.util.stream.IntStream;
import tenon.Context;
import tenon.DType;
import tenon.Layout;
import tenon.LogitEdit;
import tenon.Model;
import tenon.Op;
import tenon.Ops;
import tenon.SamplingParams;
import tenon.Sequence;
import tenon.Session;
import tenon.SessionOptions;
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
    testEditsMasksAndTop(modelDirectory);
    testTwoStepsInFlight(modelDirectory);
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

  private static void testEditsMasksAndTop(Path directory) {
    int[] prompt = {'S', 'h', 'e', ' ', 'w', 'a', 's'};
    SessionOptions options =
        new SessionOptions()
            .flags(Layout.SESSION_LOGIT_BITMASKS)
            .maxLogitEdits(3)
            .maxTopLogprobs(3);
    try (Model model = Model.load(directory);
        Session session = Session.create(model, options)) {
      // Draws behind a row that has nothing else.
      Function<UnaryOperator<Session.Row>, Session.Result> draw =
          with -> {
            try (Sequence plain = session.createSequence();
                Sequence other = session.createSequence()) {
              SamplingParams top = SamplingParams.greedy().topLogprobs(3);
              List<Session.Result> results =
                  session.step(
                      new Session.Row(plain, prompt, SamplingParams.greedy()),
                      with.apply(new Session.Row(other, prompt, top)));
              check(results.get(0).top().isEmpty(), "a row without best tokens: " + results);
              return results.get(1);
            }
          };
      Session.Result first = draw.apply(row -> row);
      List<Integer> best = first.top().stream().map(Session.TokenLogprob::token).toList();
      check(best.size() == 3 && best.get(0) == first.token(), "the best tokens: " + first);
      check(
          first.top().get(0).logprob() == first.logprob()
              && first.top().get(1).logprob() >= first.top().get(2).logprob(),
          "their logprobs: " + first);

      // In any order.
      List<LogitEdit> bans =
          new ArrayList<>(List.of(LogitEdit.ban(best.get(0)), LogitEdit.ban(best.get(1))));
      for (int i = 0; i < 2; ++i) {
        int token = draw.apply(row -> row.withEdits(bans)).token();
        check(token == best.get(2), "with two bans: " + token);
        Collections.reverse(bans);
      }
      int biased = draw.apply(row -> row.withEdits(List.of(LogitEdit.bias(7, 100)))).token();
      check(biased == 7, "with a bias: " + biased);
      int[] mask = new int[256 / 32];
      for (int token : best.subList(1, 3)) mask[token / 32] |= 1 << token % 32;
      Session.Result masked = draw.apply(row -> row.withBitmask(mask));
      check(masked.token() == best.get(1) && masked.top().size() == 2, "masked: " + masked);
      Session.Result both = draw.apply(row -> row.withBitmask(mask).withEdits(bans));
      check(both.token() == best.get(2) && both.top().size() == 1, "both: " + both);
      check(draw.apply(row -> row.withEdits(List.of())).equals(first), "nothing stays behind");

      UnaryOperator<Session.Row> penalised =
          row ->
              new Session.Row(
                  row.sequence(), prompt, SamplingParams.greedy().presencePenalty(100));
      expect(TenonException.class, "need edits", () -> draw.apply(penalised));
      List<LogitEdit> once = List.of(new LogitEdit(best.get(0), 1, 0, 0));
      int other = draw.apply(row -> penalised.apply(row).withEdits(once)).token();
      check(other == best.get(1), "with a penalty: " + other);
      expect(
          TenonException.class,
          "twice",
          () -> draw.apply(row -> row.withEdits(List.of(LogitEdit.ban(1), LogitEdit.ban(1)))));
      expect(
          TenonException.class,
          "more than max_logit_edits 3",
          () ->
              draw.apply(
                  row -> row.withEdits(IntStream.range(0, 4).mapToObj(LogitEdit::ban).toList())));
      expect(
          IllegalArgumentException.class,
          "1 words, expected 8",
          () -> draw.apply(row -> row.withBitmask(1)));
      for (int count : new int[] {-1, 4, 1 << 30}) {
        expect(
            TenonException.class,
            "num_top_logprobs",
            () ->
                draw.apply(
                    row ->
                        new Session.Row(
                            row.sequence(),
                            prompt,
                            SamplingParams.greedy().topLogprobs(count))));
      }
    }
  }

  private static void testTwoStepsInFlight(Path directory) {
    int[] prompt = {'S', 'h', 'e', ' ', 'w', 'a', 's'};
    try (Model model = Model.load(directory);
        Session session = Session.create(model, new SessionOptions().maxTopLogprobs(2))) {
      SamplingParams sampling = SamplingParams.random(3).mirostat(3, 0.2f).topLogprobs(2);
      Sequence first = session.createSequence();
      List<Session.Result> expected = new ArrayList<>();
      for (int i = 0; i < 5; ++i) {
        Session.Row row = new Session.Row(first, i == 0 ? prompt : null, sampling);
        expected.addAll(session.step(row));
      }
      check(expected.get(0).mirostatMu() != expected.get(1).mirostatMu(), "mu: " + expected);
      check(expected.get(0).top().size() == 2, "the best two: " + expected);

      Sequence second = session.createSequence();
      Session.Row next = Session.Row.next(second, sampling);
      List<Session.Result> results = new ArrayList<>();
      session.enqueueStep(new Session.Row(second, prompt, sampling));
      for (int i = 0; i < 4; ++i) {
        session.enqueueStep(next);
        expect(TenonException.class, "num_steps_in_flight is 2", () -> session.enqueueStep(next));
        results.addAll(session.waitStep());
      }
      expect(TenonException.class, "num_steps_in_flight is 1", () -> session.step(next));
      second.close(); // it has ended; its last step may go on
      results.addAll(session.waitStep());
      check(results.equals(expected), results + " are not " + expected);
      expect(TenonException.class, "num_steps_in_flight is 0", session::waitStep);

      // Back to where two tokens had been drawn.
      first.truncate(prompt.length + 1);
      SamplingParams set =
          SamplingParams.random(3)
              .mirostat(3, 0.2f)
              .topLogprobs(2)
              .mirostatMu(expected.get(1).mirostatMu());
      Session.Row again = new Session.Row(first, new int[] {expected.get(1).token()}, set);
      check(session.step(again).get(0).equals(expected.get(2)), "again from the second token");
      session.enqueueStep(Session.Row.next(first, sampling)); // ends with the session
    }
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
