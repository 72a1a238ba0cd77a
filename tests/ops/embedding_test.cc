#include "ops/embedding/embedding.h"

#include <gtest/gtest.h>

#include "tests/reference/embedding_reference.h"
#include "tests/testing/op_test.h"
#include "tests/testing/random.h"
#include "tests/testing/test_tensor.h"

namespace tenon {
namespace {

using testing::Normal;
using testing::TestTensor;

class EmbeddingTest : public testing::OpTest {
 protected:
  TestTensor Ids(const std::vector<int64_t>& ids, DType id_dtype) {
    return TestTensor::FromIntegers(device(), id_dtype,
                                    {static_cast<int64_t>(ids.size())}, ids);
  }
};

TEST_P(EmbeddingTest, CopiesRowsBitForBit) {
  for (const auto& [tokens, vocab, hidden, padding] :
       std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>{
           {1, 1, 1, 0},
           {13, 7, 1, 0},
           {3, 100, 13, 0},
           {111, 50, 111, 3},
           {5, 300, 128, 8},
           {64, 300, 2048, 0},
           {2, 9, 2056, 1},
           {3, 4, 5120, 16}}) {
    for (DType id_dtype : {DType::kInt32, DType::kInt64}) {
      SCOPED_TRACE(StrCat(tokens, " of ", vocab, "x", hidden, " padding ",
                          padding, " ids ", DTypeName(id_dtype)));
      const int64_t stride = hidden + padding;
      const auto ids = testing::UniformIntegers(tokens, 1, 0, vocab - 1);
      TestTensor id_tensor = Ids(ids, id_dtype);
      TestTensor table(device(), dtype(), {vocab, hidden}, {stride, 1},
                       Normal(vocab * hidden, 2));
      TestTensor out(device(), dtype(), {tokens, hidden}, {stride, 1}, {});
      const Status status =
          Embedding({id_tensor.view(), table.view(), out.view()}, stream());
      ASSERT_TRUE(status.ok()) << status.message();
      Finish();
      EXPECT_EQ(out.Values(), reference::Embedding(ids, table.InitialValues(),
                                                   vocab, hidden));
      EXPECT_EQ(out.NumStrayWrites(), 0);
      EXPECT_EQ(table.Bytes(), table.InitialBytes());
      EXPECT_EQ(id_tensor.Bytes(), id_tensor.InitialBytes());
    }
  }
}

TEST_P(EmbeddingTest, KeepsNanAndNegativeZero) {
  // Bytes of 0xff are a NaN with payload in every float dtype.
  TestTensor table(device(), dtype(), {2, 64}, std::vector<float>(64, -0.0f));
  TestTensor out(device(), dtype(), {2, 64}, std::vector<float>(128, 1.0f));
  TestTensor ids = Ids({1, 0}, DType::kInt64);
  ASSERT_TRUE(Embedding({ids.view(), table.view(), out.view()}, stream()).ok());
  Finish();
  const std::vector<uint8_t> from = table.Bytes();
  const std::vector<uint8_t> to = out.Bytes();
  const size_t row = 64 * DTypeSize(dtype());
  EXPECT_TRUE(std::equal(&from[256], &from[256 + row], &to[256 + row]));
  EXPECT_TRUE(std::equal(&from[256 + row], &from[256 + 2 * row], &to[256]));
}

TEST_P(EmbeddingTest, IdsOutsideTheTableGiveZeros) {
  constexpr int64_t kBeyond32Bits = (int64_t{1} << 32) + 1;
  for (int64_t hidden : {24, 13}) {
    TestTensor table(device(), dtype(), {3, hidden}, Normal(3 * hidden, 3));
    for (DType id_dtype : {DType::kInt32, DType::kInt64}) {
      std::vector<int64_t> ids = {2, -1, 3, 0, 2147483647, -2147483648LL};
      if (id_dtype == DType::kInt64) ids.push_back(kBeyond32Bits);
      TestTensor id_tensor = Ids(ids, id_dtype);
      const int64_t tokens = static_cast<int64_t>(ids.size());
      TestTensor out(device(), dtype(), {tokens, hidden});
      ASSERT_TRUE(
          Embedding({id_tensor.view(), table.view(), out.view()}, stream())
              .ok());
      Finish();
      EXPECT_EQ(out.Values(),
                reference::Embedding(ids, table.InitialValues(), 3, hidden));
    }
  }
}

TEST_P(EmbeddingTest, NegativeIdsNamePlacesInPrevious) {
  constexpr int64_t kHidden = 24;
  TestTensor table(device(), dtype(), {5, kHidden}, Normal(5 * kHidden, 3));
  TestTensor previous = Ids({3, -1, 4, 5}, DType::kInt32);
  const std::vector<int64_t> named = {1,  -2, -3, -4,           -5,
                                      -6, -1, 0,  -2147483648LL};
  const std::vector<int64_t> meant = {1, 3, -1, 4, 5, -1, -1, 0, -1};
  const auto tokens = static_cast<int64_t>(named.size());
  for (DType id_dtype : {DType::kInt32, DType::kInt64}) {
    TestTensor ids = Ids(named, id_dtype);
    TestTensor out(device(), dtype(), {tokens, kHidden});
    const EmbeddingParams p = {ids.view(), table.view(), out.view(),
                               previous.view()};
    ASSERT_TRUE(Embedding(p, stream()).ok());
    Finish();
    EXPECT_EQ(out.Values(),
              reference::Embedding(meant, table.InitialValues(), 5, kHidden));
  }
}

TEST_P(EmbeddingTest, UnalignedViews) {
  constexpr int64_t kHidden = 64;
  const auto ids = testing::UniformIntegers(9, 4, 0, 4);
  TestTensor id_tensor = Ids(ids, DType::kInt32);
  TestTensor table(device(), dtype(), {5, kHidden + 8},
                   Normal(5 * (kHidden + 8), 5));
  TestTensor out(device(), dtype(), {9, kHidden + 8},
                 std::vector<float>(9 * (kHidden + 8), 7.0f));
  EmbeddingParams p = {id_tensor.view(), Columns(table.view(), 1, kHidden),
                       Columns(out.view(), 3, kHidden)};
  ASSERT_TRUE(Embedding(p, stream()).ok());
  Finish();
  const std::vector<double> from = table.InitialValues();
  const std::vector<double> to = out.Values();
  for (int64_t t = 0; t < 9; ++t) {
    for (int64_t i = 0; i < kHidden + 8; ++i) {
      const bool inside = i >= 3 && i < 3 + kHidden;
      ASSERT_EQ(to[t * (kHidden + 8) + i],
                inside ? from[ids[t] * (kHidden + 8) + i - 2] : 7.0);
    }
  }
}

TEST_P(EmbeddingTest, ZeroTokensAndZeroVocabAreOk) {
  TestTensor table(device(), dtype(), {4, 8}, Normal(32, 6));
  TestTensor none(device(), dtype(), {0, 8});
  TestTensor no_ids = Ids({}, DType::kInt32);
  EXPECT_TRUE(
      Embedding({no_ids.view(), table.view(), none.view()}, stream()).ok());
  TestTensor out(device(), dtype(), {1, 8});
  TestTensor ids = Ids({0}, DType::kInt32);
  EXPECT_TRUE(Embedding({ids.view(), none.view(), out.view()}, stream()).ok());
  Finish();
  EXPECT_EQ(out.Values(), std::vector<double>(8, 0.0));
}

TEST_P(EmbeddingTest, RejectsBadArguments) {
  TestTensor ids = Ids({0, 1, 2, 3}, DType::kInt32);
  TestTensor table(device(), dtype(), {9, 64}, Normal(9 * 64, 7));
  TestTensor out(device(), dtype(), {4, 64});
  const EmbeddingParams good = {ids.view(), table.view(), out.view()};
  const auto expect = [&](std::vector<std::string> parts, auto&& change) {
    EmbeddingParams p = good;
    change(p);
    testing::ExpectInvalid(Embedding(p, stream()), parts);
  };
  expect({"Embedding", "ids is missing"},
         [](EmbeddingParams& p) { p.ids = TensorView(); });
  expect({"table is missing"},
         [](EmbeddingParams& p) { p.table = TensorView(); });
  expect({"out is missing"}, [](EmbeddingParams& p) { p.out = TensorView(); });
  expect({"ids", "[3]", "[4]"}, [](EmbeddingParams& p) { p.ids.shape[0] = 3; });
  expect({"ids", "float32", "int32 or int64"},
         [](EmbeddingParams& p) { p.ids.dtype = DType::kFloat32; });
  expect({"ids", "innermost stride 2"},
         [](EmbeddingParams& p) { p.ids.stride[0] = 2; });
  expect({"table", "[9, 63]", "[*, 64]"},
         [](EmbeddingParams& p) { p.table.shape[1] = 63; });
  expect({"table", "dtype"}, [](EmbeddingParams& p) {
    p.table.dtype =
        p.out.dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16;
  });
  expect({"table", "null"}, [](EmbeddingParams& p) { p.table.data = nullptr; });
  expect({"table", "cuda:3"}, [](EmbeddingParams& p) {
    p.table.device = {DeviceType::kCuda, 3};
  });
  expect({"out", "uint8"},
         [](EmbeddingParams& p) { p.out.dtype = DType::kUInt8; });
  expect({"out", "share memory"},
         [](EmbeddingParams& p) { p.out.stride[0] = 8; });
  expect({"hidden", "0"}, [](EmbeddingParams& p) { p.out.shape[1] = 0; });
  expect({"out overlaps table"},
         [](EmbeddingParams& p) { p.out = Rows(p.table, 3, 4); });
  expect({"previous", "int64"}, [](EmbeddingParams& p) {
    p.previous = p.ids;
    p.previous.dtype = DType::kInt64;
  });
  expect({"out overlaps previous"}, [](EmbeddingParams& p) {
    p.previous = p.ids;
    p.previous.data = p.out.data;
  });
  expect({"out overlaps ids"}, [](EmbeddingParams& p) {
    p.ids.data = p.out.data;
    p.ids.dtype = DType::kInt32;
  });
  EXPECT_EQ(out.Bytes(), out.InitialBytes());
}

INSTANTIATE_TEST_SUITE_P(Targets, EmbeddingTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon
