#ifndef TENON_TESTS_OPS_LINEAR_FIXTURE_H_
#define TENON_TESTS_OPS_LINEAR_FIXTURE_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "ops/core/memory.h"
#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "tests/reference/linear_reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_size.h"
#include "tests/testing/test_tensor.h"

// Calls of Linear, in every way to run one.

namespace tenon::testing {

// The ways to run a call.
enum class LinearMode { kDefault, kBatchInvariant, kCublasLt };

inline const char* LinearModeName(LinearMode mode) {
  switch (mode) {
    case LinearMode::kDefault:
      return "default";
    case LinearMode::kBatchInvariant:
      return "batch-invariant";
    case LinearMode::kCublasLt:
      break;
  }
  return "cuBLASLt";
}

struct LinearShape {
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;
};

struct LinearOptions {
  bool bias = false;
  bool float_out = false;
  int64_t padding = 0;  // elements between rows
  int64_t offset = 0;   // elements before the first, all of which are unaligned
};

// The tensors of one call.
class LinearCall {
 public:
  LinearCall(Device device, DType dtype, LinearShape s, LinearOptions o,
             uint64_t seed = 1)
      : x_(Matrix(device, dtype, s.tokens, s.in_features, o, seed)),
        weight_(
            Matrix(device, dtype, s.out_features, s.in_features, o, seed + 1)),
        out_(device, o.float_out ? DType::kFloat32 : dtype,
             {s.tokens, s.out_features + o.offset},
             {s.out_features + o.offset + o.padding, 1}, {}),
        shape_(s),
        options_(o) {
    if (o.bias) {
      bias_ = TestTensor(device, dtype, {s.out_features + o.offset},
                         Normal(s.out_features + o.offset, seed + 2));
    }
  }

  LinearParams params() const {
    LinearParams p;
    p.x = Inner(x_);
    p.weight = Inner(weight_);
    p.out = Inner(out_);
    if (options_.bias) {
      p.bias = bias_.view();
      p.bias.shape[0] -= options_.offset;
      p.bias.data =
          bias_.view().As<char>() +
          options_.offset * static_cast<int64_t>(DTypeSize(p.bias.dtype));
    }
    return p;
  }

  std::vector<double> Values() const { return InnerValues(out_, false); }
  std::vector<double> X() const { return InnerValues(x_, true); }

  reference::LinearResult Expected() const {
    std::vector<double> bias;
    if (options_.bias) {
      bias = bias_.InitialValues();
      bias.erase(bias.begin(), bias.begin() + options_.offset);
    }
    return reference::Linear(InnerValues(x_, true), InnerValues(weight_, true),
                             bias, shape_.tokens, shape_.out_features,
                             shape_.in_features);
  }

  void ExpectOnlyOutChanged() const {
    EXPECT_EQ(x_.Bytes(), x_.InitialBytes());
    EXPECT_EQ(weight_.Bytes(), weight_.InitialBytes());
    EXPECT_EQ(out_.NumStrayWrites(), 0);
    if (options_.offset == 0) return;
    // The columns before the first are elements of out_, but not of the call.
    const int64_t width = out_.view().shape[1];
    const std::vector<double> values = out_.Values();
    for (size_t i = 0; i < values.size(); i += width) {
      for (int64_t c = 0; c < options_.offset; ++c) {
        EXPECT_TRUE(std::isnan(values[i + c]));
      }
    }
  }

 private:
  static TestTensor Matrix(Device device, DType dtype, int64_t rows,
                           int64_t cols, LinearOptions o, uint64_t seed) {
    return TestTensor(device, dtype, {rows, cols + o.offset},
                      {cols + o.offset + o.padding, 1},
                      Normal(rows * (cols + o.offset), seed));
  }

  TensorView Inner(const TestTensor& matrix) const {
    return Columns(matrix.view(), options_.offset,
                   matrix.view().shape[1] - options_.offset);
  }

  std::vector<double> InnerValues(const TestTensor& matrix,
                                  bool initial) const {
    const std::vector<double> all =
        initial ? matrix.InitialValues() : matrix.Values();
    const int64_t width = matrix.view().shape[1];
    std::vector<double> inner;
    for (size_t i = 0; i < all.size(); i += width) {
      inner.insert(inner.end(), all.begin() + i + options_.offset,
                   all.begin() + i + width);
    }
    return inner;
  }

  TestTensor x_;
  TestTensor weight_;
  TestTensor bias_;
  TestTensor out_;
  LinearShape shape_;
  LinearOptions options_;
};

// Has cuBLASLt where there is one.
class LinearTestBase : public OpTest {
 protected:
  static void TearDownTestSuite() { cublas_lt_.reset(); }

  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped() || device().type == DeviceType::kCpu || cublas_lt_ ||
        !TestsUseCublasLt()) {
      return;
    }
    StatusOr<std::unique_ptr<CublasLt>> lt = CublasLt::Create(device());
    if (lt.ok()) {
      cublas_lt_ = *std::move(lt);
    } else {
      EXPECT_EQ(lt.status().code(), StatusCode::kUnavailable);
    }
  }

  std::vector<LinearMode> Modes() const {
    if (device().type == DeviceType::kCpu) return {LinearMode::kDefault};
    std::vector<LinearMode> modes = {LinearMode::kDefault,
                                     LinearMode::kBatchInvariant};
    if (cublas_lt_) modes.push_back(LinearMode::kCublasLt);
    return modes;
  }

  static LinearParams WithMode(LinearParams p, LinearMode mode) {
    p.batch_invariant = mode == LinearMode::kBatchInvariant;
    p.cublas_lt = mode == LinearMode::kCublasLt ? cublas_lt_.get() : nullptr;
    return p;
  }

  void Run(const LinearParams& p, LinearMode mode) { Run(p, mode, stream()); }
  void Run(const LinearParams& params, LinearMode mode, Stream on) {
    LinearParams p = WithMode(params, mode);
    p.workspace_size = LinearWorkspaceBytes(p);
    StatusOr<Buffer> workspace = Buffer::Allocate(device(), p.workspace_size);
    ASSERT_TRUE(workspace.ok()) << workspace.status().message();
    // What the workspace holds before does not matter: NaN in every dtype.
    const Status filled =
        FillMemory(workspace->data(), device(), 0xff, p.workspace_size, on);
    ASSERT_TRUE(filled.ok()) << filled.message();
    p.workspace = workspace->data();
    const Status status = Linear(p, on);
    ASSERT_TRUE(status.ok()) << status.message();
    Finish();
  }

  // The out of a call.
  template <class Call>
  std::vector<double> OutOf(const Call& call, LinearMode mode) {
    Run(call.params(), mode);
    return call.Values();
  }

  // That tokens [first, first + count) alone give the bits of `expected`, the
  // float32 out of all tokens.
  void ExpectTokensAlone(const LinearParams& all, int64_t first, int64_t count,
                         LinearMode mode, const std::vector<double>& expected) {
    const int64_t cols = all.out.shape[1];
    const TestTensor out(device(), DType::kFloat32, {count, cols});
    LinearParams p = all;
    p.x = Rows(p.x, first, count);
    p.out = out.view();
    Run(p, mode);
    const std::vector<double> actual = out.Values();
    ASSERT_EQ(std::memcmp(actual.data(), &expected[first * cols],
                          actual.size() * sizeof(double)),
              0);
  }

  // That a token's out is the same among others that are huge.
  void ExpectTokenIgnoresOthers(const LinearParams& call, LinearMode mode) {
    const int64_t tokens = call.x.shape[0];
    const int64_t in = call.x.shape[1];
    const int64_t cols = call.out.shape[1];
    std::vector<double> rows[2];
    for (int i = 0; i < 2; ++i) {
      std::vector<float> x = Normal(tokens * in, 21 + i, 0.0f, 1.0f + 99 * i);
      const std::vector<float> last = Normal(in, 23);
      std::copy(last.begin(), last.end(), x.end() - in);
      const TestTensor x_tensor(device(), dtype(), {tokens, in}, x);
      const TestTensor out(device(), DType::kFloat32, {tokens, cols});
      LinearParams p = call;
      p.x = x_tensor.view();
      p.out = out.view();
      Run(p, mode);
      rows[i] = out.Values();
      rows[i].erase(rows[i].begin(), rows[i].end() - cols);
    }
    EXPECT_EQ(rows[0], rows[1]);
  }

  // That the number of threads changes no bit, on the CPU.
  void ExpectThreadsDoNotMatter(const LinearParams& call) {
    const auto values = [&](Stream on) {
      const TestTensor out(device(), call.out.dtype,
                           {call.out.shape[0], call.out.shape[1]});
      LinearParams p = call;
      p.out = out.view();
      Run(p, LinearMode::kDefault, on);
      return out.Values();
    };
    const std::vector<double> alone = values(Stream());
    for (int threads : {1, 2, 3, 5}) {
      StatusOr<OwnedStream> stream = OwnedStream::Create(device(), threads);
      ASSERT_TRUE(stream.ok());
      EXPECT_EQ(values(stream->get()), alone) << threads << " threads";
    }
  }

  inline static std::unique_ptr<CublasLt> cublas_lt_;
};

}  // namespace tenon::testing

#endif  // TENON_TESTS_OPS_LINEAR_FIXTURE_H_
