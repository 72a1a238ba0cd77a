#include "ops/sampler/sampler_cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#define HWY_BROKEN_EMU128 1  // no emulated vectors, whatever the compiler
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/sampler/sampler_cpu_kernels.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {
namespace sampler_kernels {  // other files have kernels of the same name

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::RebindToSigned<FloatTag>;
using Floats = hn::Vec<FloatTag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));

// Sums of a sub-tile that are independent of each other, to hide latency.
constexpr int kSums = 4;
static_assert(kSubTile % (kSums * kLanes) == 0, "a sub-tile is whole vectors");

HWY_INLINE Floats Load(const float* from) {
  return hn::LoadU(FloatTag(), from);
}
HWY_INLINE Floats Load(const BFloat16* from) {
  const hn::Rebind<uint16_t, FloatTag> d16;
  const hn::RebindToUnsigned<FloatTag> d32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, &from->bits));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(bits));
}
HWY_INLINE Floats Load(const Float16* from) {
#if HWY_TARGET == HWY_SCALAR
  // Without instructions for it, Highway takes infinity for a finite number.
  return hn::Set(FloatTag(), ToFloat(*from));
#else
  const hn::Rebind<hwy::float16_t, FloatTag> d16;
  return hn::PromoteTo(
      FloatTag(),
      hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(from)));
#endif
}

// 2^y for y <= 0, within 3 units in the last place; 0 below 2^-126.
HWY_INLINE Floats Exp2(Floats y) {
  const FloatTag d;
  const IntTag di;
  y = hn::Max(y, hn::Set(d, -127.0f));
  const Floats whole = hn::Round(y);
  const Floats part = hn::Sub(y, whole);  // in [-0.5, 0.5]
  Floats p = hn::Set(d, 1.54614449e-4f);
  p = hn::MulAdd(p, part, hn::Set(d, 1.3400428e-3f));
  p = hn::MulAdd(p, part, hn::Set(d, 9.61805694e-3f));
  p = hn::MulAdd(p, part, hn::Set(d, 5.55032715e-2f));
  p = hn::MulAdd(p, part, hn::Set(d, 2.40226507e-1f));
  p = hn::MulAdd(p, part, hn::Set(d, 6.93147182e-1f));
  p = hn::MulAdd(p, part, hn::Set(d, 1.0f));
  const auto exponent = hn::Add(hn::ConvertTo(di, whole), hn::Set(di, 127));
  return hn::Mul(p, hn::BitCast(d, hn::ShiftLeft<23>(exponent)));
}

HWY_INLINE Floats Exponential(Floats x, Floats max, Floats scale) {
  return Exp2(hn::Mul(hn::Sub(x, max), scale));
}

// A sub-tile's logits: in place, or where the vocabulary ends inside it, copied
// to `padded` and followed by -inf.
template <class T>
const T* GetSubTile(const LogitsRow& row, int64_t sub_tile, T* padded) {
  const int64_t begin = sub_tile * kSubTile;
  const T* x = static_cast<const T*>(row.data) + begin;
  const int64_t count = row.vocab - begin;
  if (count >= kSubTile) return x;
  std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
  std::fill(padded + count, padded + kSubTile, FromFloat<T>(-HUGE_VALF));
  return padded;
}

template <class T>
SubTile SummarizeSubTile(const T* x, float scale, bool with_sum) {
  const FloatTag d;
  Floats max[kSums];
  auto is_nan = hn::IsNaN(Load(x));
  for (Floats& m : max) m = hn::Set(d, -HUGE_VALF);
  for (int i = 0; i < kSubTile; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Floats v = Load(x + i + s * kLanes);
      max[s] = hn::Max(max[s], v);
      is_nan = hn::Or(is_nan, hn::IsNaN(v));
    }
  }
  SubTile result = {};
  if (!hn::AllFalse(d, is_nan)) {
    result.max = NAN;
    return result;
  }
  const Floats best = hn::Max(hn::Max(max[0], max[1]), hn::Max(max[2], max[3]));
  result.max = hn::GetLane(hn::MaxOfLanes(d, best));
  // Infinite ones have no use for a sum, or none.
  if (!with_sum || std::isinf(result.max)) return result;
  const Floats subtract = hn::Set(d, result.max);
  const Floats multiply = hn::Set(d, scale);
  Floats sum[kSums];
  for (Floats& s : sum) s = hn::Zero(d);
  for (int i = 0; i < kSubTile; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Floats v = Load(x + i + s * kLanes);
      sum[s] = hn::Add(sum[s], Exponential(v, subtract, multiply));
    }
  }
  result.sum = hn::GetLane(hn::SumOfLanes(
      d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
  return result;
}

template <class T>
void SummarizeAs(const LogitsRow& row, int64_t first, int64_t last, float scale,
                 bool sums, SubTile* out) {
  T padded[kSubTile];
  for (int64_t i = first; i < last; ++i) {
    out[i - first] = SummarizeSubTile(GetSubTile(row, i, padded), scale, sums);
  }
}

void Summarize(const LogitsRow& row, int64_t first, int64_t last, float scale,
               bool sums, SubTile* out) {
  switch (row.dtype) {
    case DType::kFloat16:
      return SummarizeAs<Float16>(row, first, last, scale, sums, out);
    case DType::kBFloat16:
      return SummarizeAs<BFloat16>(row, first, last, scale, sums, out);
    default:
      return SummarizeAs<float>(row, first, last, scale, sums, out);
  }
}

// Calls visit(i, logits, kept) for every vector of a sub-tile; kept is a mask.
template <class T, class Visit>
HWY_INLINE void ForEachVector(const LogitsRow& row, int64_t sub_tile,
                              const Cutoff& cutoff, Visit&& visit) {
  const FloatTag d;
  const IntTag di;
  T padded[kSubTile];
  const T* x = GetSubTile(row, sub_tile, padded);
  const Floats value = hn::Set(d, cutoff.value);
  const auto last_id = hn::Set(di, cutoff.last_id);
  auto id = hn::Iota(di, static_cast<int32_t>(sub_tile * kSubTile));
  for (int i = 0; i < kSubTile; i += kLanes) {
    const Floats v = Load(x + i);
    const auto late = hn::RebindMask(d, hn::Gt(id, last_id));
    visit(i, v,
          hn::Or(hn::Gt(v, value), hn::And(hn::Eq(v, value), hn::Not(late))));
    id = hn::Add(id, hn::Set(di, kLanes));
  }
}

template <class T>
void LoadAs(const LogitsRow& row, int64_t sub_tile, const Cutoff& cutoff,
            float* to) {
  const FloatTag d;
  const Floats dropped = hn::Set(d, -HUGE_VALF);
  ForEachVector<T>(row, sub_tile, cutoff, [&](int i, auto v, auto kept) {
    hn::StoreU(hn::IfThenElse(kept, v, dropped), d, to + i);
  });
}

void LoadSubTile(const LogitsRow& row, int64_t sub_tile, const Cutoff& cutoff,
                 float* x) {
  switch (row.dtype) {
    case DType::kFloat16:
      return LoadAs<Float16>(row, sub_tile, cutoff, x);
    case DType::kBFloat16:
      return LoadAs<BFloat16>(row, sub_tile, cutoff, x);
    default:
      return LoadAs<float>(row, sub_tile, cutoff, x);
  }
}

template <class T>
int64_t CollectAs(const LogitsRow& row, int64_t sub_tile, const Cutoff& cutoff,
                  float upper, float* to) {
  const FloatTag d;
  const Floats limit = hn::Set(d, upper);
  const int64_t left = row.vocab - sub_tile * kSubTile;
  int64_t count = 0;
  ForEachVector<T>(row, sub_tile, cutoff, [&](int i, auto v, auto kept) {
    auto wanted = hn::And(kept, hn::Le(v, limit));
    if (left < i + kLanes) {
      const int64_t size = left > i ? left - i : 0;
      wanted = hn::And(wanted, hn::FirstN(d, static_cast<size_t>(size)));
    }
    float packed[kLanes];
    const size_t found = hn::CompressStore(v, wanted, d, packed);
    std::memcpy(to + count, packed, found * sizeof(float));
    count += static_cast<int64_t>(found);
  });
  return count;
}

int64_t Collect(const LogitsRow& row, int64_t sub_tile, const Cutoff& cutoff,
                float upper, float* x) {
  switch (row.dtype) {
    case DType::kFloat16:
      return CollectAs<Float16>(row, sub_tile, cutoff, upper, x);
    case DType::kBFloat16:
      return CollectAs<BFloat16>(row, sub_tile, cutoff, upper, x);
    default:
      return CollectAs<float>(row, sub_tile, cutoff, upper, x);
  }
}

float Exponentials(const float* x, int64_t count, float max, float scale,
                   float* e) {
  const FloatTag d;
  const Floats subtract = hn::Set(d, max);
  const Floats multiply = hn::Set(d, scale);
  Floats sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats v = Exponential(Load(x + i), subtract, multiply);
    hn::StoreU(v, d, e + i);
    sum = hn::Add(sum, v);
  }
  if (i < count) {
    float padded[kLanes];
    std::fill(std::copy(x + i, x + count, padded), padded + kLanes, -HUGE_VALF);
    const Floats v = Exponential(Load(padded), subtract, multiply);
    hn::StoreU(v, d, padded);
    std::copy(padded, padded + (count - i), e + i);
    sum = hn::Add(sum, v);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

const SamplerCpuKernels& Kernels() {
  static constexpr SamplerCpuKernels kKernels = {Summarize, LoadSubTile,
                                                 Collect, Exponentials};
  return kKernels;
}

}  // namespace sampler_kernels
}  // namespace HWY_NAMESPACE
}  // namespace tenon
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace tenon {

const SamplerCpuKernels& GetSamplerCpuKernels(CpuIsa isa) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case CpuIsa::kAvx512:
      return N_AVX3::sampler_kernels::Kernels();
#endif
#if HWY_TARGETS & HWY_AVX2
    case CpuIsa::kAvx2:
      return N_AVX2::sampler_kernels::Kernels();
#endif
    default:
      return HWY_STATIC_DISPATCH(sampler_kernels::Kernels)();
  }
}

}  // namespace tenon

#endif  // HWY_ONCE
