// What every exported function does around its work.

#include "abi/call.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace tenon::abi {
namespace {

tenon_error Unset() {
  tenon_error error;
  std::memset(&error, 0x5a, sizeof(error));
  error.struct_size = sizeof(error);
  return error;
}

TEST(ReportTest, FillsCodeAndMessage) {
  tenon_error error = Unset();
  EXPECT_EQ(Report("tenon_f", InvalidArgumentError("x is ", 3), &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_EQ(error.code, TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_f: x is 3");
  EXPECT_EQ(Report("tenon_f", Status(), &error), TENON_OK);
  EXPECT_EQ(error.code, TENON_OK);
  EXPECT_STREQ(error.message, "");
  EXPECT_EQ(error.struct_size, sizeof(error));
}

TEST(ReportTest, TheFunctionReplacesTheCppName) {
  const auto message = [](const char* text) {
    tenon_error error = Unset();
    Report("tenon_f", InvalidArgumentError(text), &error);
    return std::string(error.message);
  };
  EXPECT_EQ(message("RmsNorm: x is 3"), "tenon_f: x is 3");
  EXPECT_EQ(message("RmsNorm: x: 3"), "tenon_f: x: 3");
  EXPECT_EQ(message("x: 3"), "tenon_f: x: 3");
  EXPECT_EQ(message("Rms norm: 3"), "tenon_f: Rms norm: 3");
  EXPECT_EQ(message("A:3"), "tenon_f: A:3");
  EXPECT_EQ(message(": 3"), "tenon_f: : 3");
  EXPECT_EQ(message(""), "tenon_f: ");
}

TEST(ReportTest, WritesNoMoreThanStructSize) {
  const std::string text(2000, 'm');
  for (uint32_t size = 0; size <= sizeof(tenon_error) + 8; ++size) {
    SCOPED_TRACE(size);
    std::vector<unsigned char> memory(sizeof(tenon_error) + 16, 0x5a);
    auto* error = reinterpret_cast<tenon_error*>(memory.data());
    error->struct_size = size;
    EXPECT_EQ(Report("tenon_f", InternalError(text), error), TENON_INTERNAL);
    const size_t end = std::min<size_t>(size, sizeof(tenon_error));
    for (size_t i = std::max(end, sizeof(uint32_t)); i < memory.size(); ++i) {
      ASSERT_EQ(memory[i], 0x5a) << i;
    }
    constexpr size_t kMessage = offsetof(tenon_error, message);
    if (size < kMessage) {
      for (size_t i = sizeof(uint32_t); i < kMessage; ++i) {
        ASSERT_EQ(memory[i], 0x5a) << i;
      }
      continue;
    }
    EXPECT_EQ(error->code, TENON_INTERNAL);
    if (size == kMessage) continue;
    const size_t length = strnlen(error->message, end - kMessage);
    EXPECT_EQ(length, end - kMessage - 1);  // cut, with its closing zero
    EXPECT_EQ(("tenon_f: " + text).compare(0, length, error->message), 0);
  }
}

TEST(ReportTest, NoErrorStruct) {
  EXPECT_EQ(Report("tenon_f", NotFoundError("x"), nullptr), TENON_NOT_FOUND);
  EXPECT_EQ(Report("tenon_f", Status(), nullptr), TENON_OK);
}

TEST(CallTest, ReturnsTheStatus) {
  tenon_error error = Unset();
  EXPECT_EQ(Call("tenon_f", &error, [] { return Status(); }), TENON_OK);
  EXPECT_EQ(Call("tenon_f", &error, [] { return DataLossError("file"); }),
            TENON_DATA_LOSS);
  EXPECT_STREQ(error.message, "tenon_f: file");
}

TEST(CallTest, NothingThrownGetsPast) {
  tenon_error error = Unset();
  EXPECT_EQ(Call("tenon_f", &error, []() -> Status { throw std::bad_alloc(); }),
            TENON_RESOURCE_EXHAUSTED);
  EXPECT_STREQ(error.message, "tenon_f: out of host memory");
  EXPECT_EQ(Call("tenon_f", &error,
                 []() -> Status { throw std::runtime_error("why"); }),
            TENON_INTERNAL);
  EXPECT_STREQ(error.message, "tenon_f: why");
  EXPECT_EQ(Call("tenon_f", &error, []() -> Status { throw 7; }),
            TENON_INTERNAL);
  EXPECT_STREQ(error.message, "tenon_f: unknown exception");
}

// A struct that has grown twice since its first version.
struct Grown {
  uint32_t struct_size;
  int32_t a;
  int64_t b;  // the second version's
  int64_t c;  // the third's
};
constexpr size_t kFirst = 8;

Status Read(const void* from, Grown* to) {
  std::memset(to, 0x5a, sizeof(*to));
  return ReadStruct("args", from, kFirst, sizeof(Grown), to);
}

void ExpectStatus(const Status& status, int32_t code, const char* message) {
  EXPECT_EQ(static_cast<int32_t>(status.code()), code);
  EXPECT_STREQ(status.message(), message);
}

TEST(ReadStructTest, ReadsEveryVersion) {
  Grown from = {sizeof(Grown), 1, 2, 3};
  Grown to;
  ASSERT_TRUE(Read(&from, &to).ok());
  EXPECT_EQ(std::memcmp(&from, &to, sizeof(to)), 0);
  from.struct_size = 16;
  ASSERT_TRUE(Read(&from, &to).ok());
  EXPECT_EQ(to.a, 1);
  EXPECT_EQ(to.b, 2);
  EXPECT_EQ(to.c, 0);
  from.struct_size = kFirst;
  ASSERT_TRUE(Read(&from, &to).ok());
  EXPECT_EQ(to.a, 1);
  EXPECT_EQ(to.b, 0);
  EXPECT_EQ(to.c, 0);
}

TEST(ReadStructTest, RefusesSizesThatNoVersionHas) {
  Grown from = {0, 1, 2, 3};
  Grown to;
  ExpectStatus(
      Read(&from, &to), TENON_INVALID_ARGUMENT,
      "args.struct_size is 0, expected a multiple of 8 from 8 to 4096");
  from.struct_size = kFirst - 1;
  ExpectStatus(
      Read(&from, &to), TENON_INVALID_ARGUMENT,
      "args.struct_size is 7, expected a multiple of 8 from 8 to 4096");
  from.struct_size = 20;  // half of c
  ExpectStatus(
      Read(&from, &to), TENON_INVALID_ARGUMENT,
      "args.struct_size is 20, expected a multiple of 8 from 8 to 4096");
  from.struct_size = 4097;
  ExpectStatus(
      Read(&from, &to), TENON_INVALID_ARGUMENT,
      "args.struct_size is 4097, expected a multiple of 8 from 8 to 4096");
  from.struct_size = ~0u;
  ExpectStatus(Read(&from, &to), TENON_INVALID_ARGUMENT,
               "args.struct_size is 4294967295, expected a multiple of 8 from "
               "8 to 4096");
  ExpectStatus(Read(nullptr, &to), TENON_INVALID_ARGUMENT, "args is null");
}

TEST(ReadStructTest, NewerStructsMustNotUseWhatIsNew) {
  struct Newer {
    Grown known;
    int64_t d[2];
  } from = {{sizeof(Newer), 1, 2, 3}, {0, 0}};
  Grown to;
  ASSERT_TRUE(Read(&from, &to).ok());
  EXPECT_EQ(to.c, 3);
  from.known.struct_size = sizeof(Grown) + 8;
  from.d[1] = 1;  // not the caller's
  ASSERT_TRUE(Read(&from, &to).ok());
  from.known.struct_size = sizeof(Newer);
  ExpectStatus(Read(&from, &to), TENON_UNIMPLEMENTED,
               "args: a field at byte 32 is set, which is newer than this "
               "library (its struct ends at 24)");
  from.d[0] = int64_t{1} << 56;
  ExpectStatus(Read(&from, &to), TENON_UNIMPLEMENTED,
               "args: a field at byte 31 is set, which is newer than this "
               "library (its struct ends at 24)");
}

TEST(ReadStructTest, ReadsNoByteThatIsNotTheCallers) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(pages, MAP_FAILED);
  ASSERT_EQ(mprotect(static_cast<char*>(pages) + page, page, PROT_NONE), 0);
  Grown to;
  for (uint32_t size : {8u, 16u, 24u, 32u, 40u, 4096u}) {
    char* from = static_cast<char*>(pages) + page - size;
    std::memset(from, 0, size);
    std::memcpy(from, &size, sizeof(size));
    EXPECT_TRUE(Read(from, &to).ok()) << size;  // also where it is unaligned
  }
  const uint32_t garbage = 4097;
  char* from = static_cast<char*>(pages) + page - sizeof(garbage);
  std::memcpy(from, &garbage, sizeof(garbage));
  EXPECT_FALSE(Read(from, &to).ok());
  munmap(pages, 2 * page);
}

TEST(WriteStructTest, WritesEveryVersion) {
  const Grown from = {0, 1, 2, 3};
  for (uint32_t size : {8u, 16u, 24u, 32u, 48u}) {
    SCOPED_TRACE(size);
    std::vector<unsigned char> memory(56, 0x5a);
    std::memcpy(memory.data(), &size, sizeof(size));
    ASSERT_TRUE(
        WriteStruct("info", &from, kFirst, sizeof(Grown), memory.data()).ok());
    Grown to = {};
    std::memcpy(&to, memory.data(), std::min<size_t>(size, sizeof(to)));
    EXPECT_EQ(to.struct_size, size);  // the caller's
    EXPECT_EQ(to.a, 1);
    EXPECT_EQ(to.b, size >= 16 ? 2 : 0);
    EXPECT_EQ(to.c, size >= 24 ? 3 : 0);
    for (size_t i = sizeof(Grown); i < size; ++i) EXPECT_EQ(memory[i], 0);
    for (size_t i = size; i < memory.size(); ++i) EXPECT_EQ(memory[i], 0x5a);
  }
}

TEST(WriteStructTest, RefusesSizesThatNoVersionHas) {
  const Grown from = {0, 1, 2, 3};
  for (uint32_t size : {0u, 7u, 20u, 4097u, ~0u}) {
    Grown to = {size, -1, -1, -1};
    const Status status =
        WriteStruct("info", &from, kFirst, sizeof(Grown), &to);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(to.a, -1);
  }
  ExpectStatus(WriteStruct("info", &from, kFirst, sizeof(Grown), nullptr),
               TENON_INVALID_ARGUMENT, "info is null");
}

TEST(ChecksTest, ReservedAndPresent) {
  EXPECT_TRUE(CheckReserved("options.reserved", 0).ok());
  ExpectStatus(CheckReserved("options.reserved", 7), TENON_INVALID_ARGUMENT,
               "options.reserved is 7, must be 0");
  EXPECT_TRUE(CheckPresent("count", "").ok());
  ExpectStatus(CheckPresent("count", nullptr), TENON_INVALID_ARGUMENT,
               "count is null");
}

}  // namespace
}  // namespace tenon::abi
