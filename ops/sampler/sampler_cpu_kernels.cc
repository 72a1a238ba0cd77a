#include "ops/sampler/sampler_cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Compiles the code between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE for
// AVX-512 (N_AVX3), AVX2 and the instruction set that the build targets.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#define HWY_BROKEN_EMU128 1  // no emulated vectors, whatever the compiler
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/sampler/sampler_cpu_kernels.cc"
#include <hwy/foreach_target.h>
// Must come after foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tenon {
namespace HWY_NAMESPACE {
namespace sampler_kernels {  // other files have kernels of the same name

namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::RebindToSigned<FloatTag>;
using Floats = hn::Vec<FloatTag>;
using Ints = hn::Vec<IntTag>;
using Mask = hn::Mask<FloatTag>;
using DoubleTag = hn::ScalableTag<double>;
using Doubles = hn::Vec<DoubleTag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(FloatTag()));
constexpr int kVectors = kChunk / kLanes;  // of a chunk
static_assert(kVectors * kLanes == kChunk && kLanes <= kCpuSlack,
              "a chunk is whole vectors");

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

// `count` values, then -inf.
HWY_INLINE Floats LoadPart(const float* from, int64_t count) {
  float padded[kLanes];
  std::fill(std::copy(from, from + count, padded), padded + kLanes, -HUGE_VALF);
  return Load(padded);
}

// One rounding also where there is no such instruction.
HWY_INLINE Floats Fma(Floats a, Floats b, Floats c) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(FloatTag(),
                 strict::Fma(hn::GetLane(a), hn::GetLane(b), hn::GetLane(c)));
#else
  static_assert(HWY_NATIVE_FMA, "a vector target without fma");
  return hn::MulAdd(a, b, c);
#endif
}
HWY_INLINE Doubles Fma(Doubles a, Doubles b, Doubles c) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(DoubleTag(),
                 strict::Fma(hn::GetLane(a), hn::GetLane(b), hn::GetLane(c)));
#else
  return hn::MulAdd(a, b, c);
#endif
}

// strict::Exp2, operation by operation.
HWY_INLINE Floats Exp2(Floats y) {
  const FloatTag d;
  const IntTag di;
  const Floats round = hn::Set(d, strict::kExp2Round);
  y = hn::Max(y, hn::Set(d, strict::kExp2Lowest));
  const Floats rounded = hn::Add(y, round);
  const Floats part = hn::Sub(y, hn::Sub(rounded, round));
  Floats p = hn::Set(d, strict::kExp2Coefficients[4]);
  for (int i = 3; i >= 0; --i) {
    p = Fma(p, part, hn::Set(d, strict::kExp2Coefficients[i]));
  }
  p = Fma(p, part, hn::Set(d, 1.0f));
  const Ints exponent = hn::ShiftLeft<23>(hn::BitCast(di, rounded));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}

HWY_INLINE Floats Weight(Floats x, Floats best, Floats scale) {
  return Exp2(hn::Mul(hn::Sub(x, best), scale));
}

// Sums of FixedMass. Doubles hold them exactly for a while.
class MassSum {
 public:
#if HWY_TARGET != HWY_SCALAR
  HWY_INLINE MassSum()
      : low_(hn::Zero(DoubleTag())), high_(hn::Zero(DoubleTag())) {}
#endif
  HWY_INLINE void Add(Floats weight) {
    const Floats mass =
        hn::Mul(weight, hn::Set(FloatTag(), static_cast<float>(kMassOfBest)));
#if HWY_TARGET == HWY_SCALAR
    total_ += static_cast<uint64_t>(hn::GetLane(mass));
#else
    const hn::Rebind<float, DoubleTag> half;
    const DoubleTag d;
    low_ =
        hn::Add(low_, hn::Floor(hn::PromoteTo(d, hn::LowerHalf(half, mass))));
    high_ =
        hn::Add(high_, hn::Floor(hn::PromoteTo(d, hn::UpperHalf(half, mass))));
    if (++num_added_ == kMaxAdded) Flush();
#endif
  }
  HWY_INLINE uint64_t Total() {
    Flush();
    return total_;
  }

 private:
  static constexpr int kMaxAdded = 512;  // 2^9 * 2^43 is exact

  HWY_INLINE void Flush() {
#if HWY_TARGET != HWY_SCALAR
    const DoubleTag d;
    double lanes[2 * hn::MaxLanes(d)];
    hn::StoreU(low_, d, lanes);
    hn::StoreU(high_, d, lanes + hn::MaxLanes(d));
    for (double lane : lanes) total_ += static_cast<uint64_t>(lane);
    low_ = high_ = hn::Zero(d);
    num_added_ = 0;
#endif
  }

  uint64_t total_ = 0;
#if HWY_TARGET != HWY_SCALAR
  int num_added_ = 0;
  Doubles low_;
  Doubles high_;
#endif
};

// ---- Reading sub-tiles ----

// Whether a whole sub-tile lies inside the vocabulary.
bool IsWhole(const LogitsRow& row, int64_t tile) {
  return IdAt(tile, kSubTile - 1, row.num_tiles) < row.vocab;
}

template <class T>
void LoadAs(const LogitsRow& row, int64_t tile, float* x) {
  const T* data = static_cast<const T*>(row.data);
  const bool whole = IsWhole(row, tile);
  for (int c = 0; c < kChunksOfSubTile; ++c) {
    const int64_t id = IdAt(tile, c * kChunk, row.num_tiles);
    float* to = x + c * kChunk;
    if (whole || id + kChunk <= row.vocab) {
      for (int v = 0; v < kChunk; v += kLanes) {
        hn::StoreU(Load(data + id + v), FloatTag(), to + v);
      }
      continue;
    }
    for (int lane = 0; lane < kChunk; ++lane) {
      to[lane] = id + lane < row.vocab ? ToFloat(data[id + lane]) : -HUGE_VALF;
    }
  }
}

void LoadRaw(const LogitsRow& row, int64_t tile, float* x) {
  switch (row.dtype) {
    case DType::kFloat16:
      return LoadAs<Float16>(row, tile, x);
    case DType::kBFloat16:
      return LoadAs<BFloat16>(row, tile, x);
    default:
      return LoadAs<float>(row, tile, x);
  }
}

void ApplyBitmask(const LogitsRow& row, int64_t tile, float* x) {
  for (int c = 0; c < kChunksOfSubTile; ++c) {
    const int64_t id = IdAt(tile, c * kChunk, row.num_tiles);
    if (id >= row.vocab) return;  // there the logits are -inf already
    const uint32_t bits = row.bitmask[id / 32] >> (id % 32) & 0xffffu;
    if (bits == 0xffffu) continue;
    for (int lane = 0; lane < kChunk; ++lane) {
      if ((bits >> lane & 1u) == 0) x[c * kChunk + lane] = -HUGE_VALF;
    }
  }
}

void ApplyEdits(const LogitsRow& row, int64_t tile, float* x) {
  const auto order_of = [&](const LogitEdit& edit) {
    return int64_t{DrawOrder(edit.id, row.vocab)};
  };
  const int64_t first = tile * kSubTile;
  const LogitEdit* const end = row.edits + row.num_edits;
  const LogitEdit* edit = std::lower_bound(
      row.edits, end, first,
      [&](const LogitEdit& e, int64_t order) { return order_of(e) < order; });
  float changed[kSubTile];
  if (row.plan->only_allowed) {
    std::memcpy(changed, x, sizeof(changed));
    std::fill(x, x + kSubTile, -HUGE_VALF);
  }
  for (; edit != end; ++edit) {
    const int64_t place = order_of(*edit) - first;
    if (place >= kSubTile) return;
    if (place < 0 || edit->id < 0 || edit->id >= row.vocab) continue;
    x[place] = ApplyEdit(*row.plan, *edit,
                         row.plan->only_allowed ? changed[place] : x[place]);
  }
}

void LoadSubTile(const LogitsRow& row, int64_t tile, float* x) {
  LoadRaw(row, tile, x);
  if (row.bitmask != nullptr) ApplyBitmask(row, tile, x);
  if (row.num_edits > 0 || (row.plan != nullptr && row.plan->only_allowed)) {
    ApplyEdits(row, tile, x);
  }
}

// ---- Summaries ----

// Adds B[0 .. 15] of SubTile as it says.
HWY_INLINE float SumOfChunk(const Floats* b) {
#if HWY_TARGET == HWY_SCALAR
  float sum[kChunk];
  for (int l = 0; l < kChunk; ++l) sum[l] = hn::GetLane(b[l]);
  for (int offset = 8; offset > 0; offset /= 2) {
    for (int l = 0; l < offset; ++l) sum[l] += sum[l + offset];
  }
  return sum[0];
#else
  const hn::CappedTag<float, 4> d4;
#if HWY_TARGET <= HWY_AVX3
  const hn::CappedTag<float, 8> d8;
  const auto c = hn::Add(hn::LowerHalf(d8, b[0]), hn::UpperHalf(d8, b[0]));
#else
  const auto c = hn::Add(b[0], b[1]);
#endif
  auto sum = hn::Add(hn::LowerHalf(d4, c), hn::UpperHalf(d4, c));
  sum = hn::Add(sum, hn::Shuffle1032(sum));
  return hn::GetLane(hn::Add(sum, hn::Shuffle2301(sum)));
#endif
}

// Chunk c begins at x + c * chunk_stride.
template <class T>
HWY_INLINE SubTile SummarizeChunks(const T* x, int64_t chunk_stride,
                                   float scale, bool with_sum) {
  const FloatTag d;
  // Four chunks at a time, independent of each other, to hide latency.
  Floats max[4];
  for (Floats& m : max) m = hn::Set(d, -HUGE_VALF);
  Mask is_nan = hn::IsNaN(Load(x));
  for (int c = 0; c < kChunksOfSubTile; c += 4) {
    for (int v = 0; v < kVectors; ++v) {
      const T* from = x + c * chunk_stride + v * kLanes;
      HWY_UNROLL(4)
      for (int g = 0; g < 4; ++g) {
        const Floats value = Load(from + g * chunk_stride);
        max[g] = hn::Max(max[g], value);
        is_nan = hn::Or(is_nan, hn::IsNaN(value));
      }
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
  Floats sum[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    Floats part[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    for (int c = 0; c < kChunksOfSubTile; c += 4) {
      const T* from = x + c * chunk_stride + v * kLanes;
      HWY_UNROLL(4)
      for (int g = 0; g < 4; ++g) {
        part[g] = hn::Add(
            part[g], Weight(Load(from + g * chunk_stride), subtract, multiply));
      }
    }
    sum[v] = hn::Add(hn::Add(part[0], part[1]), hn::Add(part[2], part[3]));
  }
  result.sum = SumOfChunk(sum);
  return result;
}

// Asks for the chunks of a sub-tile that is summarised soon: sixteen streams
// are more than the processor foresees. What is past the end is not read.
template <class T>
HWY_INLINE void PrefetchChunks(const LogitsRow& row, int64_t tile) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(row.data);
  for (int c = 0; c < kChunksOfSubTile; ++c) {
    const int64_t id = IdAt(tile, c * kChunk, row.num_tiles);
    hwy::Prefetch(reinterpret_cast<const T*>(data + static_cast<uintptr_t>(id) *
                                                        sizeof(T)));
  }
}

template <class T>
void SummarizeAs(const LogitsRow& row, int64_t first, int64_t last, float scale,
                 bool sums, SubTile* out) {
  const bool modified = row.modified();
  float x[kSubTile];
  constexpr int kTilesAhead = 8;
  for (int64_t tile = first; tile < last; ++tile) {
    PrefetchChunks<T>(row, tile + kTilesAhead);
    if (modified || !IsWhole(row, tile)) {
      LoadSubTile(row, tile, x);
      out[tile - first] = SummarizeChunks(x, kChunk, scale, sums);
    } else {
      const T* data = static_cast<const T*>(row.data) + tile * kChunk;
      out[tile - first] =
          SummarizeChunks(data, row.num_tiles * kChunk, scale, sums);
    }
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

// Adds B[0 .. 15] of doubles in the order of SumOfChunk.
double SumOfChunk(double* b) {
  for (int offset = kChunk / 2; offset > 0; offset /= 2) {
    for (int l = 0; l < offset; ++l) b[l] += b[l + offset];
  }
  return b[0];
}

Moments SubTileMoments(const float* x) {
  const DoubleTag d;
  const hn::Rebind<float, DoubleTag> narrow;
  constexpr int kWide = static_cast<int>(hn::MaxLanes(d));
  double sums[kChunk];
  double squares[kChunk];
  for (int lane = 0; lane < kChunk; lane += kWide) {
    Doubles s[4], q[4];
    for (int g = 0; g < 4; ++g) s[g] = q[g] = hn::Zero(d);
    for (int c = 0; c < kChunksOfSubTile; ++c) {
      const Doubles v =
          hn::PromoteTo(d, hn::LoadU(narrow, x + c * kChunk + lane));
      const auto counts = hn::Gt(v, hn::Set(d, -HUGE_VAL));
      s[c % 4] = hn::IfThenElse(counts, hn::Add(s[c % 4], v), s[c % 4]);
      q[c % 4] = hn::IfThenElse(counts, Fma(v, v, q[c % 4]), q[c % 4]);
    }
    hn::StoreU(hn::Add(hn::Add(s[0], s[1]), hn::Add(s[2], s[3])), d,
               sums + lane);
    hn::StoreU(hn::Add(hn::Add(q[0], q[1]), hn::Add(q[2], q[3])), d,
               squares + lane);
  }
  int64_t count = 0;
  for (int i = 0; i < kSubTile; i += kLanes) {
    count += static_cast<int64_t>(hn::CountTrue(
        FloatTag(), hn::Gt(Load(x + i), hn::Set(FloatTag(), -HUGE_VALF))));
  }
  return {SumOfChunk(sums), SumOfChunk(squares), count};
}

// ---- Candidates ----

// Writes the wanted lanes without gaps, and something behind them up to a whole
// vector; returns their number.
HWY_INLINE int64_t StoreWanted(Floats v, Mask wanted, float* to) {
  hn::StoreU(hn::Compress(v, wanted), FloatTag(), to);
  return static_cast<int64_t>(hn::CountTrue(FloatTag(), wanted));
}
HWY_INLINE void StoreWanted(Ints v, Mask wanted, int32_t* to) {
  hn::StoreU(hn::Compress(v, hn::RebindMask(IntTag(), wanted)), IntTag(), to);
}

// Calls visit(i, values) for vectors of `x`, -inf after the last.
template <class Visit>
HWY_INLINE void ForEachVector(const float* x, int64_t count, Visit&& visit) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) visit(i, Load(x + i));
  if (i < count) visit(i, LoadPart(x + i, count - i));
}

int64_t Collect(const float* x, float floor, int32_t first_place, float* values,
                int32_t* places) {
  const FloatTag d;
  const IntTag di;
  const Floats lowest = hn::Set(d, floor);
  const Floats none = hn::Set(d, -HUGE_VALF);
  Ints place = hn::Iota(di, first_place);
  int64_t count = 0;
  for (int i = 0; i < kSubTile; i += kLanes) {
    const Floats v = Load(x + i);
    const Mask wanted = hn::And(hn::Ge(v, lowest), hn::Gt(v, none));
    if (!hn::AllFalse(d, wanted)) {
      hn::CompressStore(place, hn::RebindMask(di, wanted), di, places + count);
      count +=
          static_cast<int64_t>(hn::CompressStore(v, wanted, d, values + count));
    }
    place = hn::Add(place, hn::Set(di, kLanes));
  }
  return count;
}

void Weights(const float* x, int64_t count, float best, float scale, float* e) {
  const FloatTag d;
  const Floats subtract = hn::Set(d, best);
  const Floats multiply = hn::Set(d, scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    hn::StoreU(Weight(Load(x + i), subtract, multiply), d, e + i);
  }
  if (i < count) {
    float padded[kLanes];
    hn::StoreU(Weight(LoadPart(x + i, count - i), subtract, multiply), d,
               padded);
    std::copy(padded, padded + (count - i), e + i);
  }
}

uint64_t Mass(const float* x, int64_t count, float best, float scale) {
  const Floats subtract = hn::Set(FloatTag(), best);
  const Floats multiply = hn::Set(FloatTag(), scale);
  MassSum sum;
  ForEachVector(x, count, [&](int64_t, Floats v) {
    sum.Add(Weight(v, subtract, multiply));
  });
  return sum.Total();
}

uint64_t Surprise(const float* x, int64_t count, float best, float scale) {
  const FloatTag d;
  const Floats from = hn::Set(d, best);
  const Floats multiply = hn::Set(d, scale);
  MassSum sum;
  ForEachVector(x, count, [&](int64_t, Floats v) {
    const Floats bits = hn::Mul(hn::Sub(from, v), multiply);
    const Floats weight = Exp2(hn::Neg(bits));
    const Mask weighs = hn::Gt(weight, hn::Zero(d));
    sum.Add(hn::IfThenElseZero(weighs, hn::Mul(weight, bits)));
  });
  return sum.Total();
}

int64_t Compact(const KeptRange& range, int64_t num_tiles, float* x,
                int32_t* places, int64_t count) {
  const FloatTag d;
  const IntTag di;
  const Floats high = hn::Set(d, range.from.value);
  const Floats low = hn::Set(d, range.to.value);
  const Ints first_id = hn::Set(di, range.from.first_id);
  const Ints last_id = hn::Set(di, range.to.last_id);
  const Ints in_chunk = hn::Set(di, kChunk - 1);
  const Ints tiles = hn::Set(di, static_cast<int32_t>(num_tiles));
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats v;
    Ints place;
    if (i + kLanes <= count) {
      v = Load(x + i);
      place = hn::LoadU(di, places + i);
    } else {
      int32_t padded[kLanes] = {};
      std::copy(places + i, places + count, padded);
      v = LoadPart(x + i, count - i);
      place = hn::LoadU(di, padded);
    }
    // IdAt.
    const Ints chunk = hn::And(hn::ShiftRight<4>(place), in_chunk);
    const Ints id = hn::Add(hn::ShiftLeft<4>(hn::Add(hn::Mul(chunk, tiles),
                                                     hn::ShiftRight<8>(place))),
                            hn::And(place, in_chunk));
    const Mask early = hn::RebindMask(d, hn::Lt(id, first_id));
    const Mask late = hn::RebindMask(d, hn::Gt(id, last_id));
    const Mask below =
        hn::Or(hn::Lt(v, high), hn::AndNot(early, hn::Eq(v, high)));
    const Mask above = hn::Or(hn::Gt(v, low), hn::AndNot(late, hn::Eq(v, low)));
    const Mask wanted =
        hn::And(hn::And(below, above), hn::Gt(v, hn::Set(d, -HUGE_VALF)));
    StoreWanted(place, wanted, places + kept);
    kept += StoreWanted(v, wanted, x + kept);
  }
  return kept;
}

Split SplitValues(const float* x, int64_t count, float high, float low,
                  float best, float scale, float* between) {
  const FloatTag d;
  const Floats upper = hn::Set(d, high);
  const Floats lower = hn::Set(d, low);
  const Floats subtract = hn::Set(d, best);
  const Floats multiply = hn::Set(d, scale);
  Split result;
  MassSum sum;
  ForEachVector(x, count, [&](int64_t, Floats v) {
    const Mask above = hn::Gt(v, upper);
    const Mask at_least = hn::Ge(v, lower);
    if (!hn::AllFalse(d, above)) {
      result.num_above += static_cast<int64_t>(hn::CountTrue(d, above));
      sum.Add(hn::IfThenElseZero(above, Weight(v, subtract, multiply)));
    }
    const Mask rest = hn::AndNot(above, at_least);
    if (hn::AllFalse(d, rest)) return;
    const Mask is_high = hn::Eq(v, upper);
    const Mask is_low = hn::AndNot(is_high, hn::Eq(v, lower));
    result.num_high += static_cast<int64_t>(hn::CountTrue(d, is_high));
    result.num_low += static_cast<int64_t>(hn::CountTrue(d, is_low));
    const Mask inside = hn::AndNot(is_low, hn::AndNot(is_high, rest));
    result.num_between += StoreWanted(v, inside, between + result.num_between);
  });
  result.mass_above = sum.Total();
  return result;
}

float MaxOf(const float* x, int64_t count) {
  Floats max = hn::Set(FloatTag(), -HUGE_VALF);
  ForEachVector(x, count, [&](int64_t, Floats v) { max = hn::Max(max, v); });
  return hn::GetLane(hn::MaxOfLanes(FloatTag(), max));
}

const SamplerCpuKernels& Kernels() {
  static constexpr SamplerCpuKernels kKernels = {
      LoadSubTile, Summarize, SubTileMoments, Collect,     Weights,
      Mass,        Surprise,  Compact,        SplitValues, MaxOf};
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
