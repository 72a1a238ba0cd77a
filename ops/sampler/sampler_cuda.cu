#include "ops/core/workspace.h"
#include "ops/sampler/sampler_backend.h"
#include "ops/sampler/sampler_kernels_cuda.cuh"

namespace tenon {
namespace {

// Cuts the workspace into what the first launch leaves for the second.
cuda::SamplerScratch ScratchOf(const SamplerParams& p,
                               WorkspaceCutter* workspace) {
  const int64_t tiles = p.logits.shape[0] * NumSubTiles(p.vocab());
  const bool raw =
      p.raw_logprobs.present() ||
      (p.top_tokens.present() && p.top_logprobs_kind == LogprobKind::kRaw);
  cuda::SamplerScratch scratch;
  scratch.tiles = workspace->Take<SubTile>(tiles);
  scratch.moments = workspace->Take<Moments>(tiles);
  if (raw) scratch.raw_tiles = workspace->Take<SubTile>(tiles);
  if (p.edits != nullptr) scratch.first_edit = workspace->Take<int32_t>(tiles);
  return scratch;
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
  WorkspaceCutter workspace(p.workspace);
  cuda::SamplerCall call;
  call.p = p;
  call.scratch = ScratchOf(p, &workspace);
  call.num_tiles = static_cast<int>(NumSubTiles(p.vocab()));
  call.aligned = cuda::RowsAreAligned(p.logits, 16);
  TENON_RETURN_IF_ERROR(LaunchSummarize(call, stream));
  return LaunchDecide(call, stream);
}

}  // namespace tenon
