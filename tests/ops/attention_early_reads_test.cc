// Attention with early_reads behind the ops that an engine has ahead of it:
// upload, projection, QkNorm that writes the cache. Round after round in one
// stream, with other lengths and block tables each time, and keys that earlier
// rounds have written. Whatever is read too early is of another round.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/core/graph.h"
#include "ops/qk_norm/qk_norm.h"
#include "tests/ops/linear_fp8_fixture.h"
#include "tests/testing/test_size.h"

namespace tenon {
namespace {

using testing::LinearMode;
using testing::Normal;
using testing::TestTensor;

constexpr int64_t kHeads = 8;
constexpr int64_t kKvHeads = 2;
constexpr int64_t kDim = 128;
constexpr int64_t kWidth = (kHeads + 2 * kKvHeads) * kDim;  // of a qkv row
constexpr int64_t kHidden = 512;
constexpr int64_t kPageSize = 16;
constexpr int64_t kSharedPages = 24;  // which no round writes
constexpr int64_t kOwnPages = 4;      // of a sequence, for its new tokens
constexpr int64_t kMaxPages = 40;     // of a sequence in a round

struct Case {
  int64_t sequences = 1;
  int64_t queries = 1;  // of each
  bool float8 = false;  // weight and cache

  int64_t tokens() const { return sequences * queries; }
};

// Where each round's new tokens go, and what its sequences read.
struct Plan {
  std::vector<int64_t> slots;
  std::vector<int32_t> block_table;
  std::vector<int32_t> kv_len;
};

// The last two pages of a sequence are its own, which hold its new tokens and
// those of earlier rounds; the others are anybody's.
void AddSequence(int64_t sequence, int64_t queries, std::mt19937_64* rng,
                 Plan* plan) {
  const auto draw = [rng](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(*rng);
  };
  const int64_t length = draw(queries, kMaxPages * kPageSize);
  const int64_t pages = (length + kPageSize - 1) / kPageSize;
  std::vector<int32_t> row(kMaxPages, 0x7fffffff);
  for (int64_t i = 0; i < pages; ++i) {
    row[i] = static_cast<int32_t>(draw(0, kSharedPages - 1));
  }
  const int64_t own = draw(0, kOwnPages - 1);
  for (int64_t i = 0; i < std::min<int64_t>(pages, 2); ++i) {
    row[pages - 1 - i] = static_cast<int32_t>(
        kSharedPages + sequence * kOwnPages + (own + i) % kOwnPages);
  }
  for (int64_t at = length - queries; at < length; ++at) {
    plan->slots.push_back(row[at / kPageSize] * kPageSize + at % kPageSize);
  }
  plan->block_table.insert(plan->block_table.end(), row.begin(), row.end());
  plan->kv_len.push_back(static_cast<int32_t>(length));
}

Plan RandomPlan(const Case& c, int rounds) {
  std::mt19937_64 rng(7);
  Plan plan;
  for (int round = 0; round < rounds; ++round) {
    for (int64_t s = 0; s < c.sequences; ++s) {
      AddSequence(s, c.queries, &rng, &plan);
    }
  }
  return plan;
}

// A tensor of the device whose contents are uploaded for every round.
class Uploaded {
 public:
  Uploaded() = default;

  // `values`: of all rounds.
  template <class T>
  Uploaded(Device device, DType dtype, std::vector<int64_t> shape,
           const std::vector<T>& values, int rounds)
      : tensor_(device, dtype, std::move(shape)) {
    const size_t bytes = values.size() / rounds * sizeof(T);
    bytes_ = (bytes + 15) / 16 * 16;
    StatusOr<Buffer> host =
        Buffer::Allocate(device, rounds * bytes_, HostMemoryKind(device));
    EXPECT_TRUE(host.ok()) << host.status().message();
    if (!host.ok()) return;
    host_ = *std::move(host);
    for (int i = 0; i < rounds; ++i) {
      std::memcpy(HostOf(i), &values[i * bytes / sizeof(T)], bytes);
    }
    bytes_copied_ = bytes;
  }

  const TensorView& view() const { return tensor_.view(); }
  Status Upload(int round, Stream stream) const {
    return CopyPinned(view().data, HostOf(round), view().device, bytes_copied_,
                      stream);
  }

 private:
  char* HostOf(int round) const {
    return static_cast<char*>(host_.data()) + round * bytes_;
  }

  TestTensor tensor_;
  Buffer host_;
  size_t bytes_ = 0;  // from one round to the next
  size_t bytes_copied_ = 0;
};

size_t BytesOf(const TensorView& contiguous) {
  return static_cast<size_t>(NumElements(contiguous)) *
         DTypeSize(contiguous.dtype);
}

// The tensors of a case, and the ops of a round on them.
class Rounds {
 public:
  Rounds(Device device, DType dtype, const Case& c, int count)
      : case_(c),
        count_(count),
        x_(device, dtype, {count + c.tokens(), kHidden},
           Normal((count + c.tokens()) * kHidden, 1)),
        norm_weight_(device, dtype, {kHidden}, Normal(kHidden, 2)),
        weight_(device, c.float8 ? DType::kFloat8E4M3 : dtype,
                {kWidth, kHidden}, Normal(kWidth * kHidden, 3)),
        head_weight_(device, dtype, {kDim}, Normal(kDim, 4)),
        normed_(device, dtype, {c.tokens(), kHidden}),
        qkv_(device, dtype, {c.tokens(), kWidth}),
        out_(device, dtype, {count * c.tokens(), kHeads, kDim}) {
    if (c.float8) {
      const int64_t rows = NumFp8Groups(kWidth);
      const int64_t cols = NumFp8Groups(kHidden);
      scales_ = TestTensor(device, DType::kFloat32, {rows, cols},
                           testing::Fp8TestScales(rows * cols, 5));
    }
    std::vector<int64_t> starts;
    for (int64_t i = 0; i <= c.sequences; ++i) starts.push_back(i * c.queries);
    query_start_ = TestTensor::FromIntegers(device, DType::kInt32,
                                            {c.sequences + 1}, starts);
    const Plan plan = RandomPlan(c, count);
    slots_ = Uploaded(device, DType::kInt64, {c.tokens()}, plan.slots, count);
    block_table_ = Uploaded(device, DType::kInt32, {c.sequences, kMaxPages},
                            plan.block_table, count);
    kv_len_ =
        Uploaded(device, DType::kInt32, {c.sequences}, plan.kv_len, count);
    const int64_t pages = kSharedPages + c.sequences * kOwnPages;
    const DType cache = c.float8 ? DType::kFloat8E4M3 : dtype;
    const std::vector<int64_t> shape = {pages, kPageSize, kKvHeads, kDim};
    first_keys_ = TestTensor(device, cache, shape,
                             Normal(pages * kPageSize * kKvHeads * kDim, 6));
    k_ = TestTensor(device, cache, shape);
    v_ = TestTensor(device, cache, shape);
  }

  int count() const { return count_; }

  // Takes back all that rounds have computed and written.
  Status ClearResults(Stream stream) const {
    const Device device = x_.view().device;
    const TensorView& keys = first_keys_.view();
    for (const TestTensor* cache : {&k_, &v_}) {
      TENON_RETURN_IF_ERROR(CopyMemory(cache->view().data, device, keys.data,
                                       device, BytesOf(keys), stream));
    }
    return FillMemory(out_.view().data, device, 0xff, BytesOf(out_.view()),
                      stream);
  }

  std::vector<double> Outputs() const { return out_.Values(); }
  std::vector<std::vector<uint8_t>> Results() const {
    return {out_.Bytes(), k_.Bytes(), v_.Bytes()};
  }

  Status Upload(int round, Stream stream) const {
    for (const Uploaded* tensor : {&slots_, &block_table_, &kv_len_}) {
      TENON_RETURN_IF_ERROR(tensor->Upload(round, stream));
    }
    return Status();
  }

  LinearParams Projection(int round) const {
    LinearParams p;
    p.x = Rows(x_.view(), round, case_.tokens());
    p.weight = weight_.view();
    p.weight_scales = scales_.view();
    p.out = qkv_.view();
    p.norm.weight = norm_weight_.view();
    p.norm.out = normed_.view();
    p.norm.epsilon = 1e-6f;
    p.weights_are_constant = true;
    return p;
  }

  QkNormParams HeadNorm() const {
    QkNormParams p;
    p.qkv = qkv_.view();
    p.k_offset = kHeads * kDim;
    p.v_offset = (kHeads + kKvHeads) * kDim;
    p.num_q_heads = kHeads;
    p.num_kv_heads = kKvHeads;
    p.head_dim = kDim;
    p.q_weight = p.k_weight = head_weight_.view();
    p.epsilon = 1e-6f;
    p.cache.k_cache = k_.view();
    p.cache.v_cache = v_.view();
    p.cache.slot_mapping = slots_.view();
    return p;
  }

  AttentionParams AttentionOf(int round) const {
    AttentionParams p;
    p.q = qkv_.view();
    p.q.rank = 3;
    p.q.shape[1] = kHeads;
    p.q.shape[2] = p.q.stride[1] = kDim;
    p.q.stride[2] = 1;
    p.out = Rows(out_.view(), round * case_.tokens(), case_.tokens());
    p.k_cache = k_.view();
    p.v_cache = v_.view();
    p.block_table = block_table_.view();
    p.query_start = query_start_.view();
    p.kv_len = kv_len_.view();
    p.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    p.max_query_len = static_cast<int32_t>(case_.queries);
    return p;
  }

 private:
  Case case_;
  int count_;
  TestTensor x_, norm_weight_, weight_, scales_, head_weight_, query_start_;
  Uploaded slots_, block_table_, kv_len_;
  TestTensor normed_, qkv_, out_, first_keys_, k_, v_;
};

class AttentionEarlyReadsTest : public testing::LinearTestBase {
 protected:
  // One after the other, waiting for each, or all of them enqueued at once.
  Status Run(const Rounds& rounds, LinearMode mode, bool early_reads,
             bool waits) {
    const auto wait = [&](const Status& status) {
      if (!status.ok() || !waits) return status;
      return Synchronize(device(), stream());
    };
    for (int i = 0; i < rounds.count(); ++i) {
      const LinearParams projection =
          WithWorkspace(WithMode(rounds.Projection(i), mode));
      AttentionParams attention = WithWorkspace(rounds.AttentionOf(i));
      attention.batch_invariant = mode == LinearMode::kBatchInvariant;
      attention.early_reads = early_reads;
      TENON_RETURN_IF_ERROR(wait(rounds.Upload(i, stream())));
      TENON_RETURN_IF_ERROR(wait(Linear(projection, stream())));
      TENON_RETURN_IF_ERROR(wait(QkNorm(rounds.HeadNorm(), stream())));
      TENON_RETURN_IF_ERROR(wait(Attention(attention, stream())));
    }
    return Status();
  }

  void MakeWorkspace(const Rounds& rounds, LinearMode mode) {
    AttentionParams attention = rounds.AttentionOf(0);
    attention.batch_invariant = mode == LinearMode::kBatchInvariant;
    StatusOr<Buffer> workspace = Buffer::Allocate(
        device(),
        std::max(LinearWorkspaceBytes(WithMode(rounds.Projection(0), mode)),
                 AttentionWorkspaceBytes(attention)));
    ASSERT_TRUE(workspace.ok()) << workspace.status().message();
    workspace_ = *std::move(workspace);
  }

  // That rounds with early reads have the results of those without.
  void Check(const Case& c) {
    const bool on_cuda = device().type == DeviceType::kCuda;
    const Rounds rounds(device(), dtype(), c,
                        on_cuda ? testing::SmallOr(3, 24) : 4);
    for (const LinearMode mode : Modes()) {
      SCOPED_TRACE(StrCat(LinearModeName(mode), c.float8 ? ", fp8, " : ", ",
                          c.sequences, " x ", c.queries));
      MakeWorkspace(rounds, mode);
      const auto results = [&](auto&& run) {
        Status status = rounds.ClearResults(stream());
        if (status.ok()) status = run();
        EXPECT_TRUE(status.ok()) << status.message();
        Finish();
        return rounds.Results();
      };
      const auto expected =
          results([&] { return Run(rounds, mode, false, true); });
      for (double value : rounds.Outputs()) ASSERT_TRUE(std::isfinite(value));
      EXPECT_EQ(results([&] { return Run(rounds, mode, true, false); }),
                expected);
      if (!on_cuda) continue;
      // The host is not in the way of the kernels then.
      const StatusOr<Graph> graph = Graph::Capture(
          device(), stream(), [&] { return Run(rounds, mode, true, false); });
      ASSERT_TRUE(graph.ok()) << graph.status().message();
      EXPECT_EQ(results([&] { return graph->Launch(stream()); }), expected);
    }
  }

 private:
  template <class Params>
  Params WithWorkspace(Params p) const {
    p.workspace = workspace_.data();
    p.workspace_size = workspace_.size();
    return p;
  }

  Buffer workspace_;
};

TEST_P(AttentionEarlyReadsTest, SeesWhatTheKernelsAheadHaveWritten) {
  for (const bool float8 : {false, true}) {
    for (const auto& [sequences, queries] : testing::Fewer<std::pair<int, int>>(
             {{1, 1}, {3, 1}, {2, 3}, {30, 1}})) {
      Check({sequences, queries, float8});
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionEarlyReadsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
