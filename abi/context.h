#ifndef TENON_ABI_CONTEXT_H_
#define TENON_ABI_CONTEXT_H_

#include <atomic>
#include <memory>

#include "abi/tenon.h"
#include "engine/moe_kernel_file.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"
#include "ops/linear/cublas_lt.h"

namespace tenon::abi {

// Measured sizes of the expert kernels.
struct MoeKernels {
  MoeKernelFile file;
  MoeKernelTable table;  // of file
};

// What ops of a device share; behind a tenon_context.
struct Context {
  ~Context() { delete moe_kernels.load(); }

  Device device;
  std::unique_ptr<CpuThreadPool> threads;  // on the CPU alone
  std::unique_ptr<CublasLt> cublas_lt;     // on CUDA, where it is used
  // Null, then set once: calls of other threads may be reading it.
  std::atomic<const MoeKernels*> moe_kernels{nullptr};
};

// The most CPU threads that a caller may ask for.
inline constexpr int32_t kMaxThreads = 1024;

// A device of this host by its TENON_DEVICE_* and index. Unavailable where
// there is no such one. `prefix` stands before the names of the two fields in
// messages: "" or "options.".
Status ReadDevice(const char* prefix, int32_t device_type, int32_t device_index,
                  Device* device);
int32_t DeviceTypeCode(DeviceType type);

}  // namespace tenon::abi

#endif  // TENON_ABI_CONTEXT_H_
