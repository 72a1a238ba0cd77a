package tenon;

import java.util.ArrayList;
import java.util.List;

/** Runs a model: its KV cache and its threads. Calls of several threads take turns. */
public final class Session extends Handle {
  private static final Function CREATE = new Function("tenon_session_create");
  private static final Function STEP = new Function("tenon_session_step");
  private static final Function DESTROY = new Function("tenon_session_destroy");

  /**
   * What a step does with one sequence: appends tokens, and draws the next one unless {@code
   * sampling} is null (for a chunk with more of the prompt to come).
   */
  public record Row(Sequence sequence, int[] tokens, SamplingParams sampling) {}

  /** The token drawn for a row, -1 if none was, with its log-probability and TENON_SAMPLE_*. */
  public record Result(int token, float logprob, int status) {}

  private Session(long handle) {
    super(DESTROY, handle);
  }

  /** A session with the defaults. */
  public static Session create(Model model) {
    return create(model, new SessionOptions());
  }

  public static Session create(Model model, SessionOptions options) {
    Memory session = Memory.number();
    CREATE.call(model, options, session);
    return new Session(session.bytes.getLong(0));
  }

  public Sequence createSequence() {
    return Sequence.create(this);
  }

  /**
   * Runs the model over the new tokens of all rows in one pass. All or nothing: after an exception
   * every sequence is as it was.
   */
  public List<Result> step(Row... rows) {
    Memory array = Memory.allocate((long) Layout.STEP_ROW.size * rows.length);
    Memory tokens = Memory.of(new int[rows.length]);
    Memory logprobs = Memory.of(new int[rows.length]);
    Memory statuses = Memory.of(new int[rows.length]);
    Struct args = new Struct(Layout.STEP_ARGS);
    args.set("num_rows", rows.length);
    args.point("rows", array).point("tokens", tokens);
    args.point("logprobs", logprobs).point("statuses", statuses);
    for (int i = 0; i < rows.length; ++i) args.keep(row(rows[i], array, i));
    STEP.call(this, args);

    List<Result> results = new ArrayList<>();
    for (int i = 0; i < rows.length; ++i) {
      int at = Integer.BYTES * i;
      results.add(
          new Result(
              tokens.bytes.getInt(at), logprobs.bytes.getFloat(at), statuses.bytes.getInt(at)));
    }
    return results;
  }

  private static Struct row(Row row, Memory array, int index) {
    Struct struct = new Struct(Layout.STEP_ROW, array, index);
    struct.set("num_tokens", row.tokens.length);
    struct.set("sequence", row.sequence.word());
    struct.point("tokens", Memory.of(row.tokens));
    struct.point("sampling", row.sampling);
    struct.keep(row.sequence);
    return struct;
  }
}
