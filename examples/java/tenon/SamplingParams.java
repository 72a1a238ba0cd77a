package tenon;

/** How a sequence's tokens are drawn; the fields of tenon_sampling_params. */
public final class SamplingParams extends Struct {
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
}
