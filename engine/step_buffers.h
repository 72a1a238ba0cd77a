#ifndef TENON_ENGINE_STEP_BUFFERS_H_
#define TENON_ENGINE_STEP_BUFFERS_H_

#include <cstdint>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "ops/core/memory.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// The small arrays that go to the device before a step, and those that come
// back after it. Host and device memory have one layout, so that each way is
// one copy; on the CPU they are the same memory.
class StepBuffers {
 public:
  static StatusOr<StepBuffers> Create(Device device, const StepLimits& limits);

  // Host side, for the session to fill.
  int32_t* token_ids() { return Host<int32_t>(token_ids_); }
  int32_t* positions() { return Host<int32_t>(positions_); }
  int64_t* slot_mapping() { return Host<int64_t>(slot_mapping_); }
  int32_t* query_start() const { return Host<int32_t>(query_start_); }
  int32_t* kv_len() const { return Host<int32_t>(kv_len_); }
  int32_t* logit_rows() { return Host<int32_t>(logit_rows_); }
  SamplingParams* sampling() { return Host<SamplingParams>(sampling_); }
  int32_t* block_table() { return Host<int32_t>(block_table_); }

  // Results, after Download and a synchronisation.
  const int32_t* tokens() const { return Host<int32_t>(tokens_); }
  const float* logprobs() const { return Host<float>(logprobs_); }
  const int32_t* statuses() const { return Host<int32_t>(statuses_); }

  // Copies what a step of `rows` rows needs, in stream order.
  Status Upload(int32_t rows, Stream stream);
  Status Download(Stream stream);

  // Device views of the uploaded arrays, with the bounds that the host side of
  // query_start and kv_len gives. At least one row.
  StepInputs Inputs(int32_t rows, int32_t num_logit_rows) const;
  // The sampler's arguments for the first `rows` logit rows.
  SamplerParams Sampling(const Activations& activations, int32_t rows) const;

 private:
  template <class T>
  T* Host(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(host_.data()) + offset);
  }
  TensorView DeviceView(int64_t offset, DType dtype,
                        std::initializer_list<int64_t> shape) const;

  Device device_;
  int64_t max_pages_ = 0;
  Buffer host_;
  Buffer memory_;  // empty on the CPU
  // Byte offsets of the arrays; the block table is last of the inputs, since
  // only the rows in use are copied.
  int64_t token_ids_ = 0;
  int64_t positions_ = 0;
  int64_t slot_mapping_ = 0;
  int64_t query_start_ = 0;
  int64_t kv_len_ = 0;
  int64_t logit_rows_ = 0;
  int64_t sampling_ = 0;
  int64_t tokens_ = 0;
  int64_t logprobs_ = 0;
  int64_t statuses_ = 0;
  int64_t results_end_ = 0;
  int64_t block_table_ = 0;
};

}  // namespace tenon

#endif  // TENON_ENGINE_STEP_BUFFERS_H_
