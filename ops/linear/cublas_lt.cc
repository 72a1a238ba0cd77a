#include "ops/linear/cublas_lt.h"

#include "ops/core/build_config.h"
#include "ops/core/validate.h"
#include "ops/linear/linear_backend.h"

namespace tenon {

StatusOr<std::unique_ptr<CublasLt>> CublasLt::Create(Device device) {
  if (device.type != DeviceType::kCuda) {
    return InvalidArgumentError("CublasLt: device is ",
                                DeviceTypeName(device.type), ":", device.index,
                                ", expected a CUDA device");
  }
  if constexpr (kCudaBuilt) {
    std::unique_ptr<CublasLt> opened(new CublasLt(nullptr));
    StatusOr<State*> state = OpenCublasLt(device);
    if (!state.ok()) return state.status();
    opened->state_ = *state;
    return opened;
  }
  return NoBackendError("CublasLt", device);
}

CublasLt::~CublasLt() {
  if constexpr (kCudaBuilt) {
    if (state_ != nullptr) CloseCublasLt(state_);
  }
}

Device CublasLt::device() const {
  if constexpr (kCudaBuilt) return CublasLtDevice(*state_);
  return Device();
}

size_t CublasLt::version() const {
  if constexpr (kCudaBuilt) return CublasLtVersion(*state_);
  return 0;
}

}  // namespace tenon
