#include <dlfcn.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "abi/tenon.h"

// Loads libtenon.so as a program without any CUDA file would, and more than
// once.

namespace {

using DlopenFunction = void* (*)(const char*, int);

// What the library tried to open itself.
std::vector<std::string>& Attempts() {
  static std::vector<std::string> attempts;
  return attempts;
}

bool g_hide_files = false;

}  // namespace

// Programs come first in symbol lookup: the library's dlopen is this one.
extern "C" __attribute__((visibility("default"))) void* dlopen(const char* file,
                                                               int flags) {
  static const auto real =
      reinterpret_cast<DlopenFunction>(dlsym(RTLD_NEXT, "dlopen"));
  if (g_hide_files && file != nullptr) {
    Attempts().push_back(file);
    return real("/no/such/file", flags);  // leaves a message for dlerror()
  }
  return real(file, flags);
}

namespace {

constexpr char kPath[] = "abi/libtenon.so.1";

class Library {
 public:
  explicit Library(const std::string& path)
      : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) ADD_FAILURE() << dlerror();
  }
  void* handle() const { return handle_; }

  template <class Function>
  Function* Get(const char* name) const {
    void* symbol = dlsym(handle_, name);
    EXPECT_NE(symbol, nullptr) << name;
    return reinterpret_cast<Function*>(symbol);
  }

 private:
  void* handle_;
};

#define TENON_GET(library, function) \
  (library).Get<decltype(function)>(#function)

tenon_error NewError() {
  tenon_error error = {};
  error.struct_size = sizeof(error);
  return error;
}

tenon_context_options CpuOptions() {
  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 2;
  return options;
}

TEST(LoadTest, NothingLeaksIntoTheProgram) {
  const Library library(kPath);
  EXPECT_EQ(dlsym(RTLD_DEFAULT, "tenon_abi_version"), nullptr);
}

TEST(LoadTest, StaysAfterDlclose) {
  const Library library(kPath);
  const auto version = TENON_GET(library, tenon_version_string);
  const std::string before = version();
  EXPECT_EQ(dlclose(library.handle()), 0);
  EXPECT_EQ(before, version());
}

// Two copies, as when two packages in one process bring their own.
TEST(LoadTest, CopiesDoNotMeet) {
  const std::string copy = testing::TempDir() + "libtenon.so.1";
  std::filesystem::copy_file(kPath, copy,
                             std::filesystem::copy_options::overwrite_existing);
  const Library a(kPath), b(copy);
  ASSERT_NE(a.handle(), b.handle());
  ASSERT_NE(TENON_GET(a, tenon_context_create),
            TENON_GET(b, tenon_context_create));

  tenon_error error = NewError();
  const tenon_context_options options = CpuOptions();
  tenon_context in_a = 0, in_b = 0;
  ASSERT_EQ(TENON_GET(a, tenon_context_create)(&options, &in_a, &error),
            TENON_OK)
      << error.message;
  tenon_context_info info = {};
  info.struct_size = sizeof(info);
  EXPECT_EQ(TENON_GET(b, tenon_context_query)(in_a, &info, &error),
            TENON_NOT_FOUND);
  ASSERT_EQ(TENON_GET(b, tenon_context_create)(&options, &in_b, &error),
            TENON_OK)
      << error.message;
  EXPECT_EQ(TENON_GET(a, tenon_context_destroy)(in_a, &error), TENON_OK);
  EXPECT_EQ(TENON_GET(b, tenon_context_query)(in_b, &info, &error), TENON_OK);
  EXPECT_EQ(TENON_GET(b, tenon_context_destroy)(in_b, &error), TENON_OK);
}

TEST(LoadTest, WorksWhereThereIsNoCudaFile) {
  const std::string copy = testing::TempDir() + "without_cuda.so";
  std::filesystem::copy_file(kPath, copy,
                             std::filesystem::copy_options::overwrite_existing);
  const Library library(copy);
  g_hide_files = true;

  tenon_error error = NewError();
  int32_t count = -1;
  EXPECT_EQ(
      TENON_GET(library, tenon_device_count)(TENON_DEVICE_CUDA, &count, &error),
      TENON_OK)
      << error.message;
  EXPECT_EQ(count, 0);

  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = TENON_DEVICE_CUDA;
  options.cublas_lt = TENON_CUBLAS_LT_REQUIRED;
  tenon_context context = 0;
  EXPECT_NE(
      TENON_GET(library, tenon_context_create)(&options, &context, &error),
      TENON_OK);
  EXPECT_EQ(context, 0u);
  EXPECT_NE(std::string(error.message), "");

  options = CpuOptions();
  EXPECT_EQ(
      TENON_GET(library, tenon_context_create)(&options, &context, &error),
      TENON_OK)
      << error.message;
  EXPECT_EQ(TENON_GET(library, tenon_context_destroy)(context, &error),
            TENON_OK);
  g_hide_files = false;
  // In a build with CUDA the driver was looked for, and not found.
  for (const std::string& file : Attempts()) {
    EXPECT_TRUE(file.find("cuda") != std::string::npos ||
                file.find("cublas") != std::string::npos)
        << file;
  }
}

}  // namespace
