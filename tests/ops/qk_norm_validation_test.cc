#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/ops/qk_norm_fixture.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::PackedQkNorm;
using testing::QkNormConfig;
using testing::TestTensor;

class QkNormValidationTest : public testing::QkNormTest {};

TEST_P(QkNormValidationTest, Acceptance10_RefusesToRunWithoutBothWeights) {
  const PackedQkNorm packed = Make({});
  QkNormParams p = packed.params;
  p.q_weight = TensorView();
  testing::ExpectInvalid(QkNorm(p, stream()), {"QkNorm: q_weight is missing"});
  p = packed.params;
  p.k_weight = TensorView();
  testing::ExpectInvalid(QkNorm(p, stream()), {"QkNorm: k_weight is missing"});
  EXPECT_EQ(packed.qkv.Bytes(), packed.qkv.InitialBytes());
}

TEST_P(QkNormValidationTest, Acceptance04_RejectsBadArguments) {
  QkNormConfig c;
  c.gap = 8;
  PackedQkNorm packed = Make(c);
  AddRotary(&packed, 64);
  AddCache(&packed, dtype());
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    QkNormParams p = packed.params;
    change(p);
    parts.push_back("QkNorm: ");
    testing::ExpectInvalid(QkNorm(p, stream()), parts);
  };
  using P = QkNormParams;
  expect({"expected 0 without qkv"}, [](P& p) { p.qkv = TensorView(); });
  expect({"qkv", "rank 3"}, [](P& p) { p.qkv.rank = 3; });
  expect({"qkv", "int32"}, [](P& p) { p.qkv.dtype = DType::kInt32; });
  expect({"qkv", "null"}, [](P& p) { p.qkv.data = nullptr; });
  expect({"qkv", "share memory"}, [](P& p) { p.qkv.stride[0] = 8; });
  expect({"qkv", "2^63"}, [](P& p) { p.qkv.stride[0] = int64_t{1} << 62; });
  for (int32_t head_dim : {-128, 0, 1, 32, 96, 127, 512}) {
    expect({"head_dim is " + std::to_string(head_dim)},
           [&](P& p) { p.head_dim = head_dim; });
  }
  for (int32_t heads : {-1, 0, 65537}) {
    expect({"num_q_heads", std::to_string(heads)},
           [&](P& p) { p.num_q_heads = heads; });
    expect({"num_kv_heads", std::to_string(heads)},
           [&](P& p) { p.num_kv_heads = heads; });
  }
  expect({"q_offset is -1"}, [](P& p) { p.q_offset = -1; });
  expect({"q_offset", "do not fit", "columns"},
         [](P& p) { p.q_offset = p.qkv.shape[1] - 4 * 128 + 1; });
  expect({"k_offset", "do not fit"},
         [](P& p) { p.k_offset = p.qkv.shape[1] - 2 * 128 + 1; });
  expect({"v_offset", "do not fit"}, [](P& p) { p.v_offset = INT64_MAX; });
  expect({"q_offset", "do not fit"}, [](P& p) { p.num_q_heads = 20; });
  expect({"k overlaps q"}, [](P& p) { p.k_offset = p.q_offset + 511; });
  expect({"v overlaps k"}, [](P& p) { p.v_offset = p.k_offset; });
  expect({"q is given, although qkv is"}, [](P& p) { p.q = p.qkv; });
  expect({"k is given"}, [](P& p) { p.k = p.qkv; });
  expect({"v is given"}, [](P& p) { p.v = p.qkv; });
  expect({"q_weight", "[127]", "[128]"},
         [](P& p) { p.q_weight.shape[0] = 127; });
  expect({"k_weight", "dtype"}, [](P& p) {
    p.k_weight.dtype =
        p.qkv.dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
  });
  expect({"q_weight", "cuda:5"}, [](P& p) {
    p.q_weight.device = {DeviceType::kCuda, 5};
  });
  expect({"q_weight overlaps q"},
         [](P& p) { p.q_weight.data = p.qkv.As<char>() + 256; });
  expect({"epsilon is 0"}, [](P& p) { p.epsilon = 0.0f; });
  expect({"epsilon is -"}, [](P& p) { p.epsilon = -1e-6f; });
  expect({"epsilon is nan"}, [](P& p) { p.epsilon = NAN; });
  expect({"epsilon is inf"}, [](P& p) { p.epsilon = INFINITY; });
  expect({"rounding is 2"},
         [](P& p) { p.rounding = static_cast<NormRounding>(2); });
  EXPECT_EQ(packed.qkv.Bytes(), packed.qkv.InitialBytes());
  EXPECT_EQ(packed.k_cache.Bytes(), packed.k_cache.InitialBytes());
}

TEST_P(QkNormValidationTest, Acceptance04_RejectsBadRotary) {
  PackedQkNorm packed = Make({});
  AddRotary(&packed, 64);
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    QkNormParams p = packed.params;
    change(p.rotary);
    testing::ExpectInvalid(QkNorm(p, stream()), parts);
  };
  using R = RotaryParams;
  for (int32_t rotary_dim : {-2, 0, 1, 130, 256}) {
    expect({"rotary_dim is " + std::to_string(rotary_dim)},
           [&](R& r) { r.rotary_dim = rotary_dim; });
  }
  expect({"rotary_dim is 63", "even"}, [](R& r) { r.rotary_dim = 63; });
  expect({"cos_sin", "[37, 64]", "[*, 128]"}, [](R& r) { r.rotary_dim = 128; });
  expect({"cos_sin", "bfloat16", "float32"},
         [](R& r) { r.cos_sin.dtype = DType::kBFloat16; });
  expect({"cos_sin", "null"}, [](R& r) { r.cos_sin.data = nullptr; });
  expect({"positions is missing"}, [](R& r) { r.positions = TensorView(); });
  expect({"positions", "[4]", "[5]"}, [](R& r) { r.positions.shape[0] = 4; });
  expect({"positions", "float32"},
         [](R& r) { r.positions.dtype = DType::kFloat32; });
  expect({"positions is given, without cos_sin"}, [](R& r) {
    r.cos_sin = TensorView();
    r.rotary_dim = 0;
  });
  expect({"rotary_dim is 64 without cos_sin"}, [](R& r) {
    r.cos_sin = TensorView();
    r.positions = TensorView();
  });
  expect({"positions overlaps q"},
         [&](R& r) { r.positions.data = packed.params.qkv.As<char>() + 128; });
  EXPECT_EQ(packed.qkv.Bytes(), packed.qkv.InitialBytes());
}

TEST_P(QkNormValidationTest, Acceptance04_RejectsBadCache) {
  PackedQkNorm packed = Make({});
  AddCache(&packed, dtype());
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    QkNormParams p = packed.params;
    change(p.cache);
    testing::ExpectInvalid(QkNorm(p, stream()), parts);
  };
  using C = KvCacheWriteParams;
  expect({"v_cache is missing"}, [](C& c) { c.v_cache = TensorView(); });
  expect({"v_cache is given, without k_cache"},
         [](C& c) { c.k_cache = TensorView(); });
  expect({"slot_mapping is given"}, [](C& c) {
    c.k_cache = TensorView();
    c.v_cache = TensorView();
  });
  expect({"slot_mapping is missing"},
         [](C& c) { c.slot_mapping = TensorView(); });
  expect({"slot_mapping", "[4]", "[5]"},
         [](C& c) { c.slot_mapping.shape[0] = 4; });
  expect({"slot_mapping", "int32", "int64"},
         [](C& c) { c.slot_mapping.dtype = DType::kInt32; });
  expect({"k_cache", "rank 3"}, [](C& c) { c.k_cache.rank = 3; });
  expect({"k_cache", "[3, 3, 1, 128]", "[*, *, 2, 128]"},
         [](C& c) { c.k_cache.shape[2] = 1; });
  expect({"k_cache", "[3, 3, 2, 64]"}, [](C& c) { c.k_cache.shape[3] = 64; });
  expect({"k_cache", "uint8"}, [](C& c) { c.k_cache.dtype = DType::kUInt8; });
  expect({"k_cache", "share memory"}, [](C& c) { c.k_cache.stride[1] = 8; });
  expect({"v_cache", "[2, 3, 2, 128]", "[3, 3, 2, 128]"},
         [](C& c) { c.v_cache.shape[0] = 2; });
  expect({"v_cache", "dtype"},
         [](C& c) { c.v_cache.dtype = DType::kFloat8E4M3; });
  expect({"v_cache overlaps k_cache"},
         [](C& c) { c.v_cache.data = c.k_cache.data; });
  expect({"k_cache overlaps q"},
         [&](C& c) { c.k_cache.data = packed.params.qkv.data; });
  expect({"k_scale is 2", "expected 1"}, [](C& c) { c.k_scale = 2.0f; });
  expect({"v_scale is nan"}, [](C& c) { c.v_scale = NAN; });
  for (float scale : {0.0f, -1.0f, INFINITY, NAN}) {
    expect({"k_scale"}, [&](C& c) {
      c.k_cache.dtype = c.v_cache.dtype = DType::kFloat8E4M3;
      c.k_scale = scale;
    });
  }
  QkNormParams p = packed.params;
  p.num_kv_heads = 1;
  testing::ExpectInvalid(QkNorm(p, stream()), {"k_cache", "[*, *, 1,"});
  EXPECT_EQ(packed.qkv.Bytes(), packed.qkv.InitialBytes());
  EXPECT_EQ(packed.k_cache.Bytes(), packed.k_cache.InitialBytes());
  EXPECT_EQ(packed.v_cache.Bytes(), packed.v_cache.InitialBytes());
}

TEST_P(QkNormValidationTest, Acceptance04_RejectsBadStridedForm) {
  const PackedQkNorm packed = Make({});
  const TestTensor q(device(), dtype(), {5, 4, 128}, Normal(5 * 4 * 128, 1));
  const TestTensor k(device(), dtype(), {5, 2, 128}, Normal(5 * 2 * 128, 2));
  QkNormParams good = testing::Unpacked(packed.params);
  good.q = q.view();
  good.k = k.view();
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    QkNormParams p = good;
    change(p);
    testing::ExpectInvalid(QkNorm(p, stream()), parts);
  };
  using P = QkNormParams;
  expect({"q_offset is 128, expected 0 without qkv"},
         [](P& p) { p.q_offset = 128; });
  expect({"k_offset is -1"}, [](P& p) { p.k_offset = -1; });
  expect({"v_offset is 64"}, [](P& p) { p.v_offset = 64; });
  expect({"num_q_heads is 2, expected 0"}, [](P& p) { p.num_q_heads = 2; });
  expect({"num_kv_heads is 2, expected 0"}, [](P& p) { p.num_kv_heads = 2; });
  expect({"head_dim is 128, expected 0"}, [](P& p) { p.head_dim = 128; });
  expect({"k_scale is 2, expected 1"}, [](P& p) { p.cache.k_scale = 2.0f; });
  expect({"v_scale is 0, expected 1"}, [](P& p) { p.cache.v_scale = 0.0f; });
  expect({"k is missing"}, [](P& p) { p.k = TensorView(); });
  expect({"q", "rank 2"}, [](P& p) { p.q.rank = 2; });
  expect({"head_dim is 96"}, [](P& p) { p.q.shape[2] = 96; });
  expect({"k", "[5, 2, 64]", "[5, *, 128]"}, [](P& p) { p.k.shape[2] = 64; });
  expect({"k", "[4, 2, 128]", "[5, *, 128]"}, [](P& p) { p.k.shape[0] = 4; });
  expect({"num_kv_heads"}, [](P& p) { p.k.shape[1] = 0; });
  expect({"num_q_heads"}, [](P& p) { p.q.shape[1] = 0; });
  expect({"k", "dtype"}, [](P& p) {
    p.k.dtype =
        p.q.dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
  });
  expect({"k", "cuda:6"}, [](P& p) { p.k.device = {DeviceType::kCuda, 6}; });
  expect({"q", "share memory"}, [](P& p) { p.q.stride[1] = 64; });
  expect({"k overlaps q"}, [](P& p) { p.k.data = p.q.As<char>() + 256; });
  expect({"v is missing"}, [&](P& p) {
    p.cache.k_cache = p.cache.v_cache =
        MakeTensor(packed.qkv.view().data, p.q.dtype, device(), {1, 1, 2, 128});
  });
  EXPECT_EQ(q.Bytes(), q.InitialBytes());
  EXPECT_EQ(k.Bytes(), k.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, QkNormValidationTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
