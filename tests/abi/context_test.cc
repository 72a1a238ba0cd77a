// Versions, devices and contexts.

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "abi/op_call.h"
#include "abi/tenon.h"
#include "tests/abi/moe_kernels_json.h"

namespace {

using tenon::testing::kMoeKernelsJson;

tenon_error NewError() { return {sizeof(tenon_error), -1, "unset"}; }

TEST(VersionTest, IsThatOfTheHeader) {
  EXPECT_EQ(tenon_abi_version() >> 16, unsigned{TENON_ABI_MAJOR});
  EXPECT_EQ(tenon_abi_version() & 0xffff, unsigned{TENON_ABI_MINOR});
  EXPECT_STRNE(tenon_version_string(), "");
}

TEST(StatusNameTest, NamesEveryCode) {
  EXPECT_STREQ(tenon_status_name(TENON_OK), "OK");
  EXPECT_STREQ(tenon_status_name(TENON_INVALID_ARGUMENT), "INVALID_ARGUMENT");
  EXPECT_STREQ(tenon_status_name(TENON_UNAUTHENTICATED), "UNAUTHENTICATED");
  for (int32_t code = 0; code <= 16; ++code) {
    EXPECT_EQ(std::string(tenon_status_name(code)) == "UNKNOWN",
              code == TENON_UNKNOWN);
  }
  for (int32_t code : {-1, 17, 1 << 30, -(1 << 30)}) {
    EXPECT_STREQ(tenon_status_name(code), "UNKNOWN");
  }
}

TEST(DeviceTest, Count) {
  tenon_error error = NewError();
  int32_t count = -1;
  EXPECT_EQ(tenon_device_count(TENON_DEVICE_CPU, &count, &error), TENON_OK);
  EXPECT_EQ(count, 1);
  EXPECT_EQ(tenon_device_count(TENON_DEVICE_CUDA, &count, &error), TENON_OK);
  EXPECT_GE(count, 0);
  for (int32_t type : {0, 3, -1}) {
    count = -1;
    EXPECT_EQ(tenon_device_count(type, &count, &error), TENON_INVALID_ARGUMENT);
    EXPECT_EQ(error.message, "tenon_device_count: device_type is " +
                                 std::to_string(type) +
                                 ", expected 1 (CPU) or 2 (CUDA)");
    EXPECT_EQ(count, -1);
  }
  EXPECT_EQ(tenon_device_count(TENON_DEVICE_CPU, nullptr, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_device_count: count is null");
}

TEST(DeviceTest, Query) {
  tenon_error error = NewError();
  tenon_device_info info;
  std::memset(&info, 0x5a, sizeof(info));
  info.struct_size = sizeof(info);
  ASSERT_EQ(tenon_device_query(TENON_DEVICE_CPU, 0, &info, &error), TENON_OK)
      << error.message;
  EXPECT_EQ(info.struct_size, sizeof(info));
  EXPECT_EQ(info.device_type, TENON_DEVICE_CPU);
  EXPECT_EQ(info.device_index, 0);
  EXPECT_GE(info.num_cores, 1);
  EXPECT_EQ(info.compute_capability, 0);
  EXPECT_GE(info.cpu_isa, TENON_CPU_ISA_GENERIC);
  EXPECT_LE(info.cpu_isa, TENON_CPU_ISA_AVX512);
  EXPECT_GT(info.total_memory_bytes, 0);
  EXPECT_GE(info.l2_bytes, 0);
  EXPECT_GT(strnlen(info.name, sizeof(info.name)), 0u);
  EXPECT_LT(strnlen(info.name, sizeof(info.name)), sizeof(info.name));

  int32_t count = 0;
  ASSERT_EQ(tenon_device_count(TENON_DEVICE_CUDA, &count, nullptr), TENON_OK);
  for (int32_t i = 0; i < count; ++i) {
    ASSERT_EQ(tenon_device_query(TENON_DEVICE_CUDA, i, &info, &error),
              TENON_OK);
    EXPECT_EQ(info.device_type, TENON_DEVICE_CUDA);
    EXPECT_EQ(info.device_index, i);
    EXPECT_GE(info.compute_capability, 80);
    EXPECT_EQ(info.cpu_isa, 0);
  }
  EXPECT_EQ(tenon_device_query(TENON_DEVICE_CUDA, count, &info, &error),
            TENON_UNAVAILABLE);
  EXPECT_EQ(error.message, "tenon_device_query: device_index is " +
                               std::to_string(count) +
                               ", but the number of usable CUDA devices is " +
                               std::to_string(count));
  EXPECT_EQ(tenon_device_query(TENON_DEVICE_CPU, 1, &info, &error),
            TENON_UNAVAILABLE);
  EXPECT_EQ(tenon_device_query(TENON_DEVICE_CPU, -1, &info, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_EQ(tenon_device_query(9, 0, &info, &error), TENON_INVALID_ARGUMENT);
  EXPECT_EQ(tenon_device_query(TENON_DEVICE_CPU, 0, nullptr, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_device_query: info is null");
}

tenon_context_options CpuOptions() {
  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 2;
  return options;
}

tenon_context_info Query(tenon_context context) {
  tenon_context_info info = {};
  info.struct_size = sizeof(info);
  tenon_error error = NewError();
  EXPECT_EQ(tenon_context_query(context, &info, &error), TENON_OK)
      << error.message;
  return info;
}

TEST(ContextTest, OnTheCpu) {
  tenon_error error = NewError();
  tenon_context_options options = CpuOptions();
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, &error), TENON_OK)
      << error.message;
  EXPECT_NE(context, 0u);
  const tenon_context_info info = Query(context);
  EXPECT_EQ(info.device_type, TENON_DEVICE_CPU);
  EXPECT_EQ(info.device_index, 0);
  EXPECT_EQ(info.num_threads, 2);
  EXPECT_EQ(info.cublas_lt_version, 0u);
  EXPECT_EQ(tenon_context_query(context, nullptr, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_EQ(tenon_context_destroy(context, &error), TENON_OK);
  EXPECT_EQ(tenon_context_destroy(context, &error), TENON_NOT_FOUND);
  tenon_context_info after = {};
  after.struct_size = sizeof(after);
  EXPECT_EQ(tenon_context_query(context, &after, &error), TENON_NOT_FOUND);
  EXPECT_EQ(tenon_context_destroy(0, &error), TENON_OK);
}

TEST(ContextTest, OneThreadForEachCpuByDefault) {
  tenon_context_options options = CpuOptions();
  options.num_threads = 0;
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, nullptr), TENON_OK);
  tenon_device_info device = {};
  device.struct_size = sizeof(device);
  ASSERT_EQ(tenon_device_query(TENON_DEVICE_CPU, 0, &device, nullptr),
            TENON_OK);
  EXPECT_EQ(Query(context).num_threads, device.num_cores);
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
}

TEST(ContextTest, OnCuda) {
  int32_t count = 0;
  ASSERT_EQ(tenon_device_count(TENON_DEVICE_CUDA, &count, nullptr), TENON_OK);
  tenon_error error = NewError();
  tenon_context_options options = CpuOptions();
  options.device_type = TENON_DEVICE_CUDA;
  options.num_threads = 0;
  tenon_context context = 0;
  if (count == 0) {
    EXPECT_EQ(tenon_context_create(&options, &context, &error),
              TENON_UNAVAILABLE);
    EXPECT_EQ(context, 0u);
    GTEST_SKIP() << "no CUDA device";
  }
  ASSERT_EQ(tenon_context_create(&options, &context, &error), TENON_OK)
      << error.message;
  EXPECT_EQ(Query(context).device_type, TENON_DEVICE_CUDA);
  EXPECT_EQ(Query(context).num_threads, 0);
  const bool found = Query(context).cublas_lt_version != 0;
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);

  options.cublas_lt = TENON_CUBLAS_LT_REQUIRED;
  const int32_t code = tenon_context_create(&options, &context, &error);
  EXPECT_EQ(code, found ? TENON_OK : TENON_UNAVAILABLE);
  if (code == TENON_OK) tenon_context_destroy(context, nullptr);

  options.cublas_lt = TENON_CUBLAS_LT_OFF;
  ASSERT_EQ(tenon_context_create(&options, &context, &error), TENON_OK);
  EXPECT_EQ(Query(context).cublas_lt_version, 0u);
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);

  const auto expect = [&](const char* message, auto change) {
    tenon_context_options bad = options;
    change(bad);
    EXPECT_EQ(tenon_context_create(&bad, &context, &error),
              TENON_INVALID_ARGUMENT);
    EXPECT_NE(std::strstr(error.message, message), nullptr) << error.message;
  };
  using Options = tenon_context_options;
  expect("options.num_threads is 4", [](Options& o) { o.num_threads = 4; });
  expect("options.cublas_lt is 3", [](Options& o) { o.cublas_lt = 3; });
}

// What tenon_moe gets of a context.
const tenon::MoeKernelTable* MoeKernelsOf(tenon_context context) {
  tenon::abi::OpCall call(tenon::abi::TensorData::kUsed);
  EXPECT_TRUE(call.SetContext(context).ok());
  return call.moe_kernels();
}

TEST(ContextTest, TakesMeasuredKernelSizesOnce) {
  tenon_error error = NewError();
  const tenon_context_options options = CpuOptions();
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, &error), TENON_OK);
  EXPECT_EQ(Query(context).num_moe_kernels, 0);
  EXPECT_EQ(MoeKernelsOf(context), nullptr);

  ASSERT_EQ(tenon_context_set_moe_kernels(context, kMoeKernelsJson, &error),
            TENON_OK)
      << error.message;
  EXPECT_EQ(Query(context).num_moe_kernels, 1);
  const tenon::MoeKernelTable* table = MoeKernelsOf(context);
  ASSERT_NE(table, nullptr);
  ASSERT_EQ(table->float16.count, 1);
  EXPECT_EQ(table->float16.rows[0].config,
            (tenon::MoeKernelConfig{{32, 2, 1}, {8, 1, 1}, 128}));

  EXPECT_EQ(tenon_context_set_moe_kernels(context, kMoeKernelsJson, &error),
            TENON_FAILED_PRECONDITION);
  EXPECT_NE(std::strstr(error.message, "already"), nullptr) << error.message;
  EXPECT_EQ(MoeKernelsOf(context), table);
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
  EXPECT_EQ(tenon_context_set_moe_kernels(context, kMoeKernelsJson, &error),
            TENON_NOT_FOUND);
}

TEST(ContextTest, RefusesKernelSizesThatNoKernelHas) {
  tenon_error error = NewError();
  const tenon_context_options options = CpuOptions();
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, &error), TENON_OK);
  const auto expect = [&](const std::string& json, const char* message) {
    EXPECT_EQ(tenon_context_set_moe_kernels(context, json.c_str(), &error),
              TENON_INVALID_ARGUMENT);
    const std::string prefix = "tenon_context_set_moe_kernels: json";
    EXPECT_EQ(std::string(error.message).rfind(prefix, 0), 0u) << error.message;
    EXPECT_NE(std::strstr(error.message, message), nullptr) << error.message;
  };
  std::string no_such_tile = kMoeKernelsJson;
  no_such_tile.replace(no_such_tile.find("32"), 2, "33");
  expect(no_such_tile, "33");
  expect("", "");
  expect("{}", "format is missing");
  expect("moe_kernels.json", "");  // a path is no text
  EXPECT_EQ(tenon_context_set_moe_kernels(context, nullptr, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_context_set_moe_kernels: json is null");
  EXPECT_EQ(Query(context).num_moe_kernels, 0);
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
}

TEST(ContextTest, RefusesBadOptions) {
  tenon_error error = NewError();
  tenon_context context = 77;
  const auto expect = [&](int32_t code, const char* message, auto change) {
    tenon_context_options options = CpuOptions();
    change(options);
    EXPECT_EQ(tenon_context_create(&options, &context, &error), code);
    EXPECT_EQ(error.code, code);
    EXPECT_EQ(std::string(error.message).rfind("tenon_context_create: ", 0), 0u)
        << error.message;
    EXPECT_NE(std::strstr(error.message, message), nullptr) << error.message;
    EXPECT_EQ(context, 77u);
  };
  using Options = tenon_context_options;
  const int32_t invalid = TENON_INVALID_ARGUMENT;
  expect(invalid, "options.struct_size is 0",
         [](Options& o) { o.struct_size = 0; });
  expect(invalid, "options.device_type is 0",
         [](Options& o) { o.device_type = 0; });
  expect(invalid, "options.device_type is 3",
         [](Options& o) { o.device_type = 3; });
  expect(invalid, "options.device_index is -1",
         [](Options& o) { o.device_index = -1; });
  expect(TENON_UNAVAILABLE, "options.device_index is 1",
         [](Options& o) { o.device_index = 1; });
  expect(invalid, "options.num_threads is -1",
         [](Options& o) { o.num_threads = -1; });
  expect(invalid, "options.num_threads is 2147483647",
         [](Options& o) { o.num_threads = 2147483647; });
  expect(invalid, "options.cublas_lt is 1",
         [](Options& o) { o.cublas_lt = TENON_CUBLAS_LT_OFF; });
  expect(invalid, "options.reserved is", [](Options& o) { o.reserved = -1; });
  const tenon_context_options options = CpuOptions();
  EXPECT_EQ(tenon_context_create(&options, nullptr, &error), invalid);
  EXPECT_STREQ(error.message, "tenon_context_create: context is null");
  EXPECT_EQ(tenon_context_create(nullptr, &context, &error), invalid);
  EXPECT_STREQ(error.message, "tenon_context_create: options is null");
}

}  // namespace
