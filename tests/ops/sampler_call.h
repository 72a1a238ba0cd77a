#ifndef TENON_TESTS_OPS_SAMPLER_CALL_H_
#define TENON_TESTS_OPS_SAMPLER_CALL_H_

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "ops/core/graph.h"
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
  bool fast = false;
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

// The device's copies of what a call is given.
class SamplerInputs {
 public:
  SamplerInputs(const SamplerCall& call, Device device, Stream stream)
      : device_(device),
        stream_(stream),
        rows_(call.logits.shape[0]),
        mu_(device, DType::kFloat32,
            {static_cast<int64_t>(call.mirostat_mu.size())}, call.mirostat_mu) {
    p_.logits = call.logits;
    p_.valid_vocab = call.valid_vocab;
    p_.params = Upload(call.params);
    p_.stream = call.stream;
    p_.fast = call.fast;
    AddEdits(call.edits);
    if (!call.bitmask.empty()) {
      p_.bitmask = MakeTensor(Upload(call.bitmask), DType::kInt32, device,
                              {rows_, call.bitmask_words});
    }
    if (!call.random_bits.empty()) {
      p_.random_bits =
          MakeTensor(Upload(call.random_bits), DType::kInt64, device, {rows_});
    }
    if (!call.mirostat_mu.empty()) p_.mirostat_mu = mu_.view();
    if (!call.mirostat_places.empty()) {
      p_.mirostat_places = MakeTensor(Upload(call.mirostat_places),
                                      DType::kInt32, device, {rows_, 2});
    }
  }

  const SamplerParams& params() const { return p_; }
  const TestTensor& mirostat_mu() const { return mu_; }

  // Adds a workspace of NaN bytes to a call.
  void AddWorkspace(SamplerParams* p) {
    p->workspace_size = SamplerWorkspaceBytes(*p);
    p->workspace = Upload(std::vector<uint8_t>(p->workspace_size, 0xff));
  }

 private:
  template <class T>
  T* Upload(const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    StatusOr<Buffer> buffer = Buffer::Allocate(device_, bytes + 1);
    EXPECT_TRUE(buffer.ok());
    EXPECT_TRUE(CopyMemory(buffer->data(), device_, values.data(), Device(),
                           bytes, stream_)
                    .ok());
    EXPECT_TRUE(Synchronize(device_, stream_).ok());
    buffers_.push_back(*std::move(buffer));
    return static_cast<T*>(buffers_.back().data());
  }

  void AddEdits(const std::vector<std::vector<LogitEdit>>& of_rows) {
    if (of_rows.empty()) return;
    std::vector<LogitEdit> edits;
    std::vector<int32_t> offsets = {0};
    for (const auto& of_row : of_rows) {
      edits.insert(edits.end(), of_row.begin(), of_row.end());
      offsets.push_back(static_cast<int32_t>(edits.size()));
    }
    p_.edits = Upload(edits);
    p_.num_edits = static_cast<int64_t>(edits.size());
    p_.edit_offsets =
        MakeTensor(Upload(offsets), DType::kInt32, device_, {rows_ + 1});
  }

  Device device_;
  Stream stream_;
  int64_t rows_;
  TestTensor mu_;
  std::vector<Buffer> buffers_;
  SamplerParams p_;
};

// What a call writes.
class SamplerOutputs {
 public:
  SamplerOutputs(const SamplerCall& call, Device device) : call_(call) {
    const int64_t rows = call.logits.shape[0];
    const int64_t vocab =
        call.valid_vocab != 0 ? call.valid_vocab : call.logits.shape[1];
    tokens_ = TestTensor(device, DType::kInt32, {rows});
    statuses_ = TestTensor(device, DType::kInt32, {rows});
    for (TestTensor* logprobs : {&logprobs_, &raw_, &processed_}) {
      *logprobs = TestTensor(device, DType::kFloat32, {rows});
    }
    if (call.num_top > 0) {
      top_tokens_ = TestTensor(device, DType::kInt32, {rows, call.num_top});
      top_logprobs_ = TestTensor(device, DType::kFloat32, {rows, call.num_top});
    }
    if (call.with_probabilities) {
      probabilities_ = TestTensor(device, DType::kFloat32, {rows, vocab},
                                  {vocab + 3, 1}, {});
    }
  }

  void AddTo(SamplerParams* p) const {
    p->tokens = tokens_.view();
    p->statuses = statuses_.view();
    p->logprobs = logprobs_.view();
    p->raw_logprobs = raw_.view();
    p->processed_logprobs = processed_.view();
    p->top_tokens = top_tokens_.view();
    p->top_logprobs = top_logprobs_.view();
    if (call_.num_top > 0) p->top_logprobs_kind = call_.top_kind;
    p->probabilities = probabilities_.view();
  }

  SamplerResult Read() const {
    SamplerResult result;
    result.tokens = tokens_.Integers();
    result.statuses = statuses_.Integers();
    result.logprobs = logprobs_.Values();
    result.raw_logprobs = raw_.Values();
    result.processed_logprobs = processed_.Values();
    if (call_.num_top > 0) {
      result.top_tokens = top_tokens_.Integers();
      result.top_logprobs = top_logprobs_.Values();
    }
    if (call_.with_probabilities) {
      result.probabilities = probabilities_.Values();
    }
    return result;
  }

  int64_t NumStrayWrites() const {
    int64_t stray = 0;
    for (const TestTensor* tensor :
         {&tokens_, &statuses_, &logprobs_, &raw_, &processed_, &top_tokens_,
          &top_logprobs_, &probabilities_}) {
      if (tensor->view().present()) stray += tensor->NumStrayWrites();
    }
    return stray;
  }

 private:
  const SamplerCall& call_;
  TestTensor tokens_, statuses_, logprobs_, raw_, processed_;
  TestTensor top_tokens_, top_logprobs_, probabilities_;
};

class SamplerCallTest : public SamplerTestBase {
 protected:
  SamplerResult Run(const SamplerCall& call) { return RunOn(call, device()); }

  // `target` is the device of call.logits.
  SamplerResult RunOn(const SamplerCall& call, Device target) {
    StatusOr<OwnedStream> own = OwnedStream::Create(target, 2);
    EXPECT_TRUE(own.ok());
    const Stream stream = own->get();
    SamplerInputs inputs(call, target, stream);
    const SamplerOutputs outputs(call, target);
    SamplerParams p = inputs.params();
    outputs.AddTo(&p);
    inputs.AddWorkspace(&p);
    const Status status = Sampler(p, stream);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_TRUE(Synchronize(target, stream).ok());
    EXPECT_EQ(outputs.NumStrayWrites(), 0);
    SamplerResult result = outputs.Read();
    if (!call.mirostat_mu.empty()) {
      result.mirostat_mu = inputs.mirostat_mu().Values();
    }
    return result;
  }

  // The same from a graph, launched again and again. Run(call) was before; of
  // calls without mirostat, whose state moves on.
  SamplerResult RunInAGraph(const SamplerCall& call) {
    SamplerInputs inputs(call, device(), stream());
    const SamplerOutputs outputs(call, device());
    SamplerParams p = inputs.params();
    outputs.AddTo(&p);
    inputs.AddWorkspace(&p);
    const StatusOr<Graph> graph = Graph::Capture(
        device(), stream(), [&] { return Sampler(p, stream()); });
    EXPECT_TRUE(graph.ok()) << graph.status().message();
    if (!graph.ok()) return {};
    EXPECT_EQ(graph->info().num_nodes, 2);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(graph->Launch(stream()).ok());
    EXPECT_TRUE(Synchronize(device(), stream()).ok());
    EXPECT_EQ(outputs.NumStrayWrites(), 0);
    return outputs.Read();
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
