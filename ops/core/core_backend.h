#ifndef TENON_OPS_CORE_CORE_BACKEND_H_
#define TENON_OPS_CORE_CORE_BACKEND_H_

#include <cstddef>

#include "ops/core/device_info.h"
#include "ops/core/graph.h"
#include "ops/core/memory.h"

// What core needs from CUDA; defined in core_cuda.cu. Private to ops/core.

namespace tenon::cuda {

int NumDevices();
Status GetInfo(Device device, DeviceInfo* info);
Status Allocate(Device device, MemoryKind kind, size_t bytes, void** data);
void Free(Device device, MemoryKind kind, void* data);
Status Copy(Device device, void* to, const void* from, size_t bytes,
            Stream stream);
Status CopyPinned(Device device, void* to, const void* from, size_t bytes,
                  Stream stream);
Status CopyPinnedRows(Device device, void* to, const void* from, int64_t rows,
                      int64_t words, int64_t stride, Stream stream);
Status Fill(Device device, void* data, int byte, size_t bytes, Stream stream);
Status Synchronize(Device device, Stream stream);
Status CreateStream(Device device, void** stream);
void DestroyStream(Device device, void* stream);

Status BeginCapture(Device device, Stream stream);
// Ends what BeginCapture began, on an error too.
Status EndCapture(Device device, Stream stream, GraphInfo* info, void** graph);
// The same for a capture whose work failed.
void AbandonCapture(Device device, Stream stream);
Status LaunchGraph(Device device, void* graph, Stream stream);
void DestroyGraph(Device device, void* graph);

Status CreateEvent(Device device, void** event);
Status RecordEvent(Device device, void* event, Stream stream);
Status WaitForEvent(Device device, void* event);
void DestroyEvent(Device device, void* event);

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_CORE_BACKEND_H_
