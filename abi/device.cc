#include <algorithm>
#include <cstring>

#include "abi/call.h"
#include "abi/context.h"
#include "ops/core/device_info.h"

namespace tenon::abi {
namespace {

Status CountDevices(const char* prefix, int32_t device_type, int32_t* count) {
  switch (device_type) {
    case TENON_DEVICE_CPU:
      *count = 1;
      return Status();
    case TENON_DEVICE_CUDA:
      *count = NumCudaDevices();
      return Status();
    default:
      return InvalidArgumentError(prefix, "device_type is ", device_type,
                                  ", expected 1 (CPU) or 2 (CUDA)");
  }
}

int32_t IsaCode(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return TENON_CPU_ISA_AVX512;
    case CpuIsa::kAvx2:
      return TENON_CPU_ISA_AVX2;
    case CpuIsa::kGeneric:
      break;
  }
  return TENON_CPU_ISA_GENERIC;
}

tenon_device_info ToC(const DeviceInfo& from) {
  tenon_device_info info = {};
  info.device_type = DeviceTypeCode(from.device.type);
  info.device_index = from.device.index;
  info.num_cores = from.num_cores;
  info.compute_capability = from.compute_capability;
  if (from.device.type == DeviceType::kCpu) {
    info.cpu_isa = IsaCode(DetectCpuIsa());
  }
  info.total_memory_bytes = from.total_memory_bytes;
  info.l2_bytes = from.l2_bytes;
  std::memcpy(info.name, from.name.data(),
              std::min(from.name.size(), sizeof(info.name) - 1));
  return info;
}

}  // namespace

int32_t DeviceTypeCode(DeviceType type) {
  return type == DeviceType::kCpu ? TENON_DEVICE_CPU : TENON_DEVICE_CUDA;
}

Status ReadDevice(const char* prefix, int32_t device_type, int32_t device_index,
                  Device* device) {
  int32_t count;
  TENON_RETURN_IF_ERROR(CountDevices(prefix, device_type, &count));
  const bool is_cpu = device_type == TENON_DEVICE_CPU;
  if (device_index < 0) {
    return InvalidArgumentError(prefix, "device_index is ", device_index,
                                ", expected >= 0");
  }
  if (device_index >= count) {
    return UnavailableError(prefix, "device_index is ", device_index,
                            ", but the number of usable ",
                            is_cpu ? "CPU" : "CUDA", " devices is ", count);
  }
  *device = {is_cpu ? DeviceType::kCpu : DeviceType::kCuda, device_index};
  return Status();
}

}  // namespace tenon::abi

using tenon::Status;

int32_t tenon_device_count(int32_t device_type, int32_t* count,
                           tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&]() -> Status {
    TENON_RETURN_IF_ERROR(tenon::abi::CheckPresent("count", count));
    return tenon::abi::CountDevices("", device_type, count);
  });
}

int32_t tenon_device_query(int32_t device_type, int32_t device_index,
                           tenon_device_info* info, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&]() -> Status {
    tenon::Device device;
    TENON_RETURN_IF_ERROR(
        tenon::abi::ReadDevice("", device_type, device_index, &device));
    const auto found = tenon::GetDeviceInfo(device);
    TENON_RETURN_IF_ERROR(found.status());
    return tenon::abi::WriteStruct("info", tenon::abi::ToC(*found), info);
  });
}
