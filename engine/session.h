#ifndef TENON_ENGINE_SESSION_H_
#define TENON_ENGINE_SESSION_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/model.h"
#include "engine/moe_kernel_file.h"
#include "ops/core/status.h"
#include "ops/sampler/sampler.h"

namespace tenon {

struct SessionOptions {
  int32_t max_sequences = 32;  // alive at once, and rows in a step
  int32_t max_tokens = 512;    // new tokens of one step, all rows together
  int32_t max_context = 2048;  // tokens of one sequence
  int32_t page_size = 16;      // tokens of a KV cache page
  int64_t num_pages = 0;       // 0: enough for max_sequences full contexts
  int64_t kv_cache_bytes = 0;  // instead of num_pages: as many as fit
  // Of cached K and V: kInvalid for the model's dtype, or kFloat8E4M3, which
  // halves the memory and the reads of attention. Then a cached value is
  // rounded to what is stored times its scale, at most 448 times that; 1 serves
  // models with QK-norm.
  DType kv_cache_dtype = DType::kInvalid;
  float kv_cache_k_scale = 1.0f;
  float kv_cache_v_scale = 1.0f;
  int32_t max_logit_rows = 0;   // tokens whose logits a step computes (the last
                                // of each sampled row; all with kAll); 0:
                                // max_sequences
  int32_t max_logit_edits = 0;  // of all rows of a step, see StepRow::edits
  bool logit_bitmasks = false;  // whether rows may have a bitmask
  int32_t max_top_logprobs = 0;  // most that a row may ask for, at most 20
  // A sequence's tokens do not depend, bit for bit, on how its prompt was cut
  // into chunks, nor on what else ran in its steps. Costs some speed on CUDA;
  // nothing on the CPU.
  bool batch_invariant = false;
  // Count the distinct experts that each layer of a step used (StepStats).
  bool count_experts = false;
  // CUDA: steps in which every row has one token are captured as graphs, one
  // for each number of rows of DecodeBuckets (step_graphs.h), when the session
  // is created. No token depends on it.
  bool cuda_graphs = true;
  // Steps of few tokens have norms and sums of the residual stream in the ops
  // next to them (StepContext::fuse). No bit depends on it; for measurement.
  bool fuse = true;
  int32_t num_threads = 0;  // CPU; 0: one per usable CPU
  // Sizes of the expert kernels on this GPU, which tools/tune measured
  // (ReadMoeKernelFile); null: those built in. No token depends on them. The
  // CPU has none, but checks the table.
  std::shared_ptr<const MoeKernelFile> moe_kernels;
};

enum class LogitsMode { kNone, kLast, kAll };

// What a step does with one sequence: append tokens, and (usually) draw the
// next one. One new token is a decode row, several are a chunk of prefill.
struct StepRow {
  SequenceId sequence;
  // Read before the call returns; may be in the results that it writes.
  const int32_t* tokens = nullptr;
  int32_t num_tokens = 0;
  // Instead of `tokens` (null, num_tokens 1): the token that the step before,
  // whether waited for or not, drew for this sequence. Where it drew none, the
  // results of this row mean nothing.
  bool continues = false;
  bool sample = true;  // false: a chunk with more of the prompt to come
  // `position` and kUseBitmask are set by the session.
  //
  // Mirostat: the session keeps mu of each sequence, 2 * mirostat_tau at first,
  // and moves it on with every row that has mirostat_tau and is sampled; a step
  // with an error does not. A fork begins with that of its parent. Truncation
  // leaves mu alone, but to nothing, which is a beginning: who takes tokens
  // back gives that of the last one kept (StepRowResult::mirostat_mu), with
  // kSetMirostatMu.
  SamplingParams sampling;
  // What changes the logits that its token is drawn from: penalties, biases,
  // bans. LogitEdits (ops/sampler/logit_edits.h) makes them from the tokens of
  // the sequence, `tokens` included. Parameters that act through edits need
  // them, though there may be none. Read before the call returns.
  const LogitEdit* edits = nullptr;
  int32_t num_edits = 0;
  // [ceil(vocab_size / 32)], see SamplerParams::bitmask; optional. Read before
  // the call returns.
  const uint32_t* bitmask = nullptr;
  // Copies float32 logits to the caller's memory: [vocab] of the last token
  // (kLast) or [num_tokens, vocab] (kAll).
  LogitsMode logits_mode = LogitsMode::kNone;
  float* logits = nullptr;
};

struct StepRowResult {
  int32_t token = -1;  // -1: not sampled, or no token could be (see status)
  float logprob = 0.0f;
  SampleStatus status = SampleStatus::kOk;
  float mirostat_mu = 0.0f;  // after this draw; 0 without mirostat
  // The best tokens by LogprobKind::kUnfiltered, best first: as many as
  // sampling.num_top_logprobs asks for and the row has.
  int32_t num_top = 0;
  int32_t top_tokens[kMaxTopLogprobs] = {};
  float top_logprobs[kMaxTopLogprobs] = {};
};

struct StepStats {
  int32_t rows = 0;
  int32_t tokens = 0;
  double microseconds = 0.0;  // of the whole call, or from EnqueueStep to the
                              // end of WaitStep
  // Of each sparse layer, in order; empty without count_experts.
  std::vector<int32_t> distinct_experts;
};

inline constexpr int kMaxStepsInFlight = 2;

// Runs a model: owns the paged KV cache, the activations and a stream. All
// device memory is allocated by Create. Not thread-safe: one caller at a time.
//
// After a device error in a step the session finds out whether the device still
// works. If not, every later call is Unavailable.
class Session {
 public:
  // ResourceExhausted, with the needed size, where the memory is not there;
  // InvalidArgument for options that cannot be used; Unimplemented for one rank
  // of a model, whose steps would need the sums over all ranks.
  static StatusOr<std::unique_ptr<Session>> Create(
      std::shared_ptr<const Model> model, const SessionOptions& options);
  ~Session();

  // An empty sequence.
  StatusOr<SequenceId> CreateSequence();
  // A second sequence with the same tokens so far. Pages are shared until one
  // of the two writes to them.
  StatusOr<SequenceId> ForkSequence(SequenceId sequence);
  // Forgets all tokens but the first `length`.
  Status TruncateSequence(SequenceId sequence, int32_t length);
  Status ReleaseSequence(SequenceId sequence);
  // Tokens in the cache.
  StatusOr<int32_t> SequenceLength(SequenceId sequence) const;

  // Runs the model over the new tokens of all rows in one pass and fills
  // results[i] for rows[i]. All or nothing: every row is checked before any
  // work, and after an error each sequence is as it was.
  //   InvalidArgument  a token id outside the vocabulary, no tokens, a sequence
  //                    twice, bad sampling parameters, edits or a bitmask
  //                    that are missing or that the session has no room for
  //   NotFound         a sequence that does not exist (any more)
  //   ResourceExhausted  more tokens, rows, logits, context or pages than the
  //                    session has
  // Allocates nothing, once `results` and `stats` have room for such a step.
  Status Step(const std::vector<StepRow>& rows,
              std::vector<StepRowResult>* results, StepStats* stats = nullptr);

  // The same in two parts, so that the next step can be on its way to the
  // device before the tokens of the last one are read. EnqueueStep checks the
  // rows and starts their step, or does nothing at all; WaitStep waits for the
  // step that was enqueued first and gives its results. At most two steps are
  // in flight; calls out of order are a FailedPrecondition, and so is Step
  // meanwhile.
  //
  // Sequences are then as after all steps in flight. They may be created,
  // forked, truncated and released: one that has ended can be released at once,
  // though a further step of it is under way, whose results mean nothing.
  // Callers' logits are written until WaitStep returns; with them, EnqueueStep
  // may wait for its own step (memory that is not pinned).
  //
  // An error of the device in WaitStep leaves the session unable to go on.
  Status EnqueueStep(const std::vector<StepRow>& rows);
  Status WaitStep(std::vector<StepRowResult>* results,
                  StepStats* stats = nullptr);
  int32_t num_steps_in_flight() const;

  const Model& model() const;
  const SessionOptions& options() const;
  int32_t num_sequences() const;
  int64_t num_free_pages() const;
  int64_t kv_cache_bytes() const;  // of all pages
  // CUDA graphs captured by Create, and the device memory that they took (by
  // which its free memory shrank meanwhile).
  int64_t num_graphs() const;
  int64_t graph_bytes() const;
  // Whether an error of the device has left the session unable to go on.
  bool is_broken() const;

 private:
  struct Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tenon

#endif  // TENON_ENGINE_SESSION_H_
