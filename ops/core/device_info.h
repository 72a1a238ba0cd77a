#ifndef TENON_OPS_CORE_DEVICE_INFO_H_
#define TENON_OPS_CORE_DEVICE_INFO_H_

#include <cstdint>
#include <string>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// What kernel choices and messages need to know of a device.
struct DeviceInfo {
  Device device;
  std::string name;
  int32_t num_cores = 0;           // multiprocessors, or usable CPUs
  int32_t compute_capability = 0;  // 90 for 9.0; 0 on the CPU
  int64_t l2_bytes = 0;            // last-level cache on the CPU; 0: unknown
  int64_t total_memory_bytes = 0;
};

// Unavailable where there is no such device or no driver for it.
StatusOr<DeviceInfo> GetDeviceInfo(Device device);

// CUDA devices of this host; 0 without a driver or in a CPU-only build.
int NumCudaDevices();

// The widest vector instructions that CPU ops use on this host.
enum class CpuIsa { kGeneric, kAvx2, kAvx512 };
CpuIsa DetectCpuIsa();
const char* CpuIsaName(CpuIsa isa);

}  // namespace tenon

#endif  // TENON_OPS_CORE_DEVICE_INFO_H_
