#ifndef TENON_TESTS_OPS_SAMPLER_CALL_H_
#define TENON_TESTS_OPS_SAMPLER_CALL_H_

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "tests/ops/sampler_test_base.h"

namespace tenon::testing {

// A call of Sampler with everything that it may have.
struct SamplerCall {
  TensorView logits;
  int64_t valid_vocab = 0;
  std::vector<SamplingParams> params;         // of every row
  std::vector<std::vector<LogitEdit>> edits;  // of every row, or none at all
  std::vector<uint32_t> bitmask;              // [rows, bitmask_words], or none
  int64_t bitmask_words = 0;
  std::vector<uint64_t> random_bits;  // of every row, or none
  RandomStream stream = RandomStream::kTarget;
  std::vector<float> mirostat_mu;        // of every row, or none
  std::vector<int32_t> mirostat_places;  // [rows, 2], or none
  int64_t num_top = 0;
  LogprobKind top_kind = LogprobKind::kUnfiltered;
  bool with_probabilities = false;
};

struct SamplerResult {
  std::vector<int64_t> tokens;
  std::vector<int64_t> statuses;
  std::vector<double> logprobs;
  std::vector<double> raw_logprobs;
  std::vector<double> processed_logprobs;
  std::vector<int64_t> top_tokens;
  std::vector<double> top_logprobs;
  std::vector<double> probabilities;
  std::vector<double> mirostat_mu;

  // NaN equals NaN: all bits but those of NaNs.
  bool operator==(const SamplerResult& other) const {
    const auto same = [](const std::vector<double>& a,
                         const std::vector<double>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                        [](double x, double y) {
                          return x == y || (std::isnan(x) && std::isnan(y));
                        });
    };
    return tokens == other.tokens && statuses == other.statuses &&
           same(logprobs, other.logprobs) &&
           same(raw_logprobs, other.raw_logprobs) &&
           same(processed_logprobs, other.processed_logprobs) &&
           top_tokens == other.top_tokens &&
           same(top_logprobs, other.top_logprobs) &&
           same(probabilities, other.probabilities) &&
           same(mirostat_mu, other.mirostat_mu);
  }
};

class SamplerCallTest : public SamplerTestBase {
 protected:
  SamplerResult Run(const SamplerCall& call) { return RunOn(call, device()); }

  // `target` is the device of call.logits.
  SamplerResult RunOn(const SamplerCall& call, Device target) {
    StatusOr<OwnedStream> own = OwnedStream::Create(target, 2);
    EXPECT_TRUE(own.ok());
    const Stream stream = own->get();
    const int64_t rows = call.logits.shape[0];
    const int64_t vocab =
        call.valid_vocab != 0 ? call.valid_vocab : call.logits.shape[1];
    const auto upload = [&](const void* data, size_t bytes) {
      StatusOr<Buffer> buffer = Buffer::Allocate(target, bytes + 1);
      EXPECT_TRUE(buffer.ok());
      EXPECT_TRUE(
          CopyMemory(buffer->data(), target, data, Device(), bytes, stream)
              .ok());
      EXPECT_TRUE(Synchronize(target, stream).ok());
      return *std::move(buffer);
    };
    const auto floats = [&](std::vector<int64_t> shape) {
      return TestTensor(target, DType::kFloat32, std::move(shape));
    };
    TestTensor tokens(target, DType::kInt32, {rows});
    TestTensor statuses(target, DType::kInt32, {rows});
    TestTensor logprobs = floats({rows});
    TestTensor raw = floats({rows});
    TestTensor processed = floats({rows});
    TestTensor top_tokens(target, DType::kInt32,
                          {rows, std::max<int64_t>(call.num_top, 1)});
    TestTensor top_logprobs =
        floats({rows, std::max<int64_t>(call.num_top, 1)});
    TestTensor probabilities =
        call.with_probabilities ? TestTensor(target, DType::kFloat32,
                                             {rows, vocab}, {vocab + 3, 1}, {})
                                : floats({1});
    const TestTensor mu(target, DType::kFloat32,
                        {static_cast<int64_t>(call.mirostat_mu.size())},
                        call.mirostat_mu);

    SamplerParams p;
    p.logits = call.logits;
    p.valid_vocab = call.valid_vocab;
    const Buffer params =
        upload(call.params.data(), call.params.size() * sizeof(SamplingParams));
    p.params = static_cast<const SamplingParams*>(params.data());
    std::vector<LogitEdit> edits;
    std::vector<int32_t> offsets = {0};
    for (const auto& of_row : call.edits) {
      edits.insert(edits.end(), of_row.begin(), of_row.end());
      offsets.push_back(static_cast<int32_t>(edits.size()));
    }
    const Buffer edits_buffer =
        upload(edits.data(), edits.size() * sizeof(LogitEdit));
    const Buffer offsets_buffer =
        upload(offsets.data(), offsets.size() * sizeof(int32_t));
    if (!call.edits.empty()) {
      p.edits = static_cast<const LogitEdit*>(edits_buffer.data());
      p.num_edits = static_cast<int64_t>(edits.size());
      p.edit_offsets =
          MakeTensor(offsets_buffer.data(), DType::kInt32, target, {rows + 1});
    }
    const Buffer bitmask =
        upload(call.bitmask.data(), call.bitmask.size() * sizeof(uint32_t));
    if (!call.bitmask.empty()) {
      p.bitmask = MakeTensor(bitmask.data(), DType::kInt32, target,
                             {rows, call.bitmask_words});
    }
    const Buffer bits = upload(call.random_bits.data(),
                               call.random_bits.size() * sizeof(uint64_t));
    if (!call.random_bits.empty()) {
      p.random_bits = MakeTensor(bits.data(), DType::kInt64, target, {rows});
    }
    p.stream = call.stream;
    if (!call.mirostat_mu.empty()) p.mirostat_mu = mu.view();
    const Buffer places = upload(call.mirostat_places.data(),
                                 call.mirostat_places.size() * sizeof(int32_t));
    if (!call.mirostat_places.empty()) {
      p.mirostat_places =
          MakeTensor(places.data(), DType::kInt32, target, {rows, 2});
    }
    p.tokens = tokens.view();
    p.statuses = statuses.view();
    p.logprobs = logprobs.view();
    p.raw_logprobs = raw.view();
    p.processed_logprobs = processed.view();
    if (call.num_top > 0) {
      p.top_tokens = top_tokens.view();
      p.top_logprobs = top_logprobs.view();
      p.top_logprobs_kind = call.top_kind;
    }
    if (call.with_probabilities) p.probabilities = probabilities.view();
    const std::vector<char> scratch(SamplerWorkspaceBytes(p), '\xff');
    const Buffer workspace = upload(scratch.data(), scratch.size());
    p.workspace = workspace.data();
    p.workspace_size = scratch.size();
    const Status status = Sampler(p, stream);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_TRUE(Synchronize(target, stream).ok());
    int64_t stray = 0;
    for (const TestTensor* t : {&tokens, &statuses, &logprobs, &raw, &processed,
                                &top_tokens, &top_logprobs, &probabilities}) {
      stray += t->NumStrayWrites();
    }
    EXPECT_EQ(stray, 0);
    SamplerResult result = {tokens.Integers(),
                            statuses.Integers(),
                            logprobs.Values(),
                            raw.Values(),
                            processed.Values(),
                            {},
                            {},
                            {},
                            {}};
    if (call.num_top > 0) {
      result.top_tokens = top_tokens.Integers();
      result.top_logprobs = top_logprobs.Values();
    }
    if (call.with_probabilities) {
      result.probabilities = probabilities.Values();
    }
    if (!call.mirostat_mu.empty()) result.mirostat_mu = mu.Values();
    return result;
  }

  // One row of logits for all `params`.
  static SamplerCall CallOf(const TensorView& logits,
                            std::vector<SamplingParams> params) {
    SamplerCall call;
    call.logits = Repeat(logits, static_cast<int64_t>(params.size()));
    call.params = std::move(params);
    return call;
  }

  // Bits whose uniform is the one nearest to `u`.
  static uint64_t BitsOf(double u) {
    const double scaled = std::clamp(u, 0.0, 1.0) * 0x1p53;
    return static_cast<uint64_t>(std::min(scaled, 0x1p53 - 1.0)) << 11;
  }

  static void SortEdits(std::vector<LogitEdit>* edits, int64_t vocab) {
    std::sort(edits->begin(), edits->end(),
              [&](const LogitEdit& a, const LogitEdit& b) {
                return DrawOrder(a.id, vocab) < DrawOrder(b.id, vocab);
              });
  }
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_SAMPLER_CALL_H_
