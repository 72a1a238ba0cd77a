#include "engine/moe_kernel_file.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <random>
#include <string>

#include "tests/engine/mutate.h"
#include "tests/testing/shapes.h"
#include "tools/tune/moe_kernel_header.h"

namespace tenon {
namespace {

constexpr char kText[] = R"({
  "format": "tenon-moe-kernels-1",
  "device": "a GPU",
  "source": "a \"test\"",
  "float8": [
    {"max_hidden": 2048, "max_intermediate": 768, "max_slots_per_expert": 0.5,
     "gate_up": {"token_tile": 8, "row_warpgroups": 1, "blocks_per_sm": 1},
     "down": {"token_tile": 32, "row_warpgroups": 2, "blocks_per_sm": 1},
     "mma_tile_rows": 16},
    {"max_hidden": 2048, "max_intermediate": 768, "max_slots_per_expert": null,
     "gate_up": {"token_tile": 128, "row_warpgroups": 2, "blocks_per_sm": 1},
     "down": {"token_tile": 128, "row_warpgroups": 2, "blocks_per_sm": 1},
     "mma_tile_rows": 64}
  ]
}
)";

std::string Replaced(const std::string& from, const std::string& to) {
  std::string text = kText;
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

void ExpectRejected(const std::string& text, const std::string& part) {
  const StatusOr<MoeKernelFile> file = ParseMoeKernelFile(text, "kernels.json");
  ASSERT_FALSE(file.ok()) << text;
  EXPECT_EQ(file.status().code(), StatusCode::kInvalidArgument);
  const std::string message = file.status().message();
  EXPECT_EQ(message.rfind("kernels.json", 0), 0u) << message;
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

void ExpectEqual(const std::vector<MoeKernelRow>& a,
                 const std::vector<MoeKernelRow>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].max_hidden, b[i].max_hidden);
    EXPECT_EQ(a[i].max_intermediate, b[i].max_intermediate);
    EXPECT_EQ(a[i].max_slots_per_expert, b[i].max_slots_per_expert);
    EXPECT_EQ(a[i].config, b[i].config);
  }
}

void ExpectEqual(const MoeKernelFile& a, const MoeKernelFile& b) {
  EXPECT_EQ(a.device, b.device);
  EXPECT_EQ(a.source, b.source);
  ExpectEqual(a.float32, b.float32);
  ExpectEqual(a.float16, b.float16);
  ExpectEqual(a.float8, b.float8);
}

MoeKernelFile Parsed(const std::string& text) {
  StatusOr<MoeKernelFile> file = ParseMoeKernelFile(text, "kernels.json");
  EXPECT_TRUE(file.ok()) << file.status().message();
  return file.ok() ? *std::move(file) : MoeKernelFile();
}

TEST(MoeKernelFileTest, ReadsEveryField) {
  const MoeKernelFile file = Parsed(kText);
  EXPECT_EQ(file.device, "a GPU");
  EXPECT_EQ(file.source, "a \"test\"");
  EXPECT_TRUE(file.float32.empty());
  EXPECT_TRUE(file.float16.empty());
  ASSERT_EQ(file.float8.size(), 2u);
  const MoeKernelRow& row = file.float8[0];
  EXPECT_EQ(row.max_hidden, 2048);
  EXPECT_EQ(row.max_intermediate, 768);
  EXPECT_EQ(row.max_slots_per_expert, 0.5);
  EXPECT_EQ(row.config.gate_up, (MoeWgmmaTile{8, 1, 1}));
  EXPECT_EQ(row.config.down, (MoeWgmmaTile{32, 2, 1}));
  EXPECT_EQ(row.config.mma_tile_rows, 16);
  EXPECT_EQ(file.float8[1].max_slots_per_expert, MoeKernelRow::kAnyLoad);

  const MoeKernelTable table = file.table();
  EXPECT_EQ(table.float16.count, 0);
  const MoeKernelConfig choice = ChooseMoeKernel(
      MoeGpu::kH100, &table, {DType::kFloat8E4M3, 2048, 768, 0.5});
  EXPECT_EQ(choice, row.config);
}

TEST(MoeKernelFileTest, WhatIsWrittenReadsBackTheSame) {
  const MoeKernelFile file = Parsed(kText);
  ExpectEqual(Parsed(FormatMoeKernelFile(file)), file);
  MoeKernelTables built_in = BuiltInMoeKernelTables();
  for (MoeGpu gpu : {MoeGpu::kOther, MoeGpu::kH100, MoeGpu::kH200}) {
    ExpectEqual(Parsed(FormatMoeKernelFile(built_in.Of(gpu))),
                built_in.Of(gpu));
  }
}

TEST(MoeKernelFileTest, NumbersReadBackTheSame) {
  for (double value : {0.0625, 0.05, 1.0 / 3.0, 1e300, 12.0, 1e-300}) {
    EXPECT_EQ(std::strtod(ShortestDecimal(value).c_str(), nullptr), value);
  }
  EXPECT_EQ(ShortestDecimal(0.05), "0.05");
}

TEST(MoeKernelFileTest, RejectsWhatIsNotATable) {
  ExpectRejected("", "");
  ExpectRejected("[]", "is not an object");
  ExpectRejected("{}", "format is missing");
  ExpectRejected(Replaced("kernels-1", "kernels-2"), "format is tenon");
  ExpectRejected(Replaced("\"device\": \"a GPU\",", ""), "device is missing");
  ExpectRejected(Replaced("\"a GPU\"", "1"), "device is not a string");
  ExpectRejected(Replaced("\"float8\"", "\"float4\""), "unknown key float4");
  ExpectRejected(Replaced("\"mma_tile_rows\": 16",
                          "\"mma_tile_rows\": 16, \"mma_tile_cols\": 16"),
                 "float8 row 0: unknown key mma_tile_cols");
  ExpectRejected(Replaced(", \"blocks_per_sm\": 1", ""),
                 "float8 row 0: gate_up: blocks_per_sm is missing");
  ExpectRejected(Replaced("\"max_hidden\": 2048,", ""),
                 "float8 row 0: max_hidden is missing");
  ExpectRejected(Replaced("2048", "2048.5"), "max_hidden is not an integer");
  ExpectRejected(Replaced("0.5", "\"0.5\""),
                 "max_slots_per_expert is not a number");
  ExpectRejected(Replaced("\"token_tile\": 8", "\"token_tile\": 1e1"),
                 "token_tile is not a count");
  ExpectRejected(Replaced("\"token_tile\": 8", "\"token_tile\": -8"),
                 "token_tile is not a count");
  ExpectRejected(Replaced("\"token_tile\": 8", "\"token_tile\": 4294967304"),
                 "token_tile is not a count");
  ExpectRejected(Replaced("{\"token_tile\": 8, \"row_warpgroups\": 1, "
                          "\"blocks_per_sm\": 1}",
                          "[]"),
                 "gate_up is not an object");
}

TEST(MoeKernelFileTest, RejectsRowsThatCannotBeUsed) {
  ExpectRejected(Replaced("\"token_tile\": 8", "\"token_tile\": 12"),
                 "float8 row 0: gate_up has no kernel of token_tile 12");
  ExpectRejected(Replaced("\"mma_tile_rows\": 16", "\"mma_tile_rows\": 0"),
                 "no kernel has mma_tile_rows 0");
  ExpectRejected(Replaced("0.5", "null"), "does not ascend");
  ExpectRejected(Replaced("0.5", "-0.5"), "not positive");
  ExpectRejected(Replaced("2048", "4096"), "float8 row 0");
  std::string rows = Replaced("", "");
  const size_t begin = rows.find("    {\"max_hidden\"");
  const size_t end = rows.find("    {\"max_hidden\"", begin + 1);
  std::string many;
  for (int i = 0; i < 5000; ++i) many += rows.substr(begin, end - begin);
  ExpectRejected(rows.substr(0, begin) + many + rows.substr(begin),
                 "float8 has 5002 rows");
}

TEST(MoeKernelFileTest, SurvivesAnyDamage) {
  int accepted = 0;
  std::mt19937_64 rng(1);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = testing::Mutate(kText, &rng);
    const StatusOr<MoeKernelFile> file = ParseMoeKernelFile(text, "x");
    if (!file.ok()) continue;
    ++accepted;
    EXPECT_TRUE(CheckMoeKernelTable("x", file->table()).ok());
  }
  EXPECT_LT(accepted, 3000);
}

TEST(MoeKernelFileTest, ReadsFilesAndNamesThem) {
  const std::string path = ::testing::TempDir() + "/moe_kernels.json";
  std::ofstream(path) << kText;
  EXPECT_TRUE(ReadMoeKernelFile(path).ok());
  const StatusOr<MoeKernelFile> none = ReadMoeKernelFile(path + ".not");
  EXPECT_EQ(none.status().code(), StatusCode::kNotFound);
  EXPECT_NE(std::string(none.status().message()).find(path), std::string::npos);
}

std::string FileText(const char* path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

TEST(MoeKernelHeaderTest, TheHeaderIsWhatTheToolWrites) {
  const std::string text = FileText("ops/moe/moe_kernel_table.h");
  ASSERT_FALSE(text.empty());
  EXPECT_EQ(FormatMoeKernelHeader(BuiltInMoeKernelTables()), text);
}

MoeKernelRow Row(int64_t hidden, double load, int32_t mma_tile_rows) {
  MoeKernelRow row;
  row.max_hidden = hidden;
  row.max_intermediate = 768;
  row.max_slots_per_expert = load;
  row.config.mma_tile_rows = mma_tile_rows;
  return row;
}

TEST(MoeKernelHeaderTest, MeasuredRowsReplaceThoseOfTheSameSizes) {
  constexpr double kAny = MoeKernelRow::kAnyLoad;
  const std::vector<MoeKernelRow> base = {
      Row(1024, kAny, 16), Row(2048, 1.0, 16), Row(2048, kAny, 16),
      Row(4096, kAny, 16)};
  const std::vector<MoeKernelRow> measured = {
      Row(2048, 4.0, 64), Row(2048, kAny, 128), Row(3072, kAny, 64)};
  ExpectEqual(MergeMoeKernelRows(base, measured),
              {Row(1024, kAny, 16), Row(2048, 4.0, 64), Row(2048, kAny, 128),
               Row(3072, kAny, 64), Row(4096, kAny, 16)});
}

constexpr double kLoads[] = {0.01, 0.0625, 0.5,  1.0, 3.9, 4.0, 4.1, 11.0,
                             12.0, 13.0,   24.0, 25., 191, 192, 193, 1e9};

MoeKernelConfig BuiltInAt(double load) {
  return ChooseMoeKernel(MoeGpu::kOther, nullptr,
                         {DType::kBFloat16, 2048, 768, load});
}

// What a call gets that finds these rows in a tuned table.
void ExpectChoices(
    const std::vector<MoeMeasurement>& measured,
    const std::function<MoeKernelConfig(double load)>& expected) {
  MoeKernelFile file;
  file.float16 =
      MoeKernelRowsFrom(MoeGpu::kOther, DType::kBFloat16, 2048, 768, measured);
  const MoeKernelTable table = file.table();
  const Status status = CheckMoeKernelTable("table", table);
  ASSERT_TRUE(status.ok()) << status.message();
  for (double load : kLoads) {
    const int32_t row =
        FindMoeKernelRow(table, {DType::kBFloat16, 2048, 768, load});
    ASSERT_GE(row, 0) << load;
    EXPECT_EQ(file.float16[row].config, expected(load)) << load;
  }
}

TEST(MoeKernelHeaderTest, WhatWasNotBetterStaysAsItWas) {
  ExpectChoices({}, BuiltInAt);
  ExpectChoices({{0.5, std::nullopt}, {16.0, std::nullopt}}, BuiltInAt);
}

TEST(MoeKernelHeaderTest, WhatWasBetterHoldsDownToTheMeasurementBefore) {
  MoeKernelConfig better;
  better.down = {8, 1, 1};
  better.mma_tile_rows = 128;
  ExpectChoices({{0.5, std::nullopt}, {16.0, better}}, [&](double load) {
    return load > 0.5 && load <= 16.0 ? better : BuiltInAt(load);
  });
  ExpectChoices(
      {{0.5, better}, {1.0, better}, {300.0, std::nullopt}},
      [&](double load) { return load <= 1.0 ? better : BuiltInAt(load); });
}

// What a run of tools/tune could have found, of some of the token counts.
std::vector<MoeMeasurement> RandomMeasurements(DType dtype,
                                               const testing::ModelShape& shape,
                                               std::mt19937_64* rng) {
  const auto one_in = [&](uint64_t n) { return (*rng)() % n == 0; };
  const auto tile = [&] {
    return kMoeWgmmaTiles[(*rng)() % std::size(kMoeWgmmaTiles)];
  };
  std::vector<MoeMeasurement> measured;
  for (int64_t tokens : {1, 2, 8, 64, 100, 256, 1024, 4096, 16384}) {
    if (one_in(4)) continue;
    MoeMeasurement m;
    m.slots_per_expert =
        static_cast<double>(tokens * shape.top_k) / shape.num_experts;
    if (one_in(2)) m.better = {tile(), tile(), one_in(2) ? 16 : 64};
    if (m.better && HasMoeMmaTile(dtype, 128) && one_in(3)) {
      m.better->mma_tile_rows = 128;
    }
    measured.push_back(m);
  }
  return measured;
}

TEST(MoeKernelHeaderTest, AnyMeasurementsMakeAUsableTable) {
  std::mt19937_64 rng(1);
  for (int i = 0; i < 100; ++i) {
    const MoeGpu gpu = i % 2 == 0 ? MoeGpu::kH100 : MoeGpu::kH200;
    MoeKernelFile file;
    for (DType dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
      auto& rows = dtype == DType::kBFloat16 ? file.float16 : file.float8;
      for (const testing::ModelShape& shape : testing::kModelShapes) {
        const std::vector<MoeMeasurement> measured =
            RandomMeasurements(dtype, shape, &rng);
        if (measured.empty()) continue;
        rows = MergeMoeKernelRows(
            rows, MoeKernelRowsFrom(gpu, dtype, shape.hidden,
                                    shape.intermediate, measured));
        const MoeKernelTable table = file.table();
        for (const MoeMeasurement& m : measured) {
          const MoeKernelQuery query = {dtype, shape.hidden, shape.intermediate,
                                        m.slots_per_expert};
          EXPECT_EQ(
              ChooseMoeKernel(gpu, &table, query),
              m.better ? *m.better : ChooseMoeKernel(gpu, nullptr, query));
        }
      }
    }
    ExpectEqual(Parsed(FormatMoeKernelFile(file)), file);
    MoeKernelTables tables = BuiltInMoeKernelTables();
    MergeMoeKernelFile(file, &tables.Of(gpu));
    const Status status = CheckMoeKernelTable("merged", tables.Of(gpu).table());
    ASSERT_TRUE(status.ok()) << status.message();
  }
}

TEST(MoeKernelHeaderTest, TheSourceIsThatOfTheRowsThatAreThere) {
  constexpr double kAny = MoeKernelRow::kAnyLoad;
  const MoeKernelFile base = {
      "a GPU", "before", {}, {Row(1024, kAny, 16)}, {Row(2048, kAny, 16)}};
  MoeKernelFile file = base;
  MergeMoeKernelFile({"a GPU", "now", {}, {Row(1024, kAny, 64)}, {}}, &file);
  EXPECT_EQ(file.source, "before; now");
  file = base;
  MergeMoeKernelFile(
      {"a GPU", "now", {}, {Row(1024, kAny, 64)}, {Row(2048, kAny, 64)}},
      &file);
  EXPECT_EQ(file.source, "now");
}

}  // namespace
}  // namespace tenon
