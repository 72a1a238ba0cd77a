#include <algorithm>

#include "ops/moe/moe_few_cuda.cuh"
#include "ops/moe/moe_few_kernel_cuda.cuh"
#include "ops/quantize/fp8_scale.h"

namespace tenon {
namespace {

using namespace moe_few;  // NOLINT: its constants

constexpr char kOp[] = "Moe";
constexpr int64_t kSharedLimit = 227 * 1024;

int64_t RowBytes(const ExpertMatrices& m) {
  return m.cols * static_cast<int64_t>(DTypeSize(m.dtype));
}

// Sizes and shared memory. stages is as asked for, or what there is room for;
// below kMinStages: the call does not fit.
struct Plan {
  int x_steps;
  int hidden_steps;
  int ranges;
  int down_steps;
  int stages;
  Layout layout;
};

template <class S>
Plan MakePlan(const MoeParams& p, int num_processors, int stages) {
  Plan plan;
  plan.x_steps = static_cast<int>(RowBytes(p.gate) / 128);
  plan.hidden_steps = static_cast<int>(RowBytes(p.down) / 128);
  const int units = static_cast<int>(p.down.rows / kUnitRows);
  plan.ranges = std::min(num_processors, units);
  const int most_units = cuda::CeilDiv(units, plan.ranges);
  // In stages of about the same depth.
  const int most_steps = std::min(kMaxDownSteps, kStageScales / most_units);
  const int down_stages = cuda::CeilDiv(plan.hidden_steps, most_steps);
  plan.down_steps = cuda::CeilDiv(plan.hidden_steps, down_stages);

  const bool fp8 = S::kFp8;
  const int slots = static_cast<int>(NumElements(p.topk_ids));
  Layout& layout = plan.layout;
  int64_t bytes = 0;
  const auto take = [&](int64_t count) {
    const int64_t begin = bytes;
    bytes += (count + 15) / 16 * 16;
    return static_cast<int32_t>(begin);
  };
  const int64_t x_bytes = int64_t{plan.x_steps} * S::kTokenBlockBytes;
  const int64_t hidden_bytes =
      int64_t{S::kHiddenBuffers} * plan.hidden_steps * S::kTokenBlockBytes;
  // Offsets from the end of the ring.
  layout.x = take(x_bytes);
  layout.hidden = take(hidden_bytes);
  layout.x_scales = take(fp8 ? int64_t{plan.x_steps} * S::kTokens * 4 : 0);
  layout.hidden_scales =
      take(fp8 ? int64_t{S::kHiddenBuffers} * plan.hidden_steps * S::kTokens * 4
               : 0);
  layout.headers = take(kMaxStages * 16);
  layout.stage_scales = take(fp8 ? kMaxStages * kStageScales * 4 : 0);
  layout.tiles = take(kTokenWarps * S::kTileBytes);
  layout.value_stride = most_units * kUnitRows;
  layout.values = take(int64_t{slots} * layout.value_stride * 4);
  layout.chosen = take(slots * 16);
  layout.slots = take(slots * 8);
  layout.experts = take(p.gate.num_experts * 4);
  layout.count = take(4);
  layout.barriers = take(kNumBarriers * 8);

  // An operand has 64 rows, whether or not the last stage has.
  const int64_t operand =
      int64_t{8} * kBlockBytes * std::max(kTileSteps, plan.down_steps);
  bytes = std::max(bytes, operand - kStageBytes);
  plan.stages = static_cast<int>(std::min<int64_t>(
      std::min(stages, kMaxStages), (kSharedLimit - bytes) / kStageBytes));
  const int32_t ring = std::max(plan.stages, 0) * kStageBytes;
  for (int32_t* offset :
       {&layout.x, &layout.hidden, &layout.x_scales, &layout.hidden_scales,
        &layout.headers, &layout.stage_scales, &layout.tiles, &layout.values,
        &layout.chosen, &layout.slots, &layout.experts, &layout.count,
        &layout.barriers}) {
    *offset += ring;
  }
  layout.bytes = static_cast<int32_t>(ring + bytes);
  return plan;
}

// Boxes of 8 rows by `steps` blocks of 128 bytes.
Status MakeWeightMap(const ExpertMatrices& m, int steps, CUtensorMap* map) {
  const int per_block = 128 / static_cast<int>(DTypeSize(m.dtype));
  const int64_t shape[4] = {per_block, m.rows, m.cols / per_block,
                            m.num_experts};
  // A stride of one expert alone is never used, but has to be a valid one.
  const int64_t strides[3] = {
      m.row_stride, per_block,
      m.num_experts > 1 ? m.expert_stride : m.rows * m.row_stride};
  const int box[4] = {per_block, kUnitRows, steps, 1};
  return cuda::MakeTensorMap(kOp, m.dtype, m.data, 4, shape, strides, box, map);
}

template <class S>
Status Launch(const MoeParams& p, const MoeScratch& scratch, int num_processors,
              int stages, Stream stream) {
  using T = typename S::T;
  const Plan plan = MakePlan<S>(p, num_processors, stages);
  Params k = {};
  TENON_RETURN_IF_ERROR(MakeWeightMap(p.gate, kTileSteps, &k.gate));
  TENON_RETURN_IF_ERROR(MakeWeightMap(p.up, kTileSteps, &k.up));
  TENON_RETURN_IF_ERROR(MakeWeightMap(p.down, plan.down_steps, &k.down));
  const bool fp8 = IsFp8(p.gate);
  k.x = fp8 ? scratch.x_fp8 : p.x.data;
  k.x_row_bytes = fp8 ? p.gate.cols : p.x.stride[0] * int64_t{sizeof(T)};
  k.x_scales = scratch.x_scales;
  k.gate_scales = p.gate.scales;
  k.up_scales = p.up.scales;
  k.down_scales = p.down.scales;
  k.ids = p.topk_ids.As<const int32_t>();
  k.ids_stride = p.topk_ids.stride[0];
  k.weights = p.topk_weights.As<const float>();
  k.weights_stride = p.topk_weights.stride[0];
  k.hidden = scratch.hidden;
  k.counters = scratch.few_counters;
  k.residual = p.residual.present() ? p.residual.data : nullptr;
  k.residual_stride = p.residual.present() ? p.residual.stride[0] : 0;
  k.out = p.out.data;
  k.out_stride = p.out.stride[0];
  k.tokens = static_cast<int32_t>(p.topk_ids.shape[0]);
  k.top_k = static_cast<int32_t>(p.topk_ids.shape[1]);
  k.num_experts = static_cast<int32_t>(p.gate.num_experts);
  k.intermediate = static_cast<int32_t>(p.gate.rows);
  k.hidden_size = static_cast<int32_t>(p.down.rows);
  k.x_steps = plan.x_steps;
  k.hidden_steps = plan.hidden_steps;
  k.down_steps = plan.down_steps;
  k.stages = plan.stages;
  k.ranges = plan.ranges;
  k.out_is_half = p.out.dtype == DType::kFloat16;
  k.layout = plan.layout;
  // No more tiles than this.
  const int64_t tiles = NumElements(p.topk_ids) * (p.gate.rows / kTileColumns);
  const int64_t blocks =
      std::min<int64_t>(num_processors, std::max<int64_t>(tiles, plan.ranges));
  return cuda::LaunchDependent(
      kOp, stream, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
      static_cast<size_t>(plan.layout.bytes), FewKernel<S>, k);
}

// f(S()) of the least shape for the call.
template <class T, class F>
auto WithTokens(int64_t tokens, const F& f) {
  if (tokens <= 8) return f(Shape<T, 8>());
  if (tokens <= 16) return f(Shape<T, 16>());
  return f(Shape<T, 32>());
}
template <class F>
auto WithShape(const MoeParams& p, const F& f) {
  switch (p.gate.dtype) {
    case DType::kFloat8E4M3:
      return WithTokens<__nv_fp8_e4m3>(p.x.shape[0], f);
    case DType::kFloat16:
      return WithTokens<__half>(p.x.shape[0], f);
    default:
      return WithTokens<__nv_bfloat16>(p.x.shape[0], f);
  }
}

}  // namespace

bool CanUseMoeFew(const MoeParams& p, int num_processors) {
  return p.x.shape[0] <= kMoeFewTokens && RowBytes(p.gate) % 128 == 0 &&
         RowBytes(p.down) % 128 == 0 &&
         p.down.rows <= int64_t{num_processors} * kMaxUnits * kUnitRows &&
         p.gate.rows <= int64_t{1} << 20 && WithShape(p, [&](auto s) {
           using S = decltype(s);
           return NumElements(p.topk_ids) <= S::kMaxSlots &&
                  MakePlan<S>(p, num_processors, kMaxStages).stages >=
                      kMinStages;
         });
}

Status LaunchMoeFew(const MoeParams& p, const MoeScratch& scratch,
                    int num_processors, int32_t stages, Stream stream) {
  return WithShape(p, [&](auto s) {
    return Launch<decltype(s)>(p, scratch, num_processors, stages, stream);
  });
}

}  // namespace tenon
