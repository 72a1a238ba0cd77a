#include <cmath>
#include <limits>

#include "ops/sampler/philox.h"
#include "ops/sampler/row_plan.h"
#include "ops/sampler/sampler.h"
#include "ops/sampler/sampler_cpu_kernels.h"
#include "tests/ops/sampler_test_base.h"
#include "tests/testing/random.h"

// What the sampler is made of.

namespace tenon {
namespace {

using testing::Filters;
using testing::Normal;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(PhiloxTest, GivesRandom123sKnownAnswers) {
  const auto expect = [](PhiloxBlock counter, uint32_t key_low,
                         uint32_t key_high, std::vector<uint32_t> expected) {
    const PhiloxBlock block = Philox4x32(counter, key_low, key_high);
    EXPECT_EQ(std::vector<uint32_t>(block.word, block.word + 4), expected);
  };
  expect({{0, 0, 0, 0}}, 0, 0,
         {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  expect({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u,
         {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  expect({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u,
         0x299f31d0u, {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

// What users get for a seed: these never change within a version.
TEST(PhiloxTest, UniformsOfVersionOneArePinned) {
  EXPECT_EQ(UniformAt(0, 0, RandomStream::kTarget), 0x1.6e739f289a472p-3);
  EXPECT_EQ(UniformAt(42, 7, RandomStream::kTarget), 0x1.b3858607aa7d2p-1);
  EXPECT_EQ(UniformAt(~uint64_t{0}, uint64_t{1} << 40, RandomStream::kTarget),
            0x1.f214107a71511p-2);
}

TEST(PhiloxTest, UniformIsNeverZeroOrOne) {
  EXPECT_EQ(UniformFromBits(0), 0x1p-54);
  EXPECT_EQ(UniformFromBits(~uint64_t{0}), 1.0 - 0x1p-53);
  EXPECT_EQ(UniformFromBits(~uint64_t{0} << 12), 1.0 - 0x1p-52);
  EXPECT_EQ(UniformFromBits(uint64_t{1} << 63), 0.5);
  for (uint64_t low = 0; low < 4096; ++low) {
    const double uniform = UniformFromBits(~low << 8);
    EXPECT_LT(uniform, 1.0);
    EXPECT_GT(uniform, 0.99);
  }
}

TEST(SamplerCpuKernelsTest, AllInstructionSetsAgree) {
  const std::vector<float> x = Normal(600, 1, 0.0f, 4.0f);
  const LogitsRow row = {x.data(), DType::kFloat32, 600};
  const Cutoff cutoff = {x[300], 299};
  const auto& generic = GetSamplerCpuKernels(CpuIsa::kGeneric);
  for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    const auto& kernels = GetSamplerCpuKernels(isa);
    for (int64_t tile = 0; tile < NumSubTiles(600); ++tile) {
      SubTile a, b;
      kernels.summarize(row, tile, tile + 1, 1.5f, true, &a);
      generic.summarize(row, tile, tile + 1, 1.5f, true, &b);
      EXPECT_EQ(a.max, b.max);
      EXPECT_NEAR(a.sum, b.sum, 1e-5 * b.sum);
      float xa[kSubTile], xb[kSubTile];
      kernels.load(row, tile, cutoff, xa);
      generic.load(row, tile, cutoff, xb);
      EXPECT_EQ(std::vector<float>(xa, xa + kSubTile),
                std::vector<float>(xb, xb + kSubTile));
      const int64_t count = kernels.collect(row, tile, cutoff, 2.0f, xa);
      ASSERT_EQ(count, generic.collect(row, tile, cutoff, 2.0f, xb));
      EXPECT_EQ(std::vector<float>(xa, xa + count),
                std::vector<float>(xb, xb + count));
    }
    std::vector<float> e(600);
    kernels.exponentials(x.data(), 600, 20.0f, 0.7f, e.data());
    for (int i = 0; i < 600; ++i) {
      const double expected = std::exp2((double{x[i]} - 20.0) * 0.7f);
      EXPECT_NEAR(e[i], expected, 2e-6 * expected);
    }
  }
}

// Every 16-bit value, with infinities, NaN and the end of the vocabulary.
template <class T>
void ExpectLoadsEveryValue(CpuIsa isa) {
  const auto& kernels = GetSamplerCpuKernels(isa);
  std::vector<T> all(65535);
  for (size_t i = 0; i < all.size(); ++i)
    all[i].bits = static_cast<uint16_t>(i);
  const LogitsRow row = {all.data(), kDTypeOf<T>, 65535};
  const Cutoff keep_all = {-kInf, std::numeric_limits<int32_t>::max()};
  float x[kSubTile];
  for (int64_t tile = 0; tile < NumSubTiles(row.vocab); ++tile) {
    kernels.load(row, tile, keep_all, x);
    bool has_nan = false;
    float max = -kInf;
    for (int64_t i = 0; i < kSubTile; ++i) {
      const int64_t id = tile * kSubTile + i;
      const float expected = id < row.vocab ? ToFloat(all[id]) : -kInf;
      has_nan = has_nan || std::isnan(expected);
      max = std::max(max, expected);
      if (!std::isnan(expected)) {
        ASSERT_EQ(x[i], expected) << id;
      }
    }
    SubTile summary;
    kernels.summarize(row, tile, tile + 1, 1.0f, false, &summary);
    ASSERT_EQ(std::isnan(summary.max), has_nan) << tile;
    if (!has_nan) {
      ASSERT_EQ(summary.max, max) << tile;
    }
  }
}

TEST(SamplerCpuKernelsTest, LoadEvery16BitValue) {
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    SCOPED_TRACE(CpuIsaName(isa));
    ExpectLoadsEveryValue<Float16>(isa);
    ExpectLoadsEveryValue<BFloat16>(isa);
  }
}

TEST(SamplingParamsTest, RejectsOutOfRange) {
  EXPECT_TRUE(ValidateSamplingParams(SamplingParams()).ok());
  EXPECT_TRUE(ValidateSamplingParams(Filters(-1, 0.0f, 1.0f)).ok());
  const auto expect = [](std::vector<std::string> parts, auto&& change) {
    SamplingParams sampling;
    change(sampling);
    testing::ExpectInvalid(ValidateSamplingParams(sampling), parts);
  };
  for (float bad : {-1.0f, kNan, kInf}) {
    expect({"SamplingParams", "temperature"},
           [&](SamplingParams& s) { s.temperature = bad; });
    expect({"SamplingParams", "top_p"},
           [&](SamplingParams& s) { s.top_p = bad; });
    expect({"SamplingParams", "min_p"},
           [&](SamplingParams& s) { s.min_p = bad; });
  }
  expect({"top_p", "1.5"}, [](SamplingParams& s) { s.top_p = 1.5f; });
  expect({"min_p", "1.5"}, [](SamplingParams& s) { s.min_p = 1.5f; });
  expect({"top_k", "-2"}, [](SamplingParams& s) { s.top_k = -2; });
  expect({"filter_order", "3"}, [](SamplingParams& s) {
    s.filter_order = static_cast<FilterOrder>(3);
  });
  expect({"reserved0", "1"}, [](SamplingParams& s) { s.reserved0 = 1; });
  expect({"reserved", "7"}, [](SamplingParams& s) { s.reserved[6] = 7; });
}

TEST(RowPlanTest, OrderedKeysOrderFloatsAndComeBack) {
  const std::vector<float> ascending = {-kInf, -3e38f, -1.0f, -1e-45f,
                                        0.0f,  1e-45f, 1.0f,  1.0000001f,
                                        3e38f, kInf};
  for (size_t i = 0; i < ascending.size(); ++i) {
    EXPECT_EQ(FromOrderedKey(OrderedKey(ascending[i])), ascending[i]);
    if (i > 0) {
      EXPECT_GT(OrderedKey(ascending[i]), OrderedKey(ascending[i - 1]));
    }
  }
  EXPECT_EQ(OrderedKey(-0.0f), OrderedKey(0.0f));
}

TEST(RowPlanTest, RadixPassesCoverAllValues) {
  const std::vector<float> values = {-kInf, -3e38f, -2.5f, 0.0f, 1e-45f, 7.0f};
  for (float value : values) {
    const uint32_t key = OrderedKey(value);
    uint32_t prefix = 0;
    for (int i = 0; i < kRadixPasses; ++i) {
      const RadixPass pass = GetRadixPass(i);
      EXPECT_TRUE(pass.Matches(key, prefix));
      EXPECT_LE(pass.Lowest(prefix), value);
      EXPECT_GE(pass.Highest(prefix), value);
      prefix |= static_cast<uint32_t>(pass.Bin(key)) << pass.shift;
    }
    EXPECT_EQ(prefix, key);
  }
}

TEST(RowPlanTest, FloatsBelowAndAbove) {
  for (double value : {0.1, -0.1, 1e-60, -1e-60, 1.0, 16777217.0}) {
    EXPECT_LE(FloatBelow(value), value);
    EXPECT_GE(FloatAbove(value), value);
    EXPECT_LE(FloatAbove(value), std::nextafter(FloatBelow(value), kInf));
  }
  EXPECT_EQ(FloatBelow(1e300), std::numeric_limits<float>::max());
  EXPECT_EQ(FloatAbove(-1e300), -std::numeric_limits<float>::max());
}

}  // namespace
}  // namespace tenon
