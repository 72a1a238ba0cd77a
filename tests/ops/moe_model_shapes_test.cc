#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>

#include "tests/ops/moe_fixture.h"

// The kernels of Moe on CUDA at the widths of models, for all numbers of tokens
// and uneven loads, against the CPU backend, which has suites of its own. Rows
// of x repeat, so that all rows of a large call can be checked bit by bit.

namespace tenon::moe_test {
namespace {

constexpr int64_t kPeriod = 61;  // of the rows of x and ids
constexpr int64_t kExperts = 16;
constexpr int64_t kTopK = 4;

enum class Load { kUniform, kZipf, kOneExpert };

struct Shape {
  int64_t hidden;
  int64_t intermediate;
};
constexpr Experts kAllExperts[] = {Experts::kAsX, Experts::kFp8Blocks,
                                   Experts::kFp8Rows};

// Elements of random draws that repeat, cheap to make in any number.
class Memory {
 public:
  Memory() = default;
  Memory(Device device, DType dtype, int64_t count, uint64_t seed, float mean,
         float stddev, int64_t byte_offset = 0)
      : byte_offset_(byte_offset) {
    constexpr int64_t kDraws = 100003;  // a multiple of no width
    const TestTensor draws(Device(), dtype, {kDraws},
                           Normal(kDraws, seed, mean, stddev));
    const size_t bytes = static_cast<size_t>(count) * DTypeSize(dtype);
    const size_t draw_bytes = kDraws * DTypeSize(dtype);
    host_ = Allocate(Device(), bytes);
    for (size_t done = 0; done < bytes; done += draw_bytes) {
      std::memcpy(host() + done, draws.view().data,
                  std::min(draw_bytes, bytes - done));
    }
    device_ = Allocate(device, bytes);
    EXPECT_TRUE(
        CopyMemory(data(), device, host(), Device(), bytes, Stream()).ok());
    EXPECT_TRUE(Synchronize(device, Stream()).ok());
  }

  char* host() const { return static_cast<char*>(host_.data()) + byte_offset_; }
  char* data() const {
    return static_cast<char*>(device_.data()) + byte_offset_;
  }

 private:
  Buffer Allocate(Device device, size_t bytes) const {
    StatusOr<Buffer> buffer =
        Buffer::Allocate(device, bytes + static_cast<size_t>(byte_offset_));
    EXPECT_TRUE(buffer.ok()) << buffer.status().message();
    return *std::move(buffer);
  }

  int64_t byte_offset_ = 0;
  Buffer host_, device_;
};

// Matrices [kExperts, rows, cols] on the CPU and on CUDA.
class SharedWeights {
 public:
  SharedWeights(Device device, DType dtype, Experts experts, int64_t rows,
                int64_t cols, int64_t padding, int64_t byte_offset,
                uint64_t seed)
      : experts_(experts) {
    const DType element = IsFp8(experts) ? DType::kFloat8E4M3 : dtype;
    const float stddev = 1.0f / std::sqrt(static_cast<float>(cols));
    const int64_t stride = cols + padding;
    elements_ = Memory(device, element, kExperts * rows * stride, seed, 0.0f,
                       IsFp8(experts) ? 100.0f : stddev, byte_offset);
    view_ = MakeTensor(nullptr, element, Device(), {kExperts, rows, cols});
    view_.stride[0] = rows * stride;
    view_.stride[1] = stride;
    if (!IsFp8(experts)) return;
    scales_view_ =
        experts == Experts::kFp8Rows
            ? MakeTensor(nullptr, DType::kFloat32, Device(), {kExperts, rows})
            : MakeTensor(nullptr, DType::kFloat32, Device(),
                         {kExperts, (rows + 127) / 128, (cols + 127) / 128});
    scales_ = Memory(device, DType::kFloat32, NumElements(scales_view_),
                     seed + 1, stddev / 100.0f, stddev / 400.0f);
  }

  ExpertMatrices On(Device device) const {
    const bool on_cpu = device.type == DeviceType::kCpu;
    TensorView view = view_;
    view.data = on_cpu ? elements_.host() : elements_.data();
    view.device = device;
    ExpertMatrices m = MakeExpertMatrices(view);
    if (!IsFp8(experts_)) return m;
    TensorView scales = scales_view_;
    scales.data = on_cpu ? scales_.host() : scales_.data();
    m.scales = MakeExpertScales(scales);
    return m;
  }

 private:
  Experts experts_;
  Memory elements_, scales_;
  TensorView view_, scales_view_;
};

// Experts of a period of tokens.
std::vector<int64_t> MakeIds(Load load) {
  std::vector<int64_t> ids = UniformIntegers(kPeriod * kTopK, 5, 0, 1 << 20);
  for (int64_t& id : ids) {
    const double u = static_cast<double>(id) / (1 << 20);
    switch (load) {
      case Load::kUniform:
        id %= kExperts + 1;  // a few that are no expert's
        break;
      case Load::kZipf:  // expert e is drawn about 1 / (e + 1) as often
        id = static_cast<int64_t>(std::pow(kExperts + 1.0, u)) - 1;
        break;
      case Load::kOneExpert:
        id = 11;
    }
  }
  return ids;
}

class MoeModelShapesTest : public Fixture {
 protected:
  void SetUp() override {
    Fixture::SetUp();
    if (dtype() == DType::kFloat32) GTEST_SKIP() << "of 16-bit floats";
  }

  // The CPU takes small ones, which show that the tests are right.
  std::vector<Shape> Shapes() const {
    if (!on_cuda()) return {{144, 64}, {272, 192}};
    if (testing::SmallTests()) return {{512, 384}, {2048, 192}};
    return {{2048, 768}, {2048, 192}, {4096, 384}, {5120, 384}};
  }

  struct Experiment {
    Shape shape;
    Experts experts;
    Load load = Load::kUniform;
    std::vector<int64_t> token_counts;
    int64_t padding = 0;
    int64_t byte_offset = 0;
  };

  void Check(const Experiment& e) {
    const int64_t hidden = e.shape.hidden;
    SCOPED_TRACE(StrCat("hidden ", hidden, ", intermediate ",
                        e.shape.intermediate, ", experts of kind ",
                        static_cast<int>(e.experts), ", load ",
                        static_cast<int>(e.load)));
    const auto make = [&](int64_t rows, int64_t cols, uint64_t seed) {
      return SharedWeights(device(), dtype(), e.experts, rows, cols, e.padding,
                           e.byte_offset, seed);
    };
    const SharedWeights gate = make(e.shape.intermediate, hidden, 10);
    const SharedWeights up = make(e.shape.intermediate, hidden, 20);
    const SharedWeights down = make(hidden, e.shape.intermediate, 30);
    const auto run = [&](Device device, int64_t tokens, bool batch_invariant,
                         Stream stream) {
      const TestTensor x(device, dtype(), {tokens, hidden},
                         Repeat(Normal(std::min(tokens, kPeriod) * hidden, 1),
                                hidden, kPeriod, tokens));
      const TestTensor ids = TestTensor::FromIntegers(
          device, DType::kInt32, {tokens, kTopK},
          Repeat(MakeIds(e.load), kTopK, kPeriod, tokens));
      const TestTensor weights(device, DType::kFloat32, {tokens, kTopK},
                               Repeat(Normal(kPeriod * kTopK, 3, 0.3f, 0.1f),
                                      kTopK, kPeriod, tokens));
      TestTensor out(device, dtype(), {tokens, hidden});
      MoeParams p;
      p.x = x.view();
      p.topk_ids = ids.view();
      p.topk_weights = weights.view();
      p.gate = gate.On(device);
      p.up = up.On(device);
      p.down = down.On(device);
      p.out = out.view();
      p.batch_invariant = batch_invariant;
      p.workspace_size = MoeWorkspaceBytes(p);
      // Of NaN bytes; what lies beside it is looked at where it is small.
      TestTensor guarded;
      Buffer large;
      if (tokens <= 300) {
        guarded = TestTensor(device, DType::kUInt8,
                             {static_cast<int64_t>(p.workspace_size)});
        p.workspace = guarded.view().data;
      } else {
        StatusOr<Buffer> buffer = Buffer::Allocate(device, p.workspace_size);
        EXPECT_TRUE(buffer.ok()) << buffer.status().message();
        large = *std::move(buffer);
        EXPECT_TRUE(
            FillMemory(large.data(), device, 0xff, large.size(), stream).ok());
        p.workspace = large.data();
      }
      const Status status = Moe(p, stream);
      EXPECT_TRUE(status.ok()) << status.message();
      EXPECT_TRUE(Synchronize(device, stream).ok());
      EXPECT_EQ(out.NumStrayWrites(), 0);
      if (tokens <= 300) {
        EXPECT_EQ(guarded.NumStrayWrites(), 0);
      }
      return out;
    };
    const std::vector<double> expected =
        run(Device(), kPeriod, true, Stream()).Values();
    const std::vector<uint8_t> period =
        RowBytes(run(device(), kPeriod, true, stream()));
    for (int64_t tokens : e.token_counts) {
      SCOPED_TRACE(StrCat(tokens, " tokens"));
      for (bool batch_invariant : {false, true}) {
        const TestTensor out = run(device(), tokens, batch_invariant, stream());
        const int64_t compared = std::min(tokens, kPeriod) * hidden;
        const std::vector<uint8_t> bytes = RowBytes(out);
        const TestTensor first(Device(), dtype(), {compared});
        std::memcpy(first.view().data, bytes.data(),
                    static_cast<size_t>(compared) * DTypeSize(dtype()));
        EXPECT_LT(RelativeFrobeniusError(
                      first.Values(),
                      {expected.begin(), expected.begin() + compared}),
                  MaxError(e.experts));
        ExpectRepeats(bytes, batch_invariant ? period : bytes, hidden, dtype());
      }
    }
  }

 private:
  // Of a contiguous tensor, without its guards.
  static std::vector<uint8_t> RowBytes(const TestTensor& t) {
    const std::vector<uint8_t> bytes = t.Bytes();
    const size_t size =
        static_cast<size_t>(NumElements(t.view())) * DTypeSize(t.view().dtype);
    const auto first = bytes.begin() + TestTensor::kGuardBytes;
    return {first, first + static_cast<int64_t>(size)};
  }

  // Rows of `bytes` are those of `rows`, which repeat after a period.
  static void ExpectRepeats(const std::vector<uint8_t>& bytes,
                            const std::vector<uint8_t>& rows, int64_t hidden,
                            DType dtype) {
    const size_t period =
        static_cast<size_t>(kPeriod * hidden) * DTypeSize(dtype);
    int64_t different = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
      different += bytes[i] != rows[i % period];
    }
    EXPECT_EQ(different, 0) << "bytes";
  }
};

TEST_P(MoeModelShapesTest, UniformLoad) {
  for (const Shape& shape : Fewer(Shapes(), 1)) {
    for (Experts experts : kAllExperts) {
      Check({shape, experts, Load::kUniform,
             Fewer<int64_t>({1, 2, 8, 33, 130, 700}, 3)});
    }
  }
}

TEST_P(MoeModelShapesTest, ZipfLoad) {
  for (Experts experts : {Experts::kAsX, Experts::kFp8Blocks}) {
    Check({Shapes()[0], experts, Load::kZipf,
           Fewer<int64_t>({4, 16, 64, 257, 1024})});
    Check({Shapes()[1], experts, Load::kZipf, {4096}});
  }
}

TEST_P(MoeModelShapesTest, OneExpert) {
  for (Experts experts : kAllExperts) {
    Check({Shapes()[1], experts, Load::kOneExpert,
           Fewer<int64_t>({1, 3, 13, 40, 300, 1100}, 3)});
  }
}

// Matrices that no kernel can read 16 bytes at a time, or that barely allow it.
TEST_P(MoeModelShapesTest, AnyAlignment) {
  const Shape shape = Shapes()[1];
  for (Experts experts : kAllExperts) {
    const int64_t chunk = IsFp8(experts) ? 16 : 8;  // elements of 16 bytes
    const std::vector<int64_t> tokens =
        Fewer<int64_t>({1, 40, SmallOr(40, 300)});
    const std::vector<int64_t> few_tokens = Fewer<int64_t>({1, 40}, 1);
    Check({shape, experts, Load::kUniform, tokens, 0, 16});
    Check({shape, experts, Load::kUniform, tokens, chunk, 16});
    Check({shape, experts, Load::kUniform, few_tokens, 0,
           IsFp8(experts) ? 1 : 2});
    Check({shape, experts, Load::kUniform, few_tokens, 1, 0});
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, MoeModelShapesTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::moe_test
