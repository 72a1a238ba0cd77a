#ifndef TENON_OPS_SAMPLER_SAMPLER_H_
#define TENON_OPS_SAMPLER_SAMPLER_H_

#include <cstddef>
#include <cstdint>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/sampler/philox.h"

namespace tenon {

// In which order the filters see the distribution. In all of them edits and
// masks come first, then top-n-sigma, and mirostat is the last filter.
enum class FilterOrder : int32_t {
  // Hugging Face's: temperature, top-k, top-p of what top-k kept, min-p,
  // typical-p, XTC, each on the renormalised rest. (vLLM's too, but that it has
  // min-p before top-k, which matters where top-p follows.)
  kSequential = 0,
  // Temperature, then top-k, top-p and min-p on the same distribution: kept is
  // what all three keep. Typical-p and XTC, which may drop the best token, come
  // after these.
  kJoint = 1,
  // llama.cpp's: top-k, typical-p, top-p, min-p, XTC, and temperature last: the
  // filters see the distribution of temperature 1.
  kLlamaCpp = 2,
};

// Bits of SamplingParams::flags.
enum SamplingFlags : uint32_t {
  // The row of SamplerParams::bitmask applies.
  kUseBitmask = 1u << 0,
  // Only ids whose edit has LogitEdit::kAllow can be drawn.
  kOnlyAllowed = 1u << 1,
  // Mirostat goes on from SamplingParams::mirostat_mu, whatever it has kept.
  kSetMirostatMu = 1u << 2,
};

inline constexpr int kMaxTopLogprobs = 20;

// Sampling parameters of one row. Its layout is also that of the C interface's
// tenon_sampling_params: fields are added at the place of reserved ones, and
// their zero is "off".
struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy, which no filter changes
  int32_t top_k = 0;         // keep the k best; 0, -1 or >= vocab: off
  float top_p = 1.0f;  // keep the smallest set of the best with at least this
                       // probability; >= 1: off, 0: the best alone
  float min_p = 0.0f;  // keep tokens with at least min_p times the best's
                       // probability; 0: off
  FilterOrder filter_order = FilterOrder::kSequential;
  uint32_t reserved0 = 0;
  uint64_t seed = 0;      // of the request
  uint64_t position = 0;  // of the token in its sequence; one draw for each

  float typical_p = 0.0f;        // 0 or >= 1: off
  float top_n_sigma = 0.0f;      // 0: off
  float xtc_probability = 0.0f;  // that XTC drops tokens at all; 0: off
  float xtc_threshold = 0.0f;    // of probability; above 0.5 XTC is off
  float mirostat_tau = 0.0f;     // target surprise in bits; 0: off
  float mirostat_eta = 0.0f;     // learning rate

  // Act on the tokens that the row's edits count, see LogitEdit.
  float repetition_penalty = 0.0f;  // 0 or 1: off
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;

  // DRY. Made into edits on the host (logit_edits.h); Sampler looks past them.
  float dry_multiplier = 0.0f;     // 0: off
  float dry_base = 0.0f;           // 0: 1.75
  int32_t dry_allowed_length = 0;  // 0: 2
  int32_t dry_range = 0;           // last tokens to search; 0: all

  uint32_t flags = 0;            // SamplingFlags
  int32_t num_top_logprobs = 0;  // best tokens to list, at most 20
  float mirostat_mu = 0.0f;      // with kSetMirostatMu: of this draw
  uint32_t reserved[6] = {};
};

// What to do with one logit of a row. The edits of a row are sorted by
// DrawOrder(id, vocab), each id once; LogitEdits (logit_edits.h) makes them
// from a sequence's tokens. An id outside the vocabulary is passed over.
struct alignas(16) LogitEdit {
  static constexpr uint32_t kBan = 1u << 31;       // as if the logit were -inf
  static constexpr uint32_t kAllow = 1u << 30;     // see kOnlyAllowed
  static constexpr uint32_t kInPrompt = 1u << 29;  // for repetition_penalty
  static constexpr uint32_t kCountMask = kInPrompt - 1;

  int32_t id = -1;
  uint32_t state = 0;   // flags above, and how often the id is in the output
  float bias = 0.0f;    // added before the penalties
  float offset = 0.0f;  // added after the penalties (DRY)
};

// What happened to a row; never a guess.
enum class SampleStatus : int32_t {
  kOk = 0,
  kNoSupport = 1,  // every logit is -inf or masked: token -1
  kNonFinite = 2,  // some logit that is not masked is NaN: token -1
};

// Which distribution a logprob is of.
enum class LogprobKind : int32_t {
  // Edits, masks and the temperature applied (kLlamaCpp, greedy: temperature
  // 1), filters not.
  kUnfiltered = 0,
  // The logits as they are: log-softmax over the whole vocabulary.
  kRaw = 1,
  // What the token was drawn from: filters applied, renormalised; 0 for greedy.
  kProcessed = 2,
};

// Sub-tiles: the vocabulary in chunks of 16 consecutive ids is dealt out to
// ceil(vocab / 256) sub-tiles like cards, so that neighbours in id, which in
// real vocabularies are alike in frequency, are spread over all of them. Draw
// order: by sub-tile, then by id. The cumulative sum that a uniform inverts
// runs in this order.
constexpr int64_t NumSubTiles(int64_t vocab) { return (vocab + 255) / 256; }
constexpr int32_t DrawOrder(int32_t id, int64_t vocab) {
  const int32_t tiles = static_cast<int32_t>(NumSubTiles(vocab));
  const int32_t chunk = id / 16;
  return (chunk % tiles) * 256 + (chunk / tiles) * 16 + id % 16;
}

// Draws one token per row. All that follows is per row: any mix of parameters
// in a batch, and a token depends on its row's logits, parameters, edits, mask,
// seed and position alone, not on the batch, its order, strides or launches.
//
// Logits that count, in this order (vLLM's; x is float32, every operation
// rounds once):
//   mask     x = -inf where the row has kUseBitmask and the id's bit is 0, has
//            kOnlyAllowed and the id's edit no kAllow, or where the edit has
//            kBan (bad words, minimum tokens)
//   bias     x = x + bias
//   repetition  x = x > 0 ? x / penalty : x * penalty; of ids in the prompt or
//            the output (Keskar et al. 2019, CTRL)
//   frequency, presence  x = x - frequency * count - presence; of ids in the
//            output (OpenAI)
//   DRY      x = x + offset
//
// Filters, "kept" being what remains when they run, p(i) renormalised on it:
//   top-n-sigma  keeps x >= max - n * sigma, with the population deviation of
//            all logits above -inf (Tang et al. 2024, "Top-nsigma")
//   top-k    the k best (Fan et al. 2018)
//   top-p    the smallest set of the best with sum of p >= top_p (Holtzman et
//            al. 2020)
//   min-p    p(i) >= min_p * p(best kept) (Nguyen et al. 2024), as
//            x >= best + T * ln(min_p)
//   typical-p  those with -log p(i) nearest to the entropy, until their sum of
//            p >= typical_p; all that are equally near (Meister et al. 2022)
//   XTC      with probability xtc_probability: all with p(i) >= xtc_threshold
//            but the last of these (p-e-w 2024; as in llama.cpp)
//   mirostat v2  keeps -log2 p(i) <= mu, at least the best; after the draw, mu
//   =
//            mu - eta * (-log2 p(token) - tau), p renormalised again (Basu et
//            al. 2021; as in llama.cpp)
// Ranks everywhere go by (logit descending, id ascending): exactly k are kept
// on ties. At least one token is kept, whatever the parameters. A token with
// probability zero is never drawn. +inf makes a row one-hot (lowest such id).
//
// The draw inverts the kept distribution's cumulative sum in draw order with
// one uniform u = (b + 1/2) * 2^-53, b the top 53 bits of Philox4x32-10(key =
// seed, counter = (position low, position high, stream, version)), word 0 above
// word
// 1. u is used exactly, as an integer: never 0, never 1.
//
// Shapes: logits [rows, columns] float32, float16 or bfloat16, rows may be
// strided, never modified. vocab is valid_vocab, or all columns where that is
// 0; columns past it are neither read nor drawn. vocab is 1 to 2^20, rows at
// most 2^20. In the memory of the device (host memory for the CPU): `rows`
// SamplingParams; edits and edit_offsets [rows + 1] int32, row i having edits
// [offset i, offset i + 1), optional; bitmask [rows, >= ceil(vocab / 32)]
// int32, rows may be strided: bit id % 32 of word id / 32 is 1 where the id may
// be drawn (XGrammar's layout), optional, without it kUseBitmask has no effect;
// random_bits [rows] int64: the 64 bits to use in place of Philox words 0 and 1
// (for tests), optional; mirostat_mu [rows] float32, in and out, of rows with
// mirostat_tau (start with 2 * tau); without it mirostat is off.
// mirostat_places [rows, 2] int32, optional: where in mirostat_mu, which then
// is [any], row i reads its mu and where it leaves the next one (what it read
// where it drew none or is greedy), for state that outlives a batch. No row
// touches a place that another one writes. A place outside mirostat_mu reads as
// 2 * mirostat_tau, and nothing is written there.
//
// Outputs: tokens [rows] int32; statuses [rows] int32 (SampleStatus). Optional:
// logprobs, raw_logprobs, processed_logprobs [rows] float32 of the token, by
// LogprobKind (NaN without a token, 0 for the token of a +inf row); top_tokens
// [rows, n] int32 and top_logprobs [rows, n] float32, both or none, n at most
// 20: the min(n, num_top_logprobs) best tokens of the distribution
// top_logprobs_kind, best first, -1 and NaN in place of those that a row did
// not ask for or that have no probability; probabilities [rows, vocab] float32,
// rows may be strided: of kProcessed (one-hot for greedy), 0 where none was
// drawn.
//
// Numerics: exponentials by the polynomial of strict_math.h, every sum in a
// fixed order or of integers (row_plan.h), so that CPU and CUDA give the same
// bits on any GPU. Filters and filtered draws weigh tokens in units of 2^-43 of
// the best's probability, plain draws in units of at most 2^-61 of the sum.
// `fast` lets CUDA use its own exponential: still the same bits for the same
// GPU architecture, but not those of the CPU.
//
// The number of passes over the logits is bounded, whatever they are: one, and
// for filters a few more over the parts that can matter.
//
// Outputs overlap nothing. Does not allocate or synchronise; can be captured in
// a CUDA graph. Needs `workspace` of SamplerWorkspaceBytes(params). Zero rows
// is OK. Parameters and edits are device data, so bad ones cannot be rejected
// here: check parameters with ValidateSamplingParams on the host. Bad ones give
// some token of the vocabulary, never undefined behaviour.
struct SamplerParams {
  TensorView logits;
  int64_t valid_vocab = 0;
  const SamplingParams* params = nullptr;
  const LogitEdit* edits = nullptr;
  int64_t num_edits = 0;  // that `edits` has room for
  TensorView edit_offsets;
  TensorView bitmask;
  TensorView random_bits;
  RandomStream stream = RandomStream::kTarget;  // kDraft for a draft model's
  bool fast = false;
  TensorView mirostat_mu;  // in and out
  TensorView mirostat_places;

  TensorView tokens;  // out, as all that follow
  TensorView statuses;
  TensorView logprobs;
  TensorView raw_logprobs;
  TensorView processed_logprobs;
  TensorView top_tokens;
  TensorView top_logprobs;
  LogprobKind top_logprobs_kind = LogprobKind::kUnfiltered;
  TensorView probabilities;

  void* workspace = nullptr;
  size_t workspace_size = 0;

  constexpr int64_t vocab() const {
    return valid_vocab != 0 ? valid_vocab : logits.shape[1];
  }
};

// InvalidArgument that names the parameter.
Status ValidateSamplingParams(const SamplingParams& params);

// What Sampler checks of everything but where memory lies and overlaps.
Status ValidateSamplerShapes(const SamplerParams& params);

size_t SamplerWorkspaceBytes(const SamplerParams& params);

Status Sampler(const SamplerParams& params, Stream stream);

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_SAMPLER_H_
