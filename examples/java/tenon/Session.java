package tenon;

import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Queue;

/** Runs a model: its KV cache and its threads. Calls of several threads take turns. */
public final class Session extends Handle {
  private static final Function CREATE = new Function("tenon_session_create");
  private static final Function STEP = new Function("tenon_session_step");
  private static final Function ENQUEUE = new Function("tenon_session_enqueue_step");
  private static final Function WAIT = new Function("tenon_session_wait_step");
  private static final Function DESTROY = new Function("tenon_session_destroy");

  private final int vocabSize;
  private final Queue<Integer> inFlight = new ArrayDeque<>(); // rows of each step; also the lock

  /**
   * What a step does with one sequence: appends tokens, and draws the next one unless {@code
   * sampling} is null (for a chunk with more of the prompt to come). {@code tokens} null: in their
   * place the token that the step before, waited for or not, drew for the sequence.
   *
   * <p>For the token that is drawn: {@code edits} of logits, in any order, without which (null)
   * there are no penalties, and {@code bitmask}, a bit for each token of the vocabulary, that of
   * token 0 the lowest of word 0: 1 where it may be drawn; null: all may. See SessionOptions.
   */
  public record Row(
      Sequence sequence,
      int[] tokens,
      SamplingParams sampling,
      List<LogitEdit> edits,
      int[] bitmask) {
    public Row(Sequence sequence, int[] tokens, SamplingParams sampling) {
      this(sequence, tokens, sampling, null, null);
    }

    /** Goes on with what the step before drew. */
    public static Row next(Sequence sequence, SamplingParams sampling) {
      return new Row(sequence, null, sampling);
    }

    public Row withEdits(List<LogitEdit> edits) {
      return new Row(sequence, tokens, sampling, edits, bitmask);
    }

    public Row withBitmask(int... bitmask) {
      return new Row(sequence, tokens, sampling, edits, bitmask);
    }
  }

  public record TokenLogprob(int token, float logprob) {}

  /**
   * The token drawn for a row, -1 if none was, with its log-probability and TENON_SAMPLE_*; the
   * best tokens, best first, as many as SamplingParams.topLogprobs asks for and may be drawn; and
   * mirostat's mu after the draw, 0 without mirostat.
   */
  public record Result(
      int token, float logprob, int status, List<TokenLogprob> top, float mirostatMu) {}

  private Session(long handle, int vocabSize) {
    super(DESTROY, handle);
    this.vocabSize = vocabSize;
  }

  /** A session with the defaults. */
  public static Session create(Model model) {
    return create(model, new SessionOptions());
  }

  public static Session create(Model model, SessionOptions options) {
    int vocabSize = model.info().vocabSize();
    Memory session = Memory.number();
    CREATE.call(model, options, session);
    return new Session(session.bytes.getLong(0), vocabSize);
  }

  public Sequence createSequence() {
    return Sequence.create(this);
  }

  /**
   * Runs the model over the new tokens of all rows in one pass. All or nothing: after an exception
   * every sequence is as it was.
   */
  public List<Result> step(Row... rows) {
    Outputs outputs = new Outputs(rows.length);
    Struct args = rowsOf(rows, outputs);
    args.point("tokens", outputs.tokens).point("logprobs", outputs.logprobs);
    args.point("statuses", outputs.statuses).point("mirostat_mu", outputs.mirostatMu);
    STEP.call(this, args);
    return outputs.read();
  }

  /**
   * Starts a step, or does nothing at all: step() in two parts, so that a step is on its way before
   * the tokens of the last one are read. Two may be in flight; waitStep() gives the results of the
   * first. Sequences may come and go meanwhile: one that has ended may be closed at once though its
   * next step is under way.
   */
  public void enqueueStep(Row... rows) {
    synchronized (inFlight) {
      ENQUEUE.call(this, rowsOf(rows, null));
      inFlight.add(rows.length);
    }
  }

  /** Waits for the step that was enqueued first. */
  public List<Result> waitStep() {
    synchronized (inFlight) {
      Outputs outputs = new Outputs(inFlight.isEmpty() ? 0 : inFlight.peek());
      Struct results = new Struct(Layout.STEP_RESULTS);
      results.set("num_rows", outputs.numRows).set("top_columns", Layout.MAX_TOP_LOGPROBS);
      results.point("tokens", outputs.tokens).point("logprobs", outputs.logprobs);
      results.point("statuses", outputs.statuses).point("mirostat_mu", outputs.mirostatMu);
      results.point("top_tokens", outputs.topTokens).point("top_logprobs", outputs.topLogprobs);
      WAIT.call(this, results);
      inFlight.remove();
      return outputs.read();
    }
  }

  /** Arguments with the rows alone; outputs: where they list their best tokens. */
  private Struct rowsOf(Row[] rows, Outputs outputs) {
    Memory array = Memory.allocate((long) Layout.STEP_ROW.size * rows.length);
    Struct args = new Struct(Layout.STEP_ARGS);
    args.set("num_rows", rows.length).point("rows", array);
    for (int i = 0; i < rows.length; ++i) {
      Struct row = row(rows[i], array, i);
      if (outputs != null) outputs.listTop(row, rows[i].sampling, i);
      args.keep(row);
    }
    return args;
  }

  private Struct row(Row row, Memory array, int index) {
    Struct struct = new Struct(Layout.STEP_ROW, array, index);
    if (row.tokens == null) {
      struct.set("flags", Layout.ROW_CONTINUES).set("num_tokens", 1);
    } else {
      struct.set("num_tokens", row.tokens.length).point("tokens", Memory.of(row.tokens));
    }
    struct.set("sequence", row.sequence.word());
    struct.point("sampling", row.sampling);
    if (row.edits != null) {
      struct.point("edits", LogitEdit.sorted(row.edits, vocabSize));
      struct.set("num_edits", row.edits.size());
    }
    if (row.bitmask != null) {
      int words = (vocabSize + Integer.SIZE - 1) / Integer.SIZE;
      if (row.bitmask.length != words) {
        throw new IllegalArgumentException(
            "a bitmask of %d words, expected %d".formatted(row.bitmask.length, words));
      }
      struct.point("bitmask", Memory.of(row.bitmask));
    }
    struct.keep(row.sequence);
    return struct;
  }

  /** Where the library writes what has come of each row. */
  private static final class Outputs {
    private static final int TOP_BYTES = Integer.BYTES * Layout.MAX_TOP_LOGPROBS;

    final int numRows;
    final Memory tokens;
    final Memory logprobs;
    final Memory statuses;
    final Memory mirostatMu;
    final Memory topTokens; // TENON_MAX_TOP_LOGPROBS of each row, -1 behind the last
    final Memory topLogprobs;

    Outputs(int numRows) {
      this.numRows = numRows;
      tokens = Memory.of(new int[numRows]);
      logprobs = Memory.of(new int[numRows]);
      statuses = Memory.of(new int[numRows]);
      mirostatMu = Memory.of(new int[numRows]);
      int[] none = new int[numRows * Layout.MAX_TOP_LOGPROBS];
      Arrays.fill(none, -1);
      topTokens = Memory.of(none);
      topLogprobs = Memory.of(none);
    }

    /** Has row {@code index} list its best tokens here. */
    void listTop(Struct row, SamplingParams sampling, int index) {
      if (sampling == null || sampling.topLogprobs() == 0) return;
      row.point("top_tokens", Word.of(topTokens.word() + (long) TOP_BYTES * index));
      row.point("top_logprobs", Word.of(topLogprobs.word() + (long) TOP_BYTES * index));
      row.keep(this);
    }

    List<Result> read() {
      List<Result> results = new ArrayList<>();
      for (int i = 0; i < numRows; ++i) {
        int at = Integer.BYTES * i;
        results.add(
            new Result(
                tokens.bytes.getInt(at),
                logprobs.bytes.getFloat(at),
                statuses.bytes.getInt(at),
                top(TOP_BYTES * i),
                mirostatMu.bytes.getFloat(at)));
      }
      return results;
    }

    private List<TokenLogprob> top(int begin) {
      List<TokenLogprob> top = new ArrayList<>();
      for (int at = begin; at < begin + TOP_BYTES; at += Integer.BYTES) {
        int token = topTokens.bytes.getInt(at);
        if (token < 0) break;
        top.add(new TokenLogprob(token, topLogprobs.bytes.getFloat(at)));
      }
      return List.copyOf(top);
    }
  }
}
