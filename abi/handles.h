#ifndef TENON_ABI_HANDLES_H_
#define TENON_ABI_HANDLES_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "abi/tenon.h"
#include "ops/core/status.h"

// The table behind the handles of contexts, models and sessions. It is the
// library's only mutable global: without one, a stale handle could not be told
// from a live one.

namespace tenon::abi {

struct Context;
struct ModelObject;
struct SessionObject;

enum class HandleKind : uint32_t { kNone, kContext, kModel, kSession };

inline constexpr int kMaxHandles = 4096;

// Keeps an object alive for the length of a call. Two atomic operations.
template <class Object>
class Pin {
 public:
  Pin() = default;
  Pin(Object* object, uint32_t slot) : object_(object), slot_(slot) {}
  Pin(Pin&& other) noexcept { *this = static_cast<Pin&&>(other); }
  Pin& operator=(Pin&& other) noexcept {
    std::swap(object_, other.object_);
    std::swap(slot_, other.slot_);
    return *this;
  }
  ~Pin();
  Object* get() const { return object_; }
  Object* operator->() const { return object_; }
  Object& operator*() const { return *object_; }

 private:
  Object* object_ = nullptr;
  uint32_t slot_ = 0;
};

// Takes ownership. ResourceExhausted when kMaxHandles are alive.
StatusOr<uint64_t> AddHandle(std::unique_ptr<Context> object);
StatusOr<uint64_t> AddHandle(std::unique_ptr<ModelObject> object);
StatusOr<uint64_t> AddHandle(std::unique_ptr<SessionObject> object);

// NotFound for a handle that is stale, of another kind or made up;
// FailedPrecondition for one that was made before fork().
Status PinHandle(const char* name, uint64_t handle, Pin<Context>* pin);
Status PinHandle(const char* name, uint64_t handle, Pin<ModelObject>* pin);
Status PinHandle(const char* name, uint64_t handle, Pin<SessionObject>* pin);

// The object dies when no Pin holds it. OK for 0.
Status DestroyHandle(const char* name, HandleKind kind, uint64_t handle);

// A number that no other object of this process has or will have: the serial
// part of handles, also of sequences.
uint64_t NextSerial();

}  // namespace tenon::abi

#endif  // TENON_ABI_HANDLES_H_
