#include "engine/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/safetensors.h"
#include "tests/engine/mutate.h"
#include "tests/testing/checkpoint_files.h"

namespace tenon {
namespace {

using testing::FileTensor;
using testing::SafetensorsFile;
using testing::TempDirectory;

constexpr char kSource[] = "dir/model.safetensors";

FileTensor Floats(const std::string& name, std::vector<int64_t> shape) {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(0.5f * i);
  return testing::MakeFileTensor(name, DType::kFloat32, std::move(shape),
                                 values);
}

// Parses from memory of exactly the file's size, so that a sanitizer sees any
// read past it. Aligned, as a mapped file is.
StatusOr<std::vector<StoredTensor>> Parse(const std::string& file,
                                          std::unique_ptr<char[]>* memory) {
  memory->reset(new char[file.size()]);
  std::copy(file.begin(), file.end(), memory->get());
  return ParseSafetensors(memory->get(), file.size(), kSource);
}

void ExpectDataLoss(const std::string& file,
                    const std::vector<std::string>& parts) {
  std::unique_ptr<char[]> memory;
  const auto tensors = Parse(file, &memory);
  ASSERT_FALSE(tensors.ok()) << "expected an error that names " << parts[0];
  EXPECT_EQ(tensors.status().code(), StatusCode::kDataLoss);
  const std::string message = tensors.status().message();
  EXPECT_EQ(message.find(kSource), 0u) << message;
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos)
        << "\"" << message << "\" does not name \"" << part << "\"";
  }
}

// A file with one tensor "a" of the given description, and 16 bytes of data.
std::string OneTensor(const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
  std::string header = "{\"a\":{\"dtype\":" + dtype + ",\"shape\":" + shape +
                       ",\"data_offsets\":" + offsets + "}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return SafetensorsFile(header, std::string(16, 'x'));
}

// The same with two tensors of 8 bytes.
std::string TwoTensors(const std::string& offsets_a,
                       const std::string& offsets_b, size_t data_bytes = 16) {
  std::string header =
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + offsets_a +
      R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + offsets_b + "}}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return SafetensorsFile(header, std::string(data_bytes, 'x'));
}

TEST(SafetensorsTest, ReadsAWellFormedFile) {
  const std::string file =
      SafetensorsFile({{"double", "F64", {1}, "12345678"},
                       Floats("m", {2, 3}),
                       Floats("empty", {0, 4}),
                       Floats("scalar", {}),
                       {"bytes", "U8", {8}, "12345678"},
                       {"eight", "F8_E4M3", {2, 2}, "abcd"}});
  std::unique_ptr<char[]> memory;
  const auto tensors = Parse(file, &memory);
  ASSERT_TRUE(tensors.ok()) << tensors.status().message();
  ASSERT_EQ(tensors->size(), 6u);
  const auto find = [&](const std::string& name) {
    const auto it =
        std::find_if(tensors->begin(), tensors->end(),
                     [&](const StoredTensor& t) { return t.name == name; });
    EXPECT_NE(it, tensors->end()) << name;
    return *it;
  };
  const TensorView m = find("m").view;
  EXPECT_EQ(m.rank, 2);
  EXPECT_EQ(m.shape[0], 2);
  EXPECT_EQ(m.stride[0], 3);
  EXPECT_EQ(m.stride[1], 1);
  EXPECT_EQ(m.dtype, DType::kFloat32);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(m.As<float>()[i], 0.5f * i);
  EXPECT_EQ(ShapeToString(find("empty").view), "[0, 4]");
  EXPECT_EQ(ShapeToString(find("scalar").view), "[1]");
  EXPECT_EQ(find("double").view.dtype, DType::kInvalid);
  EXPECT_EQ(find("double").stored_dtype, "F64");
  EXPECT_EQ(find("eight").view.dtype, DType::kFloat8E4M3);
}

TEST(SafetensorsTest, ReadsAFileWithoutTensors) {
  std::unique_ptr<char[]> memory;
  const auto tensors = Parse(SafetensorsFile("{}", ""), &memory);
  ASSERT_TRUE(tensors.ok()) << tensors.status().message();
  EXPECT_TRUE(tensors->empty());
}

TEST(SafetensorsTest, RejectsEveryTruncation) {
  const std::string file =
      SafetensorsFile({Floats("a", {4, 4}), Floats("b", {3})});
  for (size_t size = 0; size < file.size(); ++size) {
    ExpectDataLoss(file.substr(0, size), {"bytes"});
  }
  ExpectDataLoss(file + "x", {"bytes of data"});
}

TEST(SafetensorsTest, RejectsBadHeaders) {
  std::string file = SafetensorsFile({Floats("a", {2})});
  file[7] = '\x7f';  // a length near 2^63
  ExpectDataLoss(file, {"header of", "at most 100000000"});
  file = SafetensorsFile({Floats("a", {2})});
  file[2] = '\x01';
  ExpectDataLoss(file, {"goes beyond the file"});
  ExpectDataLoss(SafetensorsFile("", ""), {"header", "not valid JSON"});
  ExpectDataLoss(SafetensorsFile("[]", ""), {"not a JSON object"});
  ExpectDataLoss(SafetensorsFile("{\"a\":", ""), {"not valid JSON"});
  ExpectDataLoss(SafetensorsFile("{\"a\": 3}", ""), {"\"a\"", "not an object"});
  ExpectDataLoss(SafetensorsFile("{\"a\": {}}", ""), {"\"a\"", "no dtype"});
  ExpectDataLoss(SafetensorsFile("{\"a\": {}, \"a\": {}}", ""), {"twice"});
  ExpectDataLoss(SafetensorsFile(std::string(1000, '['), ""), {"nested"});
}

TEST(SafetensorsTest, RejectsBadTensors) {
  std::unique_ptr<char[]> memory;
  ASSERT_TRUE(Parse(OneTensor("\"F32\"", "[4]", "[0,16]"), &memory).ok());
  ExpectDataLoss(OneTensor("\"F33\"", "[4]", "[0,16]"), {"\"a\"", "F33"});
  ExpectDataLoss(OneTensor("32", "[4]", "[0,16]"), {"\"a\"", "dtype"});
  ExpectDataLoss(OneTensor("\"F32\"", "4", "[0,16]"), {"\"a\"", "shape"});
  ExpectDataLoss(OneTensor("\"F32\"", "[-4]", "[0,16]"), {"\"a\"", "shape"});
  ExpectDataLoss(OneTensor("\"F32\"", "[4.0]", "[0,16]"), {"\"a\"", "shape"});
  ExpectDataLoss(OneTensor("\"F32\"", "[1,1,1,1,4]", "[0,16]"),
                 {"\"a\"", "5 dimensions"});
  ExpectDataLoss(OneTensor("\"F32\"", "[3]", "[0,16]"),
                 {"\"a\"", "[3]", "16 bytes", "12"});
  ExpectDataLoss(OneTensor("\"BF16\"", "[4]", "[0,16]"), {"\"a\"", "BF16"});
  ExpectDataLoss(OneTensor("\"F32\"", "[4294967296,4294967296]", "[0,16]"),
                 {"\"a\"", "2^63"});
  ExpectDataLoss(
      OneTensor("\"F32\"", "[0,4611686018427387904,4611686018427387904]",
                "[0,0]"),
      {"\"a\"", "2^63"});
  // 2^62 floats are 2^64 bytes, which a 64-bit product makes zero.
  ExpectDataLoss(OneTensor("\"F32\"", "[4611686018427387904]", "[0,0]"),
                 {"\"a\"", "2^63"});
}

TEST(SafetensorsTest, RejectsBadOffsets) {
  for (const char* offsets : {"[0,20]", "[-4,12]", "[16,0]", "[4,20]",
                              "[9223372036854775807,9223372036854775807]"}) {
    ExpectDataLoss(OneTensor("\"F32\"", "[4]", offsets),
                   {"\"a\"", "data_offsets", "not within"});
  }
  for (const char* offsets : {"[0]", "[0,16,16]", "16", "[0,\"16\"]",
                              "[0,16.0]", "null", "[0,18446744073709551615]"}) {
    ExpectDataLoss(OneTensor("\"F32\"", "[4]", offsets),
                   {"\"a\"", "data_offsets"});
  }
}

TEST(SafetensorsTest, RejectsOverlapsAndHoles) {
  std::unique_ptr<char[]> memory;
  ASSERT_TRUE(Parse(TwoTensors("[0,8]", "[8,16]"), &memory).ok());
  ASSERT_TRUE(Parse(TwoTensors("[8,16]", "[0,8]"), &memory).ok());
  ExpectDataLoss(TwoTensors("[0,8]", "[4,12]", 12), {"\"b\"", "overlaps", "a"});
  ExpectDataLoss(TwoTensors("[0,8]", "[0,8]", 8), {"overlaps"});
  ExpectDataLoss(TwoTensors("[0,8]", "[12,20]", 20),
                 {"\"b\"", "12", "expected 8"});
  ExpectDataLoss(TwoTensors("[4,12]", "[12,20]", 20), {"\"a\"", "expected 0"});
  ExpectDataLoss(TwoTensors("[0,8]", "[8,16]", 24), {"24", "16"});
}

TEST(SafetensorsTest, RejectsMisalignedData) {
  const std::string file =
      SafetensorsFile({{"odd", "U8", {1}, "1"}, Floats("misaligned", {2})});
  ExpectDataLoss(file, {"\"misaligned\"", "not aligned"});
}

TEST(SafetensorsTest, MutatedFilesNeverCrash) {
  const std::string good =
      SafetensorsFile({Floats("model.a.weight", {4, 3}),
                       Floats("model.b.weight", {5}),
                       {"c", "BF16", {2, 2, 2}, std::string(16, '\x3f')}});
  std::mt19937_64 rng(2);
  int accepted = 0;
  int sum = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string file = testing::Mutate(good, &rng);
    std::unique_ptr<char[]> memory;
    const auto tensors = Parse(file, &memory);
    if (!tensors.ok()) {
      EXPECT_EQ(std::string(tensors.status().message()).find(kSource), 0u)
          << tensors.status().message();
      continue;
    }
    ++accepted;
    for (const StoredTensor& tensor : *tensors) {  // every byte is readable
      const char* data = tensor.view.As<const char>();
      for (int64_t j = 0; j < tensor.bytes; ++j) sum += data[j];
    }
  }
  EXPECT_GT(accepted, 100) << sum;
  EXPECT_LT(accepted, 19000);
}

class CheckpointTest : public ::testing::Test {
 protected:
  void WriteIndex(const std::string& weight_map) {
    directory_.Write("model.safetensors.index.json",
                     "{\"metadata\": {}, \"weight_map\": " + weight_map + "}");
  }
  void WriteShards() {
    directory_.Write("model-1.safetensors",
                     SafetensorsFile({Floats("a", {2}), Floats("b", {3})}));
    directory_.Write("model-2.safetensors",
                     SafetensorsFile({Floats("c", {4})}));
    WriteIndex(R"({"a": "model-1.safetensors", "b": "model-1.safetensors",
                   "c": "model-2.safetensors"})");
  }
  void ExpectError(StatusCode code, const std::vector<std::string>& parts) {
    const auto checkpoint = Checkpoint::Open(directory_.path());
    ASSERT_FALSE(checkpoint.ok()) << "expected an error naming " << parts[0];
    EXPECT_EQ(checkpoint.status().code(), code);
    const std::string message = checkpoint.status().message();
    EXPECT_NE(message.find(directory_.path()), std::string::npos) << message;
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "\"" << message << "\" does not name \"" << part << "\"";
    }
  }

  TempDirectory directory_;
};

TEST_F(CheckpointTest, OpensASingleFile) {
  directory_.Write(
      "model.safetensors",
      SafetensorsFile({Floats("a", {2, 2}), {"d", "F64", {1}, "12345678"}}));
  const auto checkpoint = Checkpoint::Open(directory_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  const StatusOr<TensorView> a = (*checkpoint)->Find("a");
  ASSERT_TRUE(a.ok());
  EXPECT_EQ(a->As<float>()[3], 1.5f);
  EXPECT_EQ((*checkpoint)->names(), (std::vector<std::string>{"a", "d"}));
  EXPECT_EQ((*checkpoint)->total_bytes(), 24);
  EXPECT_EQ((*checkpoint)->FileOf("a"),
            directory_.path() + "/model.safetensors");

  const Status missing = (*checkpoint)->Find("b").status();
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_NE(std::string(missing.message()).find("\"b\""), std::string::npos);
  const Status unsupported = (*checkpoint)->Find("d").status();
  EXPECT_EQ(unsupported.code(), StatusCode::kUnimplemented);
  EXPECT_NE(std::string(unsupported.message()).find("F64"), std::string::npos);
}

TEST_F(CheckpointTest, OpensShards) {
  WriteShards();
  const auto checkpoint = Checkpoint::Open(directory_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ((*checkpoint)->names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ((*checkpoint)->total_bytes(), 36);
  const StatusOr<TensorView> c = (*checkpoint)->Find("c");
  ASSERT_TRUE(c.ok());
  EXPECT_EQ(c->As<float>()[3], 1.5f);
  EXPECT_EQ((*checkpoint)->FileOf("c"),
            directory_.path() + "/model-2.safetensors");
}

TEST_F(CheckpointTest, TheIndexDecidesWhichShardHasATensor) {
  WriteShards();
  directory_.Write("model-2.safetensors",
                   SafetensorsFile({Floats("c", {4}), Floats("a", {7})}));
  const auto checkpoint = Checkpoint::Open(directory_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ((*checkpoint)->names().size(), 3u);
  EXPECT_EQ((*checkpoint)->Find("a")->shape[0], 2);
}

TEST_F(CheckpointTest, RejectsBadDirectories) {
  ExpectError(StatusCode::kNotFound,
              {"model.safetensors", "model.safetensors.index.json"});
  directory_.Write("model.safetensors", "");
  ExpectError(StatusCode::kDataLoss, {"model.safetensors", "0 bytes"});
  directory_.Write("model.safetensors", "short");
  ExpectError(StatusCode::kDataLoss, {"model.safetensors", "5 bytes"});
  directory_.Remove("model.safetensors");
  std::filesystem::create_directory(directory_.path() + "/model.safetensors");
  ExpectError(StatusCode::kInvalidArgument, {"not a regular file"});
}

TEST_F(CheckpointTest, RejectsBadShards) {
  WriteShards();
  directory_.Remove("model-2.safetensors");
  ExpectError(StatusCode::kNotFound, {"model-2.safetensors", "index.json"});

  directory_.Write("model-2.safetensors", SafetensorsFile({Floats("d", {4})}));
  ExpectError(StatusCode::kDataLoss,
              {"model-2.safetensors", "\"c\"", "index.json"});

  std::string truncated = SafetensorsFile({Floats("c", {4})});
  truncated.pop_back();
  directory_.Write("model-2.safetensors", truncated);
  ExpectError(StatusCode::kDataLoss, {"model-2.safetensors", "\"c\""});
}

TEST_F(CheckpointTest, RejectsBadIndexes) {
  WriteShards();
  for (const char* text : {"", "[]", "{}", "{\"weight_map\": []}"}) {
    directory_.Write("model.safetensors.index.json", text);
    ExpectError(StatusCode::kDataLoss, {"index.json"});
  }
  WriteIndex("{\"a\": \"model-1.safetensors\", \"a\": \"x.safetensors\"}");
  ExpectError(StatusCode::kDataLoss, {"index.json", "\"a\"", "twice"});
  WriteIndex("{\"a\": 3}");
  ExpectError(StatusCode::kDataLoss, {"index.json", "\"a\""});
}

TEST_F(CheckpointTest, ShardNamesStayInTheDirectory) {
  WriteShards();
  TempDirectory other;
  other.Write("model.safetensors", SafetensorsFile({Floats("a", {2})}));
  const std::string outside = other.path() + "/model.safetensors";
  for (const std::string& name :
       {outside, std::string("../") + outside, std::string("./x"),
        std::string("sub/x.safetensors"), std::string(".."), std::string("."),
        std::string(), std::string("model-1.safetensors\\u0000x")}) {
    WriteIndex("{\"a\": \"" + name + "\"}");
    ExpectError(StatusCode::kDataLoss, {"index.json", "\"a\"", "directory"});
  }
}

TEST_F(CheckpointTest, MutatedDirectoriesNeverCrash) {
  const std::string shard =
      SafetensorsFile({Floats("a", {2}), Floats("b", {3})});
  const std::string index =
      R"({"weight_map": {"a": "model-1.safetensors",
                         "b": "model-1.safetensors"}})";
  std::mt19937_64 rng(3);
  int accepted = 0;
  for (int i = 0; i < 500; ++i) {
    const bool of_index = i % 2 == 0;
    directory_.Write("model-1.safetensors",
                     of_index ? shard : testing::Mutate(shard, &rng));
    directory_.Write("model.safetensors.index.json",
                     of_index ? testing::Mutate(index, &rng) : index);
    const auto checkpoint = Checkpoint::Open(directory_.path());
    if (checkpoint.ok()) {
      ++accepted;
    } else {
      EXPECT_NE(
          std::string(checkpoint.status().message()).find(directory_.path()),
          std::string::npos)
          << checkpoint.status().message();
    }
  }
  EXPECT_GT(accepted, 5);
}

TEST_F(CheckpointTest, OpensTheGoldenCheckpoints) {
  const auto sharded = Checkpoint::Open("tests/golden/qwen3_moe_sharded");
  ASSERT_TRUE(sharded.ok()) << sharded.status().message();
  EXPECT_EQ((*sharded)->total_bytes(), 516480);  // as its index says
  const auto dense = Checkpoint::Open("tests/golden/qwen3_dense_tiny");
  ASSERT_TRUE(dense.ok()) << dense.status().message();
  const StatusOr<TensorView> embedding =
      (*dense)->Find("model.embed_tokens.weight");
  ASSERT_TRUE(embedding.ok());
  EXPECT_EQ(ShapeToString(*embedding), "[131, 64]");
  EXPECT_EQ(embedding->dtype, DType::kFloat32);
}

}  // namespace
}  // namespace tenon
