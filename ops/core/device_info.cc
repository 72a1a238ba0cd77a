#include "ops/core/device_info.h"

#include <sched.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <fstream>

#include "ops/core/build_config.h"
#include "ops/core/core_backend.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

std::string CpuModelName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "CPU";
}

#if defined(__x86_64__)
// __builtin_cpu_supports of some compilers does not know "f16c".
bool SupportsF16c() {
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

DeviceInfo GetCpuInfo() {
  DeviceInfo info;
  info.name = StrCat(CpuModelName(), " (", CpuIsaName(DetectCpuIsa()), ")");
  cpu_set_t set;
  info.num_cores =
      sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  info.l2_bytes = std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE));
  info.total_memory_bytes =
      int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  return info;
}

}  // namespace

StatusOr<DeviceInfo> GetDeviceInfo(Device device) {
  DeviceInfo info;
  switch (device.type) {
    case DeviceType::kCpu:
      info = GetCpuInfo();
      break;
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) {
        TENON_RETURN_IF_ERROR(cuda::GetInfo(device, &info));
        break;
      }
      return NoBackendError("GetDeviceInfo", device);
  }
  info.device = device;
  return info;
}

int NumCudaDevices() {
  if constexpr (kCudaBuilt) return cuda::NumDevices();
  return 0;
}

CpuIsa DetectCpuIsa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      SupportsF16c() && __builtin_cpu_supports("bmi2")) {
    return CpuIsa::kAvx2;
  }
#endif
  return CpuIsa::kGeneric;
}

const char* CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx512:
      return "AVX-512";
    case CpuIsa::kAvx2:
      return "AVX2";
    case CpuIsa::kGeneric:
      break;
  }
  return "generic";
}

}  // namespace tenon
