#include "ops/core/hopper_cuda.cuh"
#include "ops/core/workspace.h"
#include "ops/sampler/sampler_backend.h"
#include "ops/sampler/sampler_kernels_cuda.cuh"

namespace tenon {
namespace {

// Cuts the workspace into what launches leave for those after them.
cuda::SamplerScratch ScratchOf(const SamplerParams& p,
                               WorkspaceCutter* workspace) {
  const int64_t rows = p.logits.shape[0];
  const int64_t tiles = rows * NumSubTiles(p.vocab());
  const bool raw =
      p.raw_logprobs.present() ||
      (p.top_tokens.present() && p.top_logprobs_kind == LogprobKind::kRaw);
  cuda::SamplerScratch scratch;
  scratch.tiles = workspace->Take<SubTile>(tiles);
  scratch.outcomes = workspace->Take<cuda::Outcome>(rows);
  scratch.moments = workspace->Take<Moments>(tiles);
  if (raw) scratch.raw_tiles = workspace->Take<SubTile>(tiles);
  if (p.edits != nullptr) scratch.first_edit = workspace->Take<int32_t>(tiles);
  return scratch;
}

// Null where it is not given.
template <class T>
T* DataOf(const TensorView& view) {
  return view.present() ? view.As<T>() : nullptr;
}

cuda::SamplerCall CallOf(const SamplerParams& p) {
  cuda::SamplerCall call;
  call.logits = p.logits.data;
  call.logits_stride =
      p.logits.stride[0] * static_cast<int64_t>(DTypeSize(p.logits.dtype));
  call.params = p.params;
  WorkspaceCutter workspace(p.workspace);
  call.scratch = ScratchOf(p, &workspace);
  call.rows = static_cast<int32_t>(p.logits.shape[0]);
  call.vocab = static_cast<int32_t>(p.vocab());
  call.num_tiles = static_cast<int32_t>(NumSubTiles(p.vocab()));
  call.is_hopper = cuda::IsHopper(p.logits.device);
  call.dtype = p.logits.dtype;
  call.aligned = cuda::RowsAreAligned(p.logits, 16);
  call.fast = p.fast;
  call.stream = p.stream;
  call.tokens = p.tokens.As<int32_t>();
  call.statuses = p.statuses.As<int32_t>();
  call.logprobs = DataOf<float>(p.logprobs);
  call.random_bits = DataOf<const int64_t>(p.random_bits);
  call.raw_logprobs = DataOf<float>(p.raw_logprobs);
  call.processed_logprobs = DataOf<float>(p.processed_logprobs);
  call.edits = p.edits;
  call.edit_offsets = DataOf<const int32_t>(p.edit_offsets);
  call.num_edits = p.num_edits;
  call.bitmask = DataOf<const uint8_t>(p.bitmask);
  call.bitmask_stride = p.bitmask.stride[0] * int64_t{sizeof(int32_t)};
  call.mirostat = MirostatStateOf(p);
  call.top_tokens = DataOf<int32_t>(p.top_tokens);
  call.top_logprobs = DataOf<float>(p.top_logprobs);
  call.top_tokens_stride = p.top_tokens.stride[0];
  call.top_logprobs_stride = p.top_logprobs.stride[0];
  call.top_columns = static_cast<int32_t>(p.top_tokens.shape[1]);
  call.top_kind = p.top_logprobs_kind;
  call.probabilities = DataOf<float>(p.probabilities);
  call.probabilities_stride = p.probabilities.stride[0];
  return call;
}

}  // namespace

size_t SamplerCudaWorkspaceBytes(const SamplerParams& p) {
  WorkspaceCutter workspace(nullptr);
  ScratchOf(p, &workspace);
  return workspace.size();
}

Status SamplerCuda(const SamplerParams& p, Stream stream) {
  const cuda::DeviceGuard guard(p.logits.device);
  TENON_RETURN_IF_ERROR(guard.status());
  const cuda::SamplerCall call = CallOf(p);
  TENON_RETURN_IF_ERROR(LaunchSummarize(call, stream));
  return LaunchDecide(call, stream);
}

}  // namespace tenon
