#include "abi/handles.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>

#include "abi/context.h"
#include "abi/model.h"
#include "abi/session.h"

namespace tenon::abi {
namespace {

// A handle is serial << 12 | slot. Serials would run out after 2^46 objects and
// sequences: two years of one each microsecond.
constexpr int kSlotBits = 12;
static_assert(1 << kSlotBits == kMaxHandles);

// A slot's state is one word, so that one compare-and-swap both recognises an
// object and keeps it: the serial, the kind, which is kNone once the object is
// destroyed, and the number of owners: each Pin, and the handle while it lives.
// A free slot is 0.
constexpr int kKindShift = 16;
constexpr int kSerialShift = 18;
constexpr uint64_t kCountMask = (uint64_t{1} << kKindShift) - 1;
constexpr uint64_t kKindMask = uint64_t{3} << kKindShift;

constexpr uint64_t Word(uint64_t serial, HandleKind kind, uint64_t count) {
  return serial << kSerialShift | static_cast<uint64_t>(kind) << kKindShift |
         count;
}

constexpr HandleKind KindOf(uint64_t word) {
  return static_cast<HandleKind>((word & kKindMask) >> kKindShift);
}

// All of this is zeros when the library is loaded, and nothing is destroyed at
// exit, when other threads may still be in calls.
struct Slot {
  std::atomic<uint64_t> word{0};
  void* object = nullptr;
  void (*destroy)(void* object) = nullptr;
};
Slot g_slots[kMaxHandles];
std::atomic<uint64_t> g_last_serial{0};

// Where fork() is noticed: the kernel gives a child zeros in place of this
// page.
constexpr size_t kPageBytes = 4096;
struct alignas(kPageBytes) ForkPage {
  // Serials of this process's handles begin here; lower ones are of a parent.
  // 0: none was made yet.
  std::atomic<uint64_t> first_serial{0};
};
ForkPage g_fork_page;
static_assert(sizeof(ForkPage) == kPageBytes);

// Before the first handle of this process.
Status PrepareForkPage() {
  if (g_fork_page.first_serial.load(std::memory_order_relaxed) != 0) {
    return Status();
  }
  const bool is_wiped =
      sysconf(_SC_PAGESIZE) == static_cast<long>(kPageBytes) &&
      madvise(&g_fork_page, sizeof(g_fork_page), MADV_WIPEONFORK) == 0;
  // Linux before 4.14, or larger pages.
  const auto wipe = [] { g_fork_page.first_serial.store(0); };
  if (!is_wiped && pthread_atfork(nullptr, nullptr, wipe) != 0) {
    return ResourceExhaustedError("out of host memory");
  }
  uint64_t none = 0;
  g_fork_page.first_serial.compare_exchange_strong(none,
                                                   g_last_serial.load() + 1);
  return Status();
}

const char* KindName(HandleKind kind) {
  switch (kind) {
    case HandleKind::kContext:
      return "context";
    case HandleKind::kModel:
      return "model";
    case HandleKind::kSession:
      return "session";
    case HandleKind::kNone:
      break;
  }
  return "object";
}

Slot& SlotOf(uint64_t handle) { return g_slots[handle % kMaxHandles]; }

// Whether `word` is that of the object that the handle names.
bool Names(uint64_t handle, HandleKind kind, uint64_t word) {
  return handle != 0 && word >> kSerialShift == handle >> kSlotBits &&
         KindOf(word) == kind;
}

// Why `handle` names no object of this kind.
Status LookupError(const char* name, HandleKind kind, uint64_t handle) {
  const char* expected = KindName(kind);
  if (handle == 0) return NotFoundError(name, " is 0, no ", expected);
  const uint64_t serial = handle >> kSlotBits;
  const uint64_t word = SlotOf(handle).word.load(std::memory_order_relaxed);
  const HandleKind found = KindOf(word);
  if (word >> kSerialShift == serial && found != HandleKind::kNone) {
    return NotFoundError(name, " is ", handle, ", a handle of a ",
                         KindName(found), ", expected one of a ", expected);
  }
  return NotFoundError(name, " is ", handle, ", which names no ", expected,
                       serial <= g_last_serial.load(std::memory_order_relaxed)
                           ? " (any more)"
                           : "");
}

// Of a handle made before fork(): the object is a copy without its threads, and
// its device memory is the parent's.
Status CheckFork(const char* name, uint64_t handle) {
  const uint64_t first =
      g_fork_page.first_serial.load(std::memory_order_relaxed);
  const uint64_t serial = handle >> kSlotBits;
  if (first != 0 && serial >= first) return Status();
  if (serial == 0 || serial > g_last_serial.load(std::memory_order_relaxed)) {
    return Status();  // made up, not a parent's
  }
  return FailedPreconditionError(
      name, " is ", handle,
      ", which was made before fork(); a child process makes its own");
}

template <class Object>
StatusOr<uint64_t> Add(HandleKind kind, std::unique_ptr<Object> object) {
  TENON_RETURN_IF_ERROR(PrepareForkPage());
  const uint64_t serial = NextSerial();
  for (uint64_t i = 0; i < kMaxHandles; ++i) {
    const uint64_t index = (serial + i) % kMaxHandles;
    Slot& slot = g_slots[index];
    uint64_t word = 0;
    if (!slot.word.compare_exchange_strong(word,
                                           Word(serial, HandleKind::kNone, 1),
                                           std::memory_order_acquire)) {
      continue;
    }
    slot.object = object.release();
    slot.destroy = [](void* dead) { delete static_cast<Object*>(dead); };
    slot.word.store(Word(serial, kind, 1), std::memory_order_release);
    return serial << kSlotBits | index;
  }
  return ResourceExhaustedError("all ", kMaxHandles,
                                " handles (contexts, models and sessions "
                                "together) are in use");
}

// Drops one owner; the last one deletes the object.
void Drop(Slot* slot) {
  const uint64_t before = slot->word.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & kCountMask) != 1) return;
  slot->destroy(slot->object);
  slot->word.store(0, std::memory_order_release);
}

template <class Object>
Status PinObject(const char* name, HandleKind kind, uint64_t handle,
                 Pin<Object>* pin) {
  TENON_RETURN_IF_ERROR(CheckFork(name, handle));
  Slot& slot = SlotOf(handle);
  uint64_t word = slot.word.load(std::memory_order_relaxed);
  while (Names(handle, kind, word)) {
    if ((word & kCountMask) == kCountMask) {
      return ResourceExhaustedError(name, " is in use by ", kCountMask - 1,
                                    " calls at a time");
    }
    if (slot.word.compare_exchange_weak(word, word + 1,
                                        std::memory_order_acquire,
                                        std::memory_order_relaxed)) {
      *pin = Pin<Object>(static_cast<Object*>(slot.object),
                         static_cast<uint32_t>(handle % kMaxHandles));
      return Status();
    }
  }
  return LookupError(name, kind, handle);
}

}  // namespace

template <class Object>
Pin<Object>::~Pin() {
  if (object_ != nullptr) Drop(&g_slots[slot_]);
}
template class Pin<Context>;
template class Pin<ModelObject>;
template class Pin<SessionObject>;

StatusOr<uint64_t> AddHandle(std::unique_ptr<Context> object) {
  return Add(HandleKind::kContext, std::move(object));
}
StatusOr<uint64_t> AddHandle(std::unique_ptr<ModelObject> object) {
  return Add(HandleKind::kModel, std::move(object));
}
StatusOr<uint64_t> AddHandle(std::unique_ptr<SessionObject> object) {
  return Add(HandleKind::kSession, std::move(object));
}

Status PinHandle(const char* name, uint64_t handle, Pin<Context>* pin) {
  return PinObject(name, HandleKind::kContext, handle, pin);
}
Status PinHandle(const char* name, uint64_t handle, Pin<ModelObject>* pin) {
  return PinObject(name, HandleKind::kModel, handle, pin);
}
Status PinHandle(const char* name, uint64_t handle, Pin<SessionObject>* pin) {
  return PinObject(name, HandleKind::kSession, handle, pin);
}

Status DestroyHandle(const char* name, HandleKind kind, uint64_t handle) {
  if (handle == 0) return Status();
  TENON_RETURN_IF_ERROR(CheckFork(name, handle));
  Slot& slot = SlotOf(handle);
  uint64_t word = slot.word.load(std::memory_order_relaxed);
  while (Names(handle, kind, word)) {
    // From here on no Pin can be made, and only one caller gets past.
    if (slot.word.compare_exchange_weak(word, word & ~kKindMask,
                                        std::memory_order_relaxed)) {
      Drop(&slot);
      return Status();
    }
  }
  return LookupError(name, kind, handle);
}

uint64_t NextSerial() {
  return g_last_serial.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace tenon::abi
