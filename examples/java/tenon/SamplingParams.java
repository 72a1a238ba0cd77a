package tenon;

/** How a sequence's tokens are drawn; the fields of tenon_sampling_params. */
public final class SamplingParams extends Struct {
  private int flags = 0;

  private SamplingParams() {
    super(Layout.SAMPLING_PARAMS);
  }

  /** Always the most likely token. */
  public static SamplingParams greedy() {
    return new SamplingParams();
  }

  /** The model's own distribution, to be narrowed by the setters. */
  public static SamplingParams random(long seed) {
    return new SamplingParams().temperature(1).topP(1).seed(seed);
  }

  public SamplingParams temperature(float value) {
    set("temperature", value);
    return this;
  }

  public SamplingParams topK(int value) {
    set("top_k", value);
    return this;
  }

  public SamplingParams topP(float value) {
    set("top_p", value);
    return this;
  }

  public SamplingParams minP(float value) {
    set("min_p", value);
    return this;
  }

  public SamplingParams seed(long value) {
    set("seed", value);
    return this;
  }

  public SamplingParams typicalP(float value) {
    set("typical_p", value);
    return this;
  }

  public SamplingParams topNSigma(float value) {
    set("top_n_sigma", value);
    return this;
  }

  public SamplingParams xtc(float probability, float threshold) {
    set("xtc_probability", probability).set("xtc_threshold", threshold);
    return this;
  }

  /** The session keeps mu of each sequence, 2 * tau at first. */
  public SamplingParams mirostat(float tau, float eta) {
    set("mirostat_tau", tau).set("mirostat_eta", eta);
    return this;
  }

  /** Goes on from this mu, in place of what the session has kept. */
  public SamplingParams mirostatMu(float value) {
    set("mirostat_mu", value);
    return flag(Layout.SAMPLING_SET_MIROSTAT_MU);
  }

  /** Needs edits, as the other penalties do: those of the tokens that it acts on. */
  public SamplingParams repetitionPenalty(float value) {
    set("repetition_penalty", value);
    return this;
  }

  public SamplingParams frequencyPenalty(float value) {
    set("frequency_penalty", value);
    return this;
  }

  public SamplingParams presencePenalty(float value) {
    set("presence_penalty", value);
    return this;
  }

  /** Only tokens whose edit has Layout.EDIT_ALLOW can be drawn. */
  public SamplingParams onlyAllowed() {
    return flag(Layout.SAMPLING_ONLY_ALLOWED);
  }

  /** How many of the best tokens to list; see SessionOptions.maxTopLogprobs. */
  public SamplingParams topLogprobs(int count) {
    set("num_top_logprobs", count);
    return this;
  }

  int topLogprobs() {
    return getInt("num_top_logprobs");
  }

  private SamplingParams flag(int bit) {
    flags |= bit;
    set("flags", flags);
    return this;
  }
}
