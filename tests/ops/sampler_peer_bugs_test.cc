#include <cmath>
#include <numeric>
#include <set>

#include "ops/sampler/sampler.h"
#include "tests/ops/sampler_call.h"
#include "tests/testing/random.h"

// Bugs that other samplers have had, one test each; the name says whose. Each
// turns red where the bug is planted.

namespace tenon {
namespace {

using testing::Filters;
using testing::Normal;
using testing::SamplerCall;
using testing::SamplerResult;
using testing::SmallOr;
using testing::TestTensor;

constexpr uint64_t kAllOnes = ~uint64_t{0};

class SamplerPeerBugsTest : public testing::SamplerCallTest {
 protected:
  // The tokens that one row of logits gives at these 64 random bits.
  std::vector<int64_t> TokensAt(const TestTensor& logits,
                                const SamplingParams& s,
                                const std::vector<uint64_t>& bits) {
    SamplerCall call =
        CallOf(logits.view(), std::vector<SamplingParams>(bits.size(), s));
    call.random_bits = bits;
    return Run(call).tokens;
  }
};

// ---- Ends of the random numbers, and the tail ----

// The largest uniforms, which float32 rounds to 1, and the smallest: a masked
// token at either end, an id past the vocabulary, or one of no probability.
TEST_P(SamplerPeerBugsTest,
       UniformOfOneOrZero_SGLang25106_SGLang30822_PyTorch22557_PyTorch192812) {
  std::vector<uint64_t> bits = {
      0, 1, uint64_t{1} << 11, kAllOnes, kAllOnes << 11, kAllOnes << 12};
  for (int i = 0; i < 129; ++i) {
    bits.push_back(kAllOnes - (uint64_t(i) << 32));
  }
  for (int64_t vocab : {3, 300, 5000}) {
    std::vector<float> row(vocab, -kInf);
    const int64_t first = vocab / 3;
    const int64_t last = vocab - 1 - vocab / 3;
    row[first] = 0.5f;
    row[last] = 0.25f;
    const TestTensor logits = Logits(row);
    for (const SamplingParams& s :
         {Filters(0, 1.0f, 0.0f), Filters(2, 1.0f, 0.0f),
          Filters(0, 0.9999f, 0.0f)}) {
      const std::vector<int64_t> tokens = TokensAt(logits, s, bits);
      for (int64_t token : tokens) {
        EXPECT_TRUE(token == first || token == last) << token;
      }
      EXPECT_EQ(tokens[0], first);
      EXPECT_EQ(tokens[3], last);  // all ones
    }
  }
}

// One head and 262144 others far below: noise of 24 bits, or capped noise,
// never reaches them; noise of a clamped logarithm reaches them too often.
TEST_P(SamplerPeerBugsTest,
       TailAtGaps18To25_vLLM43150_vLLM51367_FlashInfer2438_HpcOpsClamp) {
  const int64_t tokens_of_tail = SmallOr(kOneBlockVocab - 1, 262144);
  const int64_t vocab = tokens_of_tail + 1;
  for (double gap : {18.0, 20.5, 25.0}) {
    SCOPED_TRACE(gap);
    std::vector<float> row(vocab, static_cast<float>(-gap));
    row[0] = 0.0f;
    const TestTensor logits = Logits(row);
    const double tail = tokens_of_tail * std::exp(-gap);
    // Draw order begins with the head; the rest are equal.
    const double head = 1.0 / (1.0 + tail);
    std::vector<uint64_t> bits;
    std::vector<double> share;
    for (int i = 0; i < 24; ++i) {
      share.push_back((i + 0.5) / 24);
      bits.push_back(BitsOf(head + (1.0 - head) * share.back()));
    }
    bits.push_back(BitsOf(head - 1e-6));
    const std::vector<int64_t> tokens =
        TokensAt(logits, Filters(0, 1.0f, 0.0f), bits);
    std::vector<int32_t> order;
    for (int32_t id = 1; id < vocab; ++id) {
      order.push_back(DrawOrder(id, vocab));
    }
    std::sort(order.begin(), order.end());
    for (int i = 0; i < 24; ++i) {
      ASSERT_GT(tokens[i], 0);
      const int32_t at = DrawOrder(static_cast<int32_t>(tokens[i]), vocab);
      const auto rank =
          std::lower_bound(order.begin(), order.end(), at) - order.begin();
      // The sub-tile of the head is known to 2^-24 of its sum only.
      const double slack = 2.0 + 1.2e-7 / std::exp(-gap);
      EXPECT_NEAR(static_cast<double>(rank), share[i] * tokens_of_tail, slack);
    }
    EXPECT_EQ(tokens[24], 0);
    // Uniforms three tokens apart, which 24 bits cannot tell from each other.
    std::vector<uint64_t> near;
    for (int i = 0; i < 8; ++i) {
      near.push_back(
          BitsOf(head + (1.0 - head) * (0.5 + 3.0 * i / tokens_of_tail)));
    }
    const std::vector<int64_t> apart =
        TokensAt(logits, Filters(0, 1.0f, 0.0f), near);
    EXPECT_EQ(std::set<int64_t>(apart.begin(), apart.end()).size(), 8u);
  }
}

// Sums of bfloat16 would lose all but the first few hundred of equal tokens.
TEST_P(SamplerPeerBugsTest, CumulativeSumOfCoarseNumbers_Megatron7182) {
  const int64_t vocab = SmallOr(kOneBlockVocab, 20000);
  const TestTensor logits(device(), DType::kBFloat16, {1, vocab},
                          std::vector<float>(vocab, 0.5f));
  SamplerCall call = CallOf(logits.view(), {Filters(0, 0.75f, 0.0f)});
  call.with_probabilities = true;
  int64_t kept = 0;
  for (double p : Run(call).probabilities) kept += p > 0.0;
  EXPECT_EQ(kept, vocab / 4 * 3);
}

// ---- Seeds and the batch ----

TEST_P(SamplerPeerBugsTest, OnlyTheFirstSeedIsRead_FlashInfer4861) {
  const TestTensor logits =
      Logits(std::vector<float>(SmallOr(kOneBlockVocab, 50000), 0.0f));
  std::vector<SamplingParams> params(64);
  for (size_t i = 0; i < 64; ++i) params[i].seed = i;
  const std::vector<int64_t> together =
      Run(CallOf(logits.view(), params)).tokens;
  EXPECT_GT(std::set<int64_t>(together.begin(), together.end()).size(), 60u);
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(Run(CallOf(logits.view(), {params[i]})).tokens[0], together[i]);
  }
}

TEST_P(SamplerPeerBugsTest,
       NeighboursChangeATokenOrItsTies_vLLM51226_vLLM50979_SGLang35697) {
  std::vector<float> row = Normal(3000, 4, 3.0f, 1.0f);
  for (float& x : row) x = std::round(x * 4.0f) / 4.0f;  // ties everywhere
  const TestTensor logits = Logits(row);
  SamplingParams s = Filters(37, 0.95f, 0.0f);
  const int64_t token = Run(CallOf(logits.view(), {s})).tokens[0];
  for (size_t rows : {2, 7, 8, 9, 33}) {
    for (int kind = 0; kind < 4; ++kind) {
      SamplingParams other;
      if (kind == 1) other.temperature = 0.0f;
      if (kind == 2) other.top_k = 5;
      if (kind == 3) other.seed = 99;
      std::vector<SamplingParams> params(rows, other);
      params[rows / 2] = s;
      EXPECT_EQ(Run(CallOf(logits.view(), params)).tokens[rows / 2], token);
    }
  }
}

// One seed for all is the same draw for all; other positions are other draws.
TEST_P(SamplerPeerBugsTest, OneSeedGivesOneNoiseForAllPositions_vLLM50440) {
  const TestTensor logits =
      Logits(std::vector<float>(SmallOr(kOneBlockVocab, 50000), 0.0f));
  std::vector<SamplingParams> params(32);
  for (size_t i = 0; i < 32; ++i) params[i].position = i;
  const std::vector<int64_t> tokens = Run(CallOf(logits.view(), params)).tokens;
  EXPECT_GT(std::set<int64_t>(tokens.begin(), tokens.end()).size(), 28u);
}

// A generator with state of its own, or of the call's: who calls again, or is
// another rank of a group, draws another token for the same seed.
TEST_P(SamplerPeerBugsTest,
       CallsOrRanksDiverge_TrtLlm1742_TrtLlm17599_TtMetal53802_Aiter2035) {
  const TestTensor logits = Logits(std::vector<float>(50000, 0.0f));
  const TestTensor of_other_rank = Logits(std::vector<float>(50000, 0.0f));
  std::vector<SamplingParams> params(8);
  for (size_t i = 0; i < params.size(); ++i) params[i].seed = 40 + i;
  const std::vector<int64_t> tokens = Run(CallOf(logits.view(), params)).tokens;
  SamplingParams other;
  other.seed = 7;
  for (int calls = 0; calls < 3; ++calls) {
    Run(CallOf(logits.view(), std::vector<SamplingParams>(5, other)));
    EXPECT_EQ(Run(CallOf(of_other_rank.view(), params)).tokens, tokens);
  }
}

// ---- Filters, ties, loops ----

TEST_P(SamplerPeerBugsTest, TiesAtTheBoundaryAreAllKept_FlashInfer3774) {
  std::vector<float> row;
  for (double p : {0.4, 0.3, 0.3})
    row.push_back(std::log(static_cast<float>(p)));
  SamplerCall call = CallOf(Logits(row).view(),
                            {Filters(2, 1.0f, 0.0f), Filters(0, 0.5f, 0.0f)});
  const TestTensor logits = Logits(row);
  call.logits = Repeat(logits.view(), 2);
  call.with_probabilities = true;
  const SamplerResult result = Run(call);
  EXPECT_EQ(result.probabilities[2], 0.0);
  EXPECT_EQ(result.probabilities[5], 0.0);
  EXPECT_GT(result.probabilities[1], 0.4);
}

TEST_P(SamplerPeerBugsTest,
       LoopsThatDoNotEnd_FlashInfer769_FlashInfer3623_FlashInfer4544) {
  const int32_t vocab = SmallOr(int32_t{kOneBlockVocab}, 40000);
  const std::vector<std::vector<float>> rows = {std::vector<float>(vocab, 0.0f),
                                                Normal(vocab, 5, 0.0f, 1e-7f),
                                                Normal(vocab, 6, 0.0f, 1e30f)};
  for (const std::vector<float>& row : rows) {
    const TestTensor logits = Logits(row);
    for (float top_p : {1e-7f, 0.5f, 0.99999994f}) {
      for (int32_t top_k : {0, vocab - 1}) {
        SamplingParams s = Filters(top_k, top_p, 0.0f);
        const int64_t token = Run(CallOf(logits.view(), {s})).tokens[0];
        EXPECT_TRUE(token >= 0 && token < vocab);
      }
    }
  }
}

TEST_P(SamplerPeerBugsTest,
       IdsPastTheEnd_FlashInfer3470_TrtLlm19485_vLLM53029) {
  for (int64_t vocab : {1, 17, 255, 257, SmallOr(3585, 4097)}) {
    const TestTensor logits = Logits(Normal(vocab, 7, 0.0f, 0.01f));
    for (const SamplingParams& s :
         {Filters(0, 1.0f, 0.0f), Filters(0, 0.9999999f, 0.0f),
          Filters(static_cast<int32_t>(vocab - 1), 0.9999999f, 0.0f)}) {
      for (int64_t token :
           TokensAt(logits, s, {kAllOnes, kAllOnes << 11, kAllOnes >> 1, 0})) {
        EXPECT_TRUE(token >= 0 && token < vocab) << token;
      }
    }
    const TestTensor nans = Logits(std::vector<float>(vocab, kNan));
    EXPECT_EQ(Run(CallOf(nans.view(), {SamplingParams()})).tokens[0], -1);
  }
}

TEST_P(SamplerPeerBugsTest, TopPOrTopKOfZeroIsTokenZero_FlashInfer) {
  std::vector<float> row = Normal(900, 8);
  row[600] = 9.0f;
  const TestTensor logits = Logits(row);
  const SamplerResult none =
      Run(CallOf(logits.view(), {Filters(0, 0.0f, 0.0f)}));
  EXPECT_EQ(none.tokens[0], 600);
  EXPECT_EQ(none.statuses[0], 0);
  const std::vector<int64_t> off =
      TokensAt(logits, Filters(0, 1.0f, 0.0f), {0, kAllOnes});
  EXPECT_EQ(off[0], 0);  // top_k 0 is off: the first in draw order
}

TEST_P(SamplerPeerBugsTest, RowsApartInMemory_vLLM42684) {
  constexpr int64_t kRows = 6;
  constexpr int64_t kVocab = 777;
  const std::vector<float> values = Normal(kRows * kVocab, 9);
  const TestTensor packed(device(), dtype(), {kRows, kVocab}, values);
  const TestTensor apart(device(), dtype(), {kRows, kVocab}, {kVocab + 50, 1},
                         values);
  SamplerCall call;
  call.logits = packed.view();
  call.params.assign(kRows, Filters(20, 0.9f, 0.0f));
  const SamplerResult expected = Run(call);
  call.logits = apart.view();
  EXPECT_TRUE(Run(call) == expected);
}

// ---- Values that are no numbers ----

TEST_P(SamplerPeerBugsTest,
       NanIsATokenOrACrash_FlashInfer2402_Colibri369_LlamaCpp13405) {
  const int64_t vocab = SmallOr(kOneBlockVocab, 5000);
  for (int64_t at : {int64_t{0}, int64_t{40}, vocab - 1}) {
    std::vector<float> row = Normal(vocab, 10);
    row[at] = kNan;
    const TestTensor logits = Logits(row);
    for (const SamplingParams& s :
         {Filters(0, 1.0f, 0.0f), Filters(40, 0.9f, 0.0f)}) {
      const SamplerResult result = Run(CallOf(logits.view(), {s}));
      EXPECT_EQ(result.tokens[0], -1);
      EXPECT_EQ(result.statuses[0], static_cast<int>(SampleStatus::kNonFinite));
    }
  }
}

TEST_P(SamplerPeerBugsTest, GreedyRowTimesMinusInfinityIsNan_vLLM22180) {
  const int64_t vocab = SmallOr(kOneBlockVocab, 5000);
  const int64_t best = vocab - 679;
  std::vector<float> row(vocab, -kInf);
  row[best] = -2.0f;
  SamplingParams greedy;
  greedy.temperature = 0.0f;
  const TestTensor logits = Logits(row);
  const SamplerResult result =
      Run(CallOf(logits.view(), {greedy, SamplingParams()}));
  EXPECT_EQ(result.tokens, (std::vector<int64_t>{best, best}));
  EXPECT_EQ(result.statuses, (std::vector<int64_t>{0, 0}));
}

TEST_P(SamplerPeerBugsTest, LowTemperatureOverflows_vLLM2937_LlamaCpp684) {
  std::vector<float> row =
      Normal(SmallOr(kOneBlockVocab, 5000), 11, 0.0f, 20.0f);
  row[77] = 300.0f;
  const TestTensor logits = Logits(row);
  for (float temperature : {1e-3f, 1e-7f, 1e-38f}) {
    SamplingParams s = Filters(40, 0.9f, 0.01f);
    s.temperature = temperature;
    const SamplerResult result = Run(CallOf(logits.view(), {s}));
    EXPECT_EQ(result.tokens[0], 77);
    EXPECT_EQ(result.processed_logprobs[0], 0.0);
  }
}

// ---- Masks and penalties ----

TEST_P(SamplerPeerBugsTest, ANarrowBitmaskLeavesTheTail_XGrammar611) {
  const TestTensor logits = Logits(Normal(100, 12));
  const TestTensor mask(device(), DType::kInt32, {1, 3});
  const TestTensor out(device(), DType::kInt32, {1});
  SamplerParams p;
  p.logits = logits.view();
  p.bitmask = mask.view();
  p.tokens = p.statuses = out.view();
  testing::ExpectInvalid(ValidateSamplerShapes(p), {"bitmask", "3", "4"});
}

// Rows of masks of another stride than the words that count; the rows of the
// batch that are masked are not the first.
TEST_P(SamplerPeerBugsTest, MasksOfOtherRows_XGrammar699_vLLM19493) {
  constexpr int64_t kVocab = 70;
  const TestTensor logits = Logits(std::vector<float>(kVocab, 1.0f));
  SamplingParams masked;
  masked.flags = kUseBitmask;
  SamplerCall call = CallOf(
      logits.view(), {SamplingParams(), masked, SamplingParams(), masked});
  call.bitmask_words = 5;
  call.bitmask.assign(20, 0);
  call.bitmask[5 + 2] = 1u << 3;   // row 1: id 67
  call.bitmask[15 + 0] = 1u << 9;  // row 3: id 9
  const std::vector<int64_t> tokens = Run(call).tokens;
  EXPECT_EQ(tokens[1], 67);
  EXPECT_EQ(tokens[3], 9);
  EXPECT_GE(tokens[0], 0);
}

TEST_P(SamplerPeerBugsTest, PenaltiesWithoutEffect_vLLM27878_vLLM18902) {
  const TestTensor logits = Logits({3.0f, 2.9f, -1.0f});
  SamplingParams s;
  s.temperature = 0.0f;
  s.repetition_penalty = 1.5f;
  SamplerCall call = CallOf(logits.view(), {s, s});
  call.edits = {{{0, 1, 0, 0}}, {}};
  EXPECT_EQ(Run(call).tokens, (std::vector<int64_t>{1, 0}));
}

// ---- Logprobs ----

TEST_P(SamplerPeerBugsTest,
       RawAndProcessedLogprobsAreMixedUp_vLLM42259_Trl6789_vLLM9453) {
  const TestTensor logits =
      Logits(Normal(SmallOr(kOneBlockVocab, 4000), 13, 0.0f, 2.0f));
  SamplingParams s = Filters(10, 1.0f, 0.0f);
  s.temperature = 0.6f;
  const SamplerResult result = Run(CallOf(logits.view(), {s}));
  const std::vector<double> x = logits.InitialValues();
  reference::Sampling raw, processed;
  processed.temperature = s.temperature;
  processed.top_k = 10;
  const int64_t token = result.tokens[0];
  EXPECT_NEAR(result.raw_logprobs[0],
              reference::KeptDistribution(x, raw).logprob[token], 1e-5);
  EXPECT_NEAR(
      result.processed_logprobs[0],
      std::log(reference::KeptDistribution(x, processed).probability[token]),
      1e-5);
  EXPECT_LT(result.raw_logprobs[0], result.processed_logprobs[0] - 0.1);
}

TEST_P(SamplerPeerBugsTest, LogitsAreDividedInPlace_LightLlm) {
  const TestTensor logits = Logits(Normal(SmallOr(kOneBlockVocab, 4000), 14));
  SamplingParams s = Filters(10, 0.9f, 0.01f);
  s.temperature = 0.5f;
  const SamplerResult first = Run(CallOf(logits.view(), {s}));
  EXPECT_EQ(logits.Bytes(), logits.InitialBytes());
  EXPECT_TRUE(Run(CallOf(logits.view(), {s})) == first);
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerPeerBugsTest,
                         ::testing::ValuesIn(testing::Float32Targets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
