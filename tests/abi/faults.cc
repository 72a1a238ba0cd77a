#include "tests/abi/faults.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

namespace tenon::testing {
namespace {

constexpr int kNoKind = -1;

std::atomic<int> g_kind{kNoKind};  // what is counted now
std::atomic<int64_t> g_calls{0};
std::atomic<int64_t> g_first{0};
std::atomic<FaultMode> g_mode{FaultMode::kNone};
std::atomic<int64_t> g_held[3];  // of each kind

void* NewOrNull(size_t size, size_t alignment) {
  if (FaultStrikes(FaultKind::kMemory)) return nullptr;
  size = (size + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, size == 0 ? alignment : size);
  if (memory != nullptr) CountHeld(FaultKind::kMemory, 1);
  return memory;
}

void* NewOrThrow(size_t size, size_t alignment) {
  void* memory = NewOrNull(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

constexpr size_t kAlignment = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

Faults::Faults(FaultKind kind, FaultMode mode, int64_t first) {
  g_calls = 0;
  g_first = first;
  g_mode = mode;
  g_kind = static_cast<int>(kind);
}

Faults::~Faults() { g_kind = kNoKind; }

int64_t Faults::calls() const { return g_calls; }

int64_t NumHeld(FaultKind kind) { return g_held[static_cast<int>(kind)]; }

void CountHeld(FaultKind kind, int64_t change) {
  g_held[static_cast<int>(kind)] += change;
}

bool FaultStrikes(FaultKind kind) {
  if (g_kind != static_cast<int>(kind)) return false;
  const int64_t call = g_calls++;
  switch (g_mode.load()) {
    case FaultMode::kNone:
      return false;
    case FaultMode::kOnce:
      return call == g_first;
    case FaultMode::kOn:
      return call >= g_first;
  }
  return false;
}

}  // namespace tenon::testing

using tenon::testing::CountHeld;
using tenon::testing::FaultKind;
using tenon::testing::FaultStrikes;
using tenon::testing::kAlignment;
using tenon::testing::NewOrNull;
using tenon::testing::NewOrThrow;

// ------------------------------------------------ operator new and delete

void* operator new(size_t size) { return NewOrThrow(size, kAlignment); }
void* operator new[](size_t size) { return NewOrThrow(size, kAlignment); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return NewOrNull(size, kAlignment);
}
void* operator new[](size_t size, const std::nothrow_t&) noexcept {
  return NewOrNull(size, kAlignment);
}
void* operator new(size_t size, std::align_val_t alignment) {
  return NewOrThrow(size, static_cast<size_t>(alignment));
}
void* operator new[](size_t size, std::align_val_t alignment) {
  return NewOrThrow(size, static_cast<size_t>(alignment));
}

void operator delete(void* memory) noexcept {
  if (memory == nullptr) return;
  CountHeld(FaultKind::kMemory, -1);
  std::free(memory);
}
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
void operator delete[](void* memory, size_t) noexcept {
  operator delete(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  operator delete(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  operator delete(memory);
}
void operator delete(void* memory, std::align_val_t) noexcept {
  operator delete(memory);
}
void operator delete[](void* memory, std::align_val_t) noexcept {
  operator delete(memory);
}
void operator delete(void* memory, size_t, std::align_val_t) noexcept {
  operator delete(memory);
}
void operator delete[](void* memory, size_t, std::align_val_t) noexcept {
  operator delete(memory);
}

// -------------------------------------- what the linker's --wrap leads here

extern "C" {

int __real_posix_memalign(void** memory, size_t alignment, size_t size);
void* __real_mmap(void* address, size_t length, int protection, int flags,
                  int fd, off_t offset);
int __real_munmap(void* address, size_t length);
int __real_open(const char* path, int flags, ...);
int __real_close(int fd);
int __real_fstat(int fd, struct stat* info);
ssize_t __real_read(int fd, void* to, size_t size);

int __wrap_posix_memalign(void** memory, size_t alignment, size_t size) {
  if (FaultStrikes(FaultKind::kMemory)) return ENOMEM;
  return __real_posix_memalign(memory, alignment, size);
}

void* __wrap_mmap(void* address, size_t length, int protection, int flags,
                  int fd, off_t offset) {
  if (FaultStrikes(FaultKind::kSystem)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  void* mapped = __real_mmap(address, length, protection, flags, fd, offset);
  if (mapped != MAP_FAILED) CountHeld(FaultKind::kSystem, 1);
  return mapped;
}

int __wrap_munmap(void* address, size_t length) {
  CountHeld(FaultKind::kSystem, -1);
  return __real_munmap(address, length);
}

int __wrap_open(const char* path, int flags, int mode) {
  if (FaultStrikes(FaultKind::kSystem)) {
    errno = EMFILE;
    return -1;
  }
  const int fd = __real_open(path, flags, mode);
  if (fd >= 0) CountHeld(FaultKind::kSystem, 1);
  return fd;
}

int __wrap_close(int fd) {
  CountHeld(FaultKind::kSystem, -1);
  return __real_close(fd);
}

int __wrap_fstat(int fd, struct stat* info) {
  if (FaultStrikes(FaultKind::kSystem)) {
    errno = ENOMEM;
    return -1;
  }
  return __real_fstat(fd, info);
}

ssize_t __wrap_read(int fd, void* to, size_t size) {
  if (FaultStrikes(FaultKind::kSystem)) {
    errno = EIO;
    return -1;
  }
  return __real_read(fd, to, size);
}

// std::thread calls it from within libstdc++.so, where --wrap does not reach.
__attribute__((visibility("default"))) int pthread_create(
    pthread_t* thread, const pthread_attr_t* attributes, void* (*main)(void*),
    void* argument) noexcept {
  if (FaultStrikes(FaultKind::kSystem)) return EAGAIN;
  static const auto next = reinterpret_cast<decltype(&pthread_create)>(
      dlsym(RTLD_NEXT, "pthread_create"));
  return next(thread, attributes, main, argument);
}

}  // extern "C"
