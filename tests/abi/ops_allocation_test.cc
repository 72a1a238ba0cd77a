// An op allocates nothing: neither the C function nor the C++ op behind it.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "abi/tenon.h"
#include "tests/abi/op_cases.h"
#include "tests/testing/op_test.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TENON_OWN_MALLOC 0  // the sanitizer has its own
#else
#define TENON_OWN_MALLOC 1
#endif

namespace {
std::atomic<int> g_num_allocations{0};
}  // namespace

#if TENON_OWN_MALLOC
// glibc's, under the names by which its replacements may call it.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* memory, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  ++g_num_allocations;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  ++g_num_allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* memory, size_t size) {
  ++g_num_allocations;
  return __libc_realloc(memory, size);
}
void* memalign(size_t alignment, size_t size) {
  ++g_num_allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
  return memalign(alignment, size);
}
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = memalign(alignment, size);
  return *memory == nullptr ? 12 : 0;  // ENOMEM
}
}  // extern "C"
#endif

namespace tenon::abi_test {
namespace {

template <class Body>
int CountAllocations(const Body& body) {
  const int before = g_num_allocations;
  body();
  return g_num_allocations - before;
}

class AbiOpsAllocationTest : public testing::OpTest {};

TEST_P(AbiOpsAllocationTest, NoneInACall) {
  if (!TENON_OWN_MALLOC) GTEST_SKIP() << "a sanitizer has its own malloc";
  EXPECT_EQ(CountAllocations([] { ::operator delete(::operator new(8)); }),
            1);  // it counts
  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 2;
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, nullptr), TENON_OK);
  for (int64_t tokens : {0, 1, 40}) {
    for (const OpCasePtr& op : MakeAllOps(GetParam(), tokens)) {
      SCOPED_TRACE(op->function);
      ASSERT_NO_FATAL_FAILURE(AddWorkspace(context, device(), op.get()));
      tenon_error error = {sizeof(error), 0, ""};
      int32_t code = -1;
      EXPECT_EQ(CountAllocations([&] { op->call_cpp(Stream()).ok(); }), 0);
      EXPECT_EQ(CountAllocations([&] { op->call_cpp(stream()).ok(); }), 0);
      EXPECT_EQ(
          CountAllocations([&] { code = op->call(context, nullptr, &error); }),
          0);
      EXPECT_EQ(code, TENON_OK) << error.message;
      EXPECT_EQ(CountAllocations([&] { code = op->call(0, nullptr, &error); }),
                0);
      EXPECT_EQ(code, TENON_OK) << error.message;
      if (!op->query) continue;
      uint64_t bytes;
      EXPECT_EQ(
          CountAllocations([&] { code = op->query(context, &bytes, &error); }),
          0);
      EXPECT_EQ(code, TENON_OK) << error.message;
    }
  }
  EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
}

std::vector<testing::Target> CpuTargets() {
  std::vector<testing::Target> targets;
  for (const testing::Target& target : testing::AllTargets()) {
    if (target.device.type == DeviceType::kCpu) targets.push_back(target);
  }
  return targets;
}

INSTANTIATE_TEST_SUITE_P(Targets, AbiOpsAllocationTest,
                         ::testing::ValuesIn(CpuTargets()),
                         testing::TargetName);

}  // namespace
}  // namespace tenon::abi_test
