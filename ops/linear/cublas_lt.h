#ifndef TENON_OPS_LINEAR_CUBLAS_LT_H_
#define TENON_OPS_LINEAR_CUBLAS_LT_H_

#include <memory>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// NVIDIA's matrix library cuBLASLt for one device, opened at run time so that
// hosts without it still load this one. Remembers the algorithm chosen for each
// shape. Any number of threads may use one at a time.
class CublasLt {
 public:
  // Opens libcublasLt.so.13, .12 or the unversioned one, as the dynamic linker
  // finds it, and creates a handle. Unavailable where there is none, or one too
  // old, or no such device.
  static StatusOr<std::unique_ptr<CublasLt>> Create(Device device);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  Device device() const;
  // As cublasLtGetVersion() has it, such as 130100 for 13.1.0.
  size_t version() const;

  struct State;  // private to linear's CUDA backend
  State& state() { return *state_; }

 private:
  explicit CublasLt(State* state) : state_(state) {}

  State* state_;
};

}  // namespace tenon

#endif  // TENON_OPS_LINEAR_CUBLAS_LT_H_
