#ifndef TENON_OPS_CORE_WORKSPACE_H_
#define TENON_OPS_CORE_WORKSPACE_H_

#include <cstddef>
#include <cstdint>

namespace tenon {

// Cuts one buffer into pieces that start 256 bytes apart or a multiple of it.
// On a null buffer it only counts (and the pieces must not be used), so that
// one function can both lay out a workspace and tell its size.
class WorkspaceCutter {
 public:
  explicit WorkspaceCutter(void* buffer)
      : begin_(reinterpret_cast<uintptr_t>(buffer)) {}

  template <class T>
  T* Take(int64_t count) {
    return static_cast<T*>(TakeBytes(static_cast<size_t>(count) * sizeof(T)));
  }
  void* TakeBytes(size_t bytes) {
    void* piece = reinterpret_cast<void*>(begin_ + size_);
    size_ += (bytes + 255) / 256 * 256;
    return piece;
  }

  // Of all pieces so far.
  size_t size() const { return size_; }

 private:
  uintptr_t begin_;
  size_t size_ = 0;
};

}  // namespace tenon

#endif  // TENON_OPS_CORE_WORKSPACE_H_
