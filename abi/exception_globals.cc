#include <limits.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>

// What libstdc++ keeps of a thread's exceptions under way is thread-local. In a
// library that is opened at run time thread-local memory comes from malloc,
// when a thread first needs it, and where there is none left the C library ends
// the process. These definitions take the place of libstdc++'s in libtenon.so
// and need no memory at run time. (Thread-local memory that is there from the
// beginning will not do: the CUDA runtime's part of it is too large.) The names
// and the layout are the Itanium C++ ABI's, section 2.2.2.

namespace __cxxabiv1 {

struct __cxa_eh_globals {  // NOLINT: see above
  void* caught_exceptions;
  unsigned int uncaught_exceptions;
};

namespace {

struct Slot {
  __cxa_eh_globals globals;
  std::atomic<bool> taken;
};

// For threads that have thrown and live. More than these need memory after all.
constexpr int kNumSlots = 1024;
Slot slots[kNumSlots];
pthread_key_t key;

bool IsOurs(const Slot* slot) {
  return slot >= slots && slot < slots + kNumSlots;
}

void Release(void* data) {
  auto* const slot = static_cast<Slot*>(data);
  if (!IsOurs(slot)) return std::free(slot);
  slot->taken.store(false, std::memory_order_release);
}

// Before any code of the library can throw. Where the process has no key left,
// the first throw will fail.
__attribute__((constructor(101))) void MakeKey() {
  if (pthread_key_create(&key, Release) != 0) key = PTHREAD_KEYS_MAX;
}

Slot* TakeSlot() {
  for (Slot& slot : slots) {
    if (!slot.taken.exchange(true, std::memory_order_acquire)) {
      slot.globals = {};
      return &slot;
    }
  }
  return static_cast<Slot*>(std::calloc(1, sizeof(Slot)));
}

}  // namespace

extern "C" __cxa_eh_globals* __cxa_get_globals() noexcept {
  auto* slot = static_cast<Slot*>(pthread_getspecific(key));
  if (slot == nullptr) {
    slot = TakeSlot();
    // What libstdc++ and the C library would do, too.
    if (slot == nullptr || pthread_setspecific(key, slot) != 0) std::abort();
  }
  return &slot->globals;
}

extern "C" __cxa_eh_globals* __cxa_get_globals_fast() noexcept {
  return __cxa_get_globals();
}

}  // namespace __cxxabiv1
