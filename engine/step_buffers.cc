#include "engine/step_buffers.h"

#include <algorithm>
#include <utility>

#include "ops/core/workspace.h"

namespace tenon {

StatusOr<StepBuffers> StepBuffers::Create(Device device,
                                          const StepLimits& limits) {
  StepBuffers b;
  b.device_ = device;
  b.max_pages_ = limits.max_pages_per_row;
  WorkspaceCutter layout(nullptr);  // counts; the memory comes after
  const auto place = [&](int64_t count, size_t size, int64_t* offset) {
    *offset = static_cast<int64_t>(layout.size());
    layout.TakeBytes(static_cast<size_t>(count) * size);
  };
  const int64_t tokens = limits.max_tokens;
  const int64_t rows = limits.max_rows;
  const int64_t logit_rows = limits.max_logit_rows;
  place(logit_rows, sizeof(int32_t), &b.tokens_);
  place(logit_rows, sizeof(float), &b.logprobs_);
  place(logit_rows, sizeof(int32_t), &b.statuses_);
  b.results_end_ = static_cast<int64_t>(layout.size());
  place(tokens, sizeof(int32_t), &b.token_ids_);
  place(tokens, sizeof(int32_t), &b.positions_);
  place(tokens, sizeof(int64_t), &b.slot_mapping_);
  place(rows + 1, sizeof(int32_t), &b.query_start_);
  place(rows, sizeof(int32_t), &b.kv_len_);
  place(logit_rows, sizeof(int32_t), &b.logit_rows_);
  place(logit_rows, sizeof(SamplingParams), &b.sampling_);
  place(rows * b.max_pages_, sizeof(int32_t), &b.block_table_);

  const bool cuda = device.type == DeviceType::kCuda;
  StatusOr<Buffer> host = Buffer::Allocate(
      device, layout.size(), cuda ? MemoryKind::kPinned : MemoryKind::kDevice);
  TENON_RETURN_IF_ERROR(host.status());
  b.host_ = *std::move(host);
  if (cuda) {
    StatusOr<Buffer> memory = Buffer::Allocate(device, layout.size());
    TENON_RETURN_IF_ERROR(memory.status());
    b.memory_ = *std::move(memory);
  }
  return b;
}

Status StepBuffers::Upload(int32_t rows, Stream stream) {
  if (memory_.data() == nullptr) return Status();
  const int64_t end = block_table_ + int64_t{rows} * max_pages_ *
                                         static_cast<int64_t>(sizeof(int32_t));
  return CopyMemory(static_cast<char*>(memory_.data()) + results_end_, device_,
                    static_cast<char*>(host_.data()) + results_end_, Device(),
                    static_cast<size_t>(end - results_end_), stream);
}

Status StepBuffers::Download(Stream stream) {
  if (memory_.data() == nullptr) return Status();
  return CopyMemory(host_.data(), Device(), memory_.data(), device_,
                    static_cast<size_t>(results_end_), stream);
}

TensorView StepBuffers::DeviceView(int64_t offset, DType dtype,
                                   std::initializer_list<int64_t> shape) const {
  void* base = memory_.data() != nullptr ? memory_.data() : host_.data();
  return MakeTensor(static_cast<char*>(base) + offset, dtype, device_, shape);
}

StepInputs StepBuffers::Inputs(int32_t rows, int32_t num_logit_rows) const {
  const int32_t tokens = query_start()[rows];
  StepInputs in;
  in.token_ids = DeviceView(token_ids_, DType::kInt32, {tokens});
  in.positions = DeviceView(positions_, DType::kInt32, {tokens});
  in.slot_mapping = DeviceView(slot_mapping_, DType::kInt64, {tokens});
  in.block_table = DeviceView(block_table_, DType::kInt32, {rows, max_pages_});
  in.query_start = DeviceView(query_start_, DType::kInt32, {rows + 1});
  in.kv_len = DeviceView(kv_len_, DType::kInt32, {rows});
  in.logit_rows = DeviceView(logit_rows_, DType::kInt32, {num_logit_rows});
  in.max_kv_len = *std::max_element(kv_len(), kv_len() + rows);
  for (int32_t i = 0; i < rows; ++i) {
    in.max_query_len =
        std::max(in.max_query_len, query_start()[i + 1] - query_start()[i]);
  }
  return in;
}

SamplerParams StepBuffers::Sampling(const Activations& activations,
                                    int32_t rows) const {
  SamplerParams p;
  p.logits = Rows(activations.logits, 0, rows);
  p.params = DeviceView(sampling_, DType::kUInt8, {1}).As<SamplingParams>();
  p.tokens = DeviceView(tokens_, DType::kInt32, {rows});
  p.logprobs = DeviceView(logprobs_, DType::kFloat32, {rows});
  p.statuses = DeviceView(statuses_, DType::kInt32, {rows});
  p.workspace = activations.workspace;
  p.workspace_size = activations.workspace_size;
  return p;
}

}  // namespace tenon
