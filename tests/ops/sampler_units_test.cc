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
TEST(PhiloxTest, UniformsOfVersionTwoArePinned) {
  EXPECT_EQ(UniformAt(0, 0, RandomStream::kTarget), 0x1.ba5f8a295beb4p-1);
  EXPECT_EQ(UniformAt(42, 7, RandomStream::kTarget), 0x1.cbd45c17ae5b3p-2);
  EXPECT_EQ(UniformAt(~uint64_t{0}, uint64_t{1} << 40, RandomStream::kTarget),
            0x1.4daaaed8afbcap-3);
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

// Bit for bit: whichever runs, a seed gives the same tokens.
TEST(SamplerCpuKernelsTest, AllInstructionSetsGiveTheSameBits) {
  constexpr int64_t kVocab = 2000;
  std::vector<float> x = Normal(kVocab, 1, 0.0f, 4.0f);
  x[500] = x[77] = -kInf;
  LogitsRow row = {x.data(), DType::kFloat32, kVocab, NumSubTiles(kVocab)};
  const auto& generic = GetSamplerCpuKernels(CpuIsa::kGeneric);
  for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    SCOPED_TRACE(CpuIsaName(isa));
    const auto& kernels = GetSamplerCpuKernels(isa);
    const auto both = [&](auto&& call) {
      return call(kernels) == call(generic);
    };
    for (int64_t tile = 0; tile < row.num_tiles; ++tile) {
      EXPECT_TRUE(both([&](const SamplerCpuKernels& k) {
        SubTile s;
        k.summarize(row, tile, tile + 1, 1.5f, true, &s);
        return std::make_pair(s.max, s.sum);
      }));
      EXPECT_TRUE(both([&](const SamplerCpuKernels& k) {
        float loaded[kSubTile];
        k.load(row, tile, loaded);
        const Moments m = k.moments(loaded);
        std::vector<float> values(kSubTile + kCpuSlack);
        std::vector<int32_t> places(kSubTile + kCpuSlack);
        const int64_t count =
            k.collect(loaded, -1.0f, static_cast<int32_t>(tile * kSubTile),
                      values.data(), places.data());
        values.resize(count);
        places.resize(count);
        return std::make_tuple(std::vector<float>(loaded, loaded + kSubTile),
                               m.sum, m.squares, m.count, values, places);
      }));
    }
    EXPECT_TRUE(both([&](const SamplerCpuKernels& k) {
      std::vector<float> e(kVocab);
      k.weights(x.data(), kVocab, 20.0f, 0.7f, e.data());
      return std::make_tuple(e, k.mass(x.data(), kVocab, 20.0f, 0.7f),
                             k.surprise(x.data(), kVocab, 20.0f, 0.7f),
                             k.max(x.data(), kVocab));
    }));
    EXPECT_TRUE(both([&](const SamplerCpuKernels& k) {
      std::vector<float> values = x;
      std::vector<int32_t> places(kVocab);
      for (int32_t i = 0; i < kVocab; ++i) places[i] = DrawOrder(i, kVocab);
      const KeptRange range = {{x[3], 2}, {x[300], 299}};
      const int64_t count =
          k.compact(range, row.num_tiles, values.data(), places.data(), kVocab);
      values.resize(count);
      places.resize(count);
      return std::make_pair(values, places);
    }));
    EXPECT_TRUE(both([&](const SamplerCpuKernels& k) {
      std::vector<float> between(kVocab + kCpuSlack);
      const Split s =
          k.split(x.data(), kVocab, x[10], x[11], 20.0f, 0.7f, between.data());
      between.resize(s.num_between);
      return std::make_tuple(s.mass_above, s.num_above, s.num_high, s.num_low,
                             between);
    }));
  }
}

TEST(StrictMathTest, VectorCodeIsExp2) {
  for (CpuIsa isa : {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (isa > DetectCpuIsa()) continue;
    std::vector<float> y;
    for (int i = 0; i < 200000; ++i) y.push_back(-0.001f * i * (i % 7));
    y.push_back(-kInf);
    std::vector<float> e(y.size());
    GetSamplerCpuKernels(isa).weights(y.data(), static_cast<int64_t>(y.size()),
                                      0.0f, 1.0f, e.data());
    for (size_t i = 0; i < y.size(); ++i) {
      ASSERT_EQ(e[i], strict::Exp2(y[i])) << y[i];
      const double exact = std::exp2(double{y[i]});
      ASSERT_NEAR(e[i], exact, 1.5e-7 * exact + 0x1p-126) << y[i];
    }
    EXPECT_EQ(e[0], 1.0f);
    EXPECT_EQ(e.back(), 0.0f);
  }
}

TEST(StrictMathTest, LogIsThatOfLibm) {
  for (double x : {1.0, 0.5, 2.0, 1e-300, 1e300, 0.70710678, 0.70710679, 1.5,
                   3.0, 1.0 + 1e-15, 0.999999999, 7e18}) {
    EXPECT_NEAR(strict::Log(x), std::log(x),
                4e-16 * std::abs(std::log(x)) + 1e-16)
        << x;
  }
}

TEST(RowPlanTest, DrawOrderIsAPermutationAndIdAtItsInverse) {
  for (int64_t vocab : {1, 15, 16, 17, 256, 257, 5000, 151936}) {
    const int64_t tiles = NumSubTiles(vocab);
    int64_t seen = 0;
    for (int32_t id = 0; id < vocab; ++id) {
      const int32_t order = DrawOrder(id, vocab);
      ASSERT_GE(order, 0);
      ASSERT_LT(order, tiles * kSubTile);
      ASSERT_EQ(IdAt(order / kSubTile, order % kSubTile, tiles), id);
      ++seen;
    }
    EXPECT_EQ(seen, vocab);
  }
}

// u is exact: the first and the last of 2^53 values fall inside any sum.
TEST(RowPlanTest, DrawTargetsAreInsideTheSum) {
  for (uint64_t total : {uint64_t{1}, uint64_t{7}, uint64_t{1} << 43,
                         (uint64_t{1} << 62) + 12345}) {
    EXPECT_EQ(DrawTarget(UniformNumerator(0), total), total >> 54);
    EXPECT_EQ(DrawTarget(UniformNumerator(~uint64_t{0}), total),
              total - 1 - ((total - 1) >> 54));
  }
  for (uint64_t mass : {uint64_t{1}, uint64_t{3}, uint64_t{1} << 61}) {
    for (uint64_t weight :
         {uint64_t{1}, uint64_t{1} << 43, uint64_t{5} << 40}) {
      EXPECT_LT(TargetInTile(mass - 1, mass, weight), weight);
    }
  }
}

TEST(RowPlanTest, TileMassTruncatesAnExactProduct) {
  EXPECT_EQ(TileMass(1.0f, 1.0f, 43), uint64_t{1} << 43);
  EXPECT_EQ(TileMass(256.0f, 1.0f, 41), uint64_t{256} << 41);
  EXPECT_EQ(TileMass(1.5f, 0x1p-44f, 43), 0u);
  for (int zeros = 0; zeros <= 20; ++zeros) {
    EXPECT_EQ(DrawBits(uint64_t{1} << (63 - zeros)), 41 + zeros);
  }
}

// Every 16-bit value, with infinities, NaN and the end of the vocabulary.
template <class T>
void ExpectLoadsEveryValue(CpuIsa isa) {
  const auto& kernels = GetSamplerCpuKernels(isa);
  std::vector<T> all(65535);
  for (size_t i = 0; i < all.size(); ++i)
    all[i].bits = static_cast<uint16_t>(i);
  const LogitsRow row = {all.data(), kDTypeOf<T>, 65535, NumSubTiles(65535)};
  float x[kSubTile];
  for (int64_t tile = 0; tile < row.num_tiles; ++tile) {
    kernels.load(row, tile, x);
    bool has_nan = false;
    float max = -kInf;
    for (int i = 0; i < kSubTile; ++i) {
      const int64_t id = IdAt(tile, i, row.num_tiles);
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
  expect({"reserved", "7"}, [](SamplingParams& s) { s.reserved[5] = 7; });
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
