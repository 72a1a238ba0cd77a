#ifndef TENON_OPS_CORE_CORE_BACKEND_H_
#define TENON_OPS_CORE_CORE_BACKEND_H_

#include <cstddef>

#include "ops/core/device_info.h"
#include "ops/core/memory.h"

// What core needs from CUDA; defined in core_cuda.cu. Private to ops/core.

namespace tenon::cuda {

int NumDevices();
Status GetInfo(Device device, DeviceInfo* info);
Status Allocate(Device device, MemoryKind kind, size_t bytes, void** data);
void Free(Device device, MemoryKind kind, void* data);
Status Copy(Device device, void* to, const void* from, size_t bytes,
            Stream stream);
Status Fill(Device device, void* data, int byte, size_t bytes, Stream stream);
Status Synchronize(Device device, Stream stream);
Status CreateStream(Device device, void** stream);
void DestroyStream(Device device, void* stream);

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_CORE_BACKEND_H_
