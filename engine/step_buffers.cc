#include "engine/step_buffers.h"

#include <algorithm>
#include <utility>

#include "ops/core/workspace.h"

namespace tenon {
namespace {

// Places an array of `count` elements of `size` bytes; returns its offset.
int64_t Place(WorkspaceCutter* layout, int64_t count, size_t size) {
  const int64_t offset = static_cast<int64_t>(layout->size());
  layout->TakeBytes(static_cast<size_t>(count) * size);
  return offset;
}

}  // namespace

SamplingParams CheapestSampling() {
  SamplingParams greedy;
  greedy.temperature = 0.0f;
  return greedy;
}

StatusOr<StepBuffers> StepBuffers::Create(Device device,
                                          const StepLimits& limits) {
  StepBuffers b;
  b.device_ = device;
  b.limits_ = limits;
  WorkspaceCutter layout(nullptr);  // counts; the memory comes after
  const int64_t logit_rows = limits.max_logit_rows;
  b.tokens_ = Place(&layout, logit_rows, sizeof(int32_t));
  b.logprobs_ = Place(&layout, logit_rows, sizeof(float));
  b.statuses_ = Place(&layout, logit_rows, sizeof(int32_t));
  b.mirostat_mu_ = Place(&layout, 2 * int64_t{limits.max_rows}, sizeof(float));
  const int64_t top = logit_rows * limits.max_top_logprobs;
  b.top_begin_ = static_cast<int64_t>(layout.size());
  b.top_tokens_ = Place(&layout, top, sizeof(int32_t));
  b.top_logprobs_ = Place(&layout, top, sizeof(float));
  b.results_end_ = static_cast<int64_t>(layout.size());
  StepShape largest;
  largest.tokens = limits.max_tokens;
  largest.rows = limits.max_rows;
  largest.logit_rows = limits.max_logit_rows;
  const auto bytes = static_cast<size_t>(b.LayOut(largest).end);

  for (Buffer& side : b.host_) {
    StatusOr<Buffer> host =
        Buffer::Allocate(device, bytes, HostMemoryKind(device));
    TENON_RETURN_IF_ERROR(host.status());
    side = *std::move(host);
  }
  StatusOr<Buffer> memory = Buffer::Allocate(device, bytes);
  TENON_RETURN_IF_ERROR(memory.status());
  b.memory_ = *std::move(memory);
  return b;
}

StepBuffers::InputArrays StepBuffers::LayOut(const StepShape& shape) const {
  WorkspaceCutter layout(nullptr);
  layout.TakeBytes(static_cast<size_t>(results_end_));
  const int64_t rows = shape.rows;
  InputArrays a;
  a.block_table =
      Place(&layout, rows * limits_.max_pages_per_row, sizeof(int32_t));
  a.token_ids = Place(&layout, shape.tokens, sizeof(int32_t));
  a.positions = Place(&layout, shape.tokens, sizeof(int32_t));
  a.slot_mapping = Place(&layout, shape.tokens, sizeof(int64_t));
  a.query_start = Place(&layout, rows + 1, sizeof(int32_t));
  a.kv_len = Place(&layout, rows, sizeof(int32_t));
  a.logit_rows = Place(&layout, shape.logit_rows, sizeof(int32_t));
  a.sampling = Place(&layout, shape.logit_rows, sizeof(SamplingParams));
  a.mirostat_places = Place(&layout, shape.logit_rows, sizeof(MirostatPlaces));
  a.edit_offsets = Place(&layout, shape.logit_rows + 1, sizeof(int32_t));
  a.edits = Place(&layout, limits_.max_logit_edits, sizeof(LogitEdit));
  a.bitmask = Place(&layout, int64_t{shape.logit_rows} * limits_.bitmask_words,
                    sizeof(uint32_t));
  a.end = static_cast<int64_t>(layout.size());
  return a;
}

void StepBuffers::Begin(int side, const StepShape& shape) {
  side_ = side;
  shape_ = shape;
  inputs_ = LayOut(shape);
  rows_added_ = 0;
  masked_rows_ = 0;
  Host<int32_t>(inputs_.edit_offsets)[0] = 0;
}

void StepBuffers::AddSampledRow(const LogitEdit* edits, int32_t num_edits,
                                const uint32_t* bitmask,
                                MirostatPlaces mirostat) {
  int32_t* offsets = Host<int32_t>(inputs_.edit_offsets);
  const int32_t row = rows_added_++;
  Host<MirostatPlaces>(inputs_.mirostat_places)[row] = mirostat;
  offsets[row + 1] = offsets[row] + num_edits;
  std::copy(edits, edits + num_edits,
            Host<LogitEdit>(inputs_.edits) + offsets[row]);
  if (bitmask == nullptr) return;
  const int64_t words = limits_.bitmask_words;
  std::copy(bitmask, bitmask + words,
            Host<uint32_t>(inputs_.bitmask) + row * words);
  masked_rows_ = rows_added_;
}

void StepBuffers::FinishSampledRows() {
  while (rows_added_ < shape_.sampled_rows) {
    AddSampledRow(nullptr, 0, nullptr, {});
  }
}

void StepBuffers::FillPadding(int32_t first) {
  for (int32_t i = first; i < shape_.rows; ++i) {
    token_ids()[i] = -1;
    positions()[i] = -1;
    slot_mapping()[i] = -1;
    query_start()[i + 1] = i + 1;
    kv_len()[i] = 0;
    logit_rows()[i] = i;
    sampling()[i] = CheapestSampling();
  }
  query_start()[0] = 0;
}

Status StepBuffers::CopyMirostatMu(int32_t from, int32_t to, Stream stream) {
  float* mu = At<float>(memory_, mirostat_mu_);
  return CopyMemory(mu + to, device_, mu + from, device_, sizeof(float),
                    stream);
}

int64_t StepBuffers::FewPages() const {
  // A table for long contexts would be most of what is uploaded. Below this, a
  // second copy takes longer than what it saves.
  constexpr int64_t kLargeTable = int64_t{32} << 10;
  const int64_t rows = shape_.rows;
  const int64_t max_pages = limits_.max_pages_per_row;
  if (rows * max_pages * static_cast<int64_t>(sizeof(int32_t)) < kLargeTable) {
    return 0;
  }
  const int32_t tokens = *std::max_element(kv_len(), kv_len() + rows);
  const int64_t pages =
      (int64_t{tokens} + limits_.page_size - 1) / limits_.page_size;
  return pages <= max_pages / 2 ? pages : 0;
}

Status StepBuffers::Upload(Stream stream) {
  int64_t begin = inputs_.block_table;
  const int64_t few_pages = FewPages();
  if (few_pages > 0) {
    TENON_RETURN_IF_ERROR(CopyPinnedRows(
        At<char>(memory_, inputs_.block_table), block_table(), device_,
        shape_.rows, few_pages, limits_.max_pages_per_row, stream));
    begin = inputs_.token_ids;
  }
  const auto copy = [&](int64_t begin, int64_t end) {
    return CopyPinned(At<char>(memory_, begin), Host<char>(begin), device_,
                      static_cast<size_t>(end - begin), stream);
  };
  const int64_t num_edits =
      Host<int32_t>(inputs_.edit_offsets)[shape_.sampled_rows];
  TENON_RETURN_IF_ERROR(copy(
      begin,
      inputs_.edits + num_edits * static_cast<int64_t>(sizeof(LogitEdit))));
  if (masked_rows_ == 0) return Status();
  const int64_t row_bytes =
      limits_.bitmask_words * static_cast<int64_t>(sizeof(uint32_t));
  return copy(inputs_.bitmask, inputs_.bitmask + masked_rows_ * row_bytes);
}

Status StepBuffers::Download(Stream stream) {
  has_top_[side_] = false;
  for (int32_t i = 0; i < shape_.sampled_rows; ++i) {
    if (sampling()[i].num_top_logprobs > 0) has_top_[side_] = true;
  }
  const int64_t end = has_top_[side_] ? results_end_ : top_begin_;
  return CopyPinned(Host<char>(0), memory_.data(), device_,
                    static_cast<size_t>(end), stream);
}

TensorView StepBuffers::DeviceView(int64_t offset, DType dtype,
                                   std::initializer_list<int64_t> shape) const {
  return MakeTensor(At<char>(memory_, offset), dtype, device_, shape);
}

StepInputs StepBuffers::Inputs() const {
  const InputArrays& a = inputs_;
  const int64_t tokens = shape_.tokens;
  const int64_t rows = shape_.rows;
  StepInputs in;
  in.token_ids = DeviceView(a.token_ids, DType::kInt32, {tokens});
  in.previous =
      DeviceView(tokens_, DType::kInt32, {int64_t{limits_.max_logit_rows}});
  in.positions = DeviceView(a.positions, DType::kInt32, {tokens});
  in.slot_mapping = DeviceView(a.slot_mapping, DType::kInt64, {tokens});
  in.block_table = DeviceView(a.block_table, DType::kInt32,
                              {rows, int64_t{limits_.max_pages_per_row}});
  in.query_start = DeviceView(a.query_start, DType::kInt32, {rows + 1});
  in.kv_len = DeviceView(a.kv_len, DType::kInt32, {rows});
  in.logit_rows =
      DeviceView(a.logit_rows, DType::kInt32, {int64_t{shape_.logit_rows}});
  if (shape_.is_decode) {
    in.all_logits = true;
    in.max_kv_len = limits_.max_context;
    in.max_query_len = 1;
    return in;
  }
  in.max_kv_len = *std::max_element(kv_len(), kv_len() + rows);
  for (int32_t i = 0; i < rows; ++i) {
    in.max_query_len =
        std::max(in.max_query_len, query_start()[i + 1] - query_start()[i]);
  }
  return in;
}

SamplerParams StepBuffers::Sampling(const Activations& activations) const {
  const int64_t rows = shape_.sampled_rows;
  SamplerParams p;
  p.logits = Rows(activations.logits, 0, rows);
  p.params =
      DeviceView(inputs_.sampling, DType::kUInt8, {1}).As<SamplingParams>();
  p.tokens = DeviceView(tokens_, DType::kInt32, {rows});
  p.logprobs = DeviceView(logprobs_, DType::kFloat32, {rows});
  p.statuses = DeviceView(statuses_, DType::kInt32, {rows});
  p.mirostat_mu = DeviceView(mirostat_mu_, DType::kFloat32,
                             {2 * int64_t{limits_.max_rows}});
  p.mirostat_places =
      DeviceView(inputs_.mirostat_places, DType::kInt32, {rows, 2});
  if (limits_.max_logit_edits > 0) {
    p.edits = DeviceView(inputs_.edits, DType::kUInt8, {1}).As<LogitEdit>();
    p.num_edits = limits_.max_logit_edits;
    p.edit_offsets =
        DeviceView(inputs_.edit_offsets, DType::kInt32, {rows + 1});
  }
  if (limits_.bitmask_words > 0) {
    p.bitmask = DeviceView(inputs_.bitmask, DType::kInt32,
                           {rows, int64_t{limits_.bitmask_words}});
  }
  if (limits_.max_top_logprobs > 0) {
    const int64_t columns = limits_.max_top_logprobs;
    p.top_tokens = DeviceView(top_tokens_, DType::kInt32, {rows, columns});
    p.top_logprobs =
        DeviceView(top_logprobs_, DType::kFloat32, {rows, columns});
  }
  p.workspace = activations.workspace;
  p.workspace_size = activations.workspace_size;
  return p;
}

}  // namespace tenon
