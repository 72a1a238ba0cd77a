#ifndef TENON_ENGINE_STEP_BUFFERS_H_
#define TENON_ENGINE_STEP_BUFFERS_H_

#include <cstdint>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "ops/core/memory.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// How much of everything a step has.
struct StepShape {
  int32_t tokens = 0;
  int32_t rows = 0;
  int32_t logit_rows = 0;
  int32_t sampled_rows = 0;  // the first of the logit rows
  // One token in each row and all logits, padding included; see
  // DecodeBuckets.
  bool is_decode = false;
};

// For rows whose token nobody wants.
SamplingParams CheapestSampling();

// Where a row's mirostat mu is and where the next one goes; -1: it has none.
struct MirostatPlaces {
  int32_t from = -1;
  int32_t to = -1;
};

// The small arrays that go to the device before a step, and those that come
// back after it. Host and device memory have one layout, so that each way is
// one copy. The inputs lie one after the other, as the shape of the step has
// it: steps of one shape have them in the same places.
//
// The host has them twice, so that one step can be filled in while another one
// is under way.
class StepBuffers {
 public:
  static StatusOr<StepBuffers> Create(Device device, const StepLimits& limits);

  // Begins a step in the host's arrays `side`, 0 or 1, whose last step is over.
  // What they hold is undefined.
  void Begin(int side, const StepShape& shape);
  const StepShape& shape() const { return shape_; }

  // Host side of the step that was begun last, for the session to fill.
  int32_t* token_ids() { return Host<int32_t>(inputs_.token_ids); }
  int32_t* positions() { return Host<int32_t>(inputs_.positions); }
  int64_t* slot_mapping() { return Host<int64_t>(inputs_.slot_mapping); }
  int32_t* query_start() const { return Host<int32_t>(inputs_.query_start); }
  int32_t* kv_len() const { return Host<int32_t>(inputs_.kv_len); }
  int32_t* logit_rows() { return Host<int32_t>(inputs_.logit_rows); }
  SamplingParams* sampling() { return Host<SamplingParams>(inputs_.sampling); }
  int32_t* block_table() { return Host<int32_t>(inputs_.block_table); }

  // The edits and the bitmask (null for none) and the mirostat state of a
  // sampled row, row after row.
  void AddSampledRow(const LogitEdit* edits, int32_t num_edits,
                     const uint32_t* bitmask, MirostatPlaces mirostat);
  // What is left of the sampled rows has none of them.
  void FinishSampledRows();

  // Makes rows from `first` on padding, of a decode step: without experts,
  // without attention, written nowhere.
  void FillPadding(int32_t first);

  // Results of the step that had this side, after Download and a
  // synchronisation.
  const int32_t* tokens(int side) const {
    return At<int32_t>(host_[side], tokens_);
  }
  const float* logprobs(int side) const {
    return At<float>(host_[side], logprobs_);
  }
  const int32_t* statuses(int side) const {
    return At<int32_t>(host_[side], statuses_);
  }
  // Whether a row of that step asked for its best tokens.
  bool has_top(int side) const { return has_top_[side]; }
  // [rows, max_top_logprobs], if one did.
  const int32_t* top_tokens(int side) const {
    return At<int32_t>(host_[side], top_tokens_);
  }
  const float* top_logprobs(int side) const {
    return At<float>(host_[side], top_logprobs_);
  }

  // [2 * max_rows], which the session deals out: what the mu of sequences was
  // after that step. On the device they stay from step to step.
  const float* mirostat_mu(int side) const {
    return At<float>(host_[side], mirostat_mu_);
  }

  // In stream order.
  Status CopyMirostatMu(int32_t from, int32_t to, Stream stream);
  Status Upload(Stream stream);
  Status Download(Stream stream);

  // Device views of the uploaded arrays. The bounds of lengths are what the
  // host side holds; of a decode step they are those of the limits, so that
  // they do not change from step to step. At least one row.
  StepInputs Inputs() const;
  // The sampler's arguments for the sampled rows.
  SamplerParams Sampling(const Activations& activations) const;

 private:
  // Byte offsets.
  struct InputArrays {
    int64_t block_table = 0;  // where few pages are used, only their columns
    int64_t token_ids = 0;
    int64_t positions = 0;
    int64_t slot_mapping = 0;
    int64_t query_start = 0;
    int64_t kv_len = 0;
    int64_t logit_rows = 0;
    int64_t sampling = 0;
    int64_t mirostat_places = 0;
    int64_t edit_offsets = 0;
    int64_t edits = 0;    // only as many as there are go to the device
    int64_t bitmask = 0;  // goes to the device where a row has one
    int64_t end = 0;
  };
  InputArrays LayOut(const StepShape& shape) const;
  // Columns of the block table to upload; 0: all, together with what follows.
  int64_t FewPages() const;
  template <class T>
  static T* At(const Buffer& buffer, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(buffer.data()) + offset);
  }
  template <class T>
  T* Host(int64_t offset) const {
    return At<T>(host_[side_], offset);
  }
  TensorView DeviceView(int64_t offset, DType dtype,
                        std::initializer_list<int64_t> shape) const;

  Device device_;
  StepLimits limits_;
  Buffer host_[2];
  Buffer memory_;  // of the device
  int side_ = 0;
  bool has_top_[2] = {};
  int64_t tokens_ = 0;
  int64_t logprobs_ = 0;
  int64_t statuses_ = 0;
  int64_t top_begin_ = 0;  // after what every step copies back
  int64_t top_tokens_ = 0;
  int64_t top_logprobs_ = 0;
  int64_t mirostat_mu_ = 0;
  int64_t results_end_ = 0;
  StepShape shape_;
  InputArrays inputs_;
  // Of the step that was begun last.
  int32_t rows_added_ = 0;   // by AddSampledRow
  int32_t masked_rows_ = 0;  // up to and including the last with a bitmask
};

}  // namespace tenon

#endif  // TENON_ENGINE_STEP_BUFFERS_H_
