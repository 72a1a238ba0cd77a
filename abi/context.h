#ifndef TENON_ABI_CONTEXT_H_
#define TENON_ABI_CONTEXT_H_

#include <memory>

#include "abi/handles.h"
#include "abi/tenon.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"
#include "ops/linear/cublas_lt.h"

namespace tenon::abi {

// What ops of a device share; behind a tenon_context.
struct Context {
  Device device;
  std::unique_ptr<CpuThreadPool> threads;  // on the CPU alone
  std::unique_ptr<CublasLt> cublas_lt;     // on CUDA, where it is used
};

// TENON_DEVICE_* as they cross the ABI. `prefix` stands before the names of the
// two fields in messages: "" or "options.".
Status ReadDevice(const char* prefix, int32_t device_type, int32_t device_index,
                  Device* device);
int32_t DeviceTypeCode(DeviceType type);

// The context of a call, or none, kept alive while the call runs.
class OpContext {
 public:
  // Finds `context` (0: none). Its device must be `device`, that of the
  // tensor called `field`.
  Status Enter(tenon_context context, const char* field, Device device);

  // Where the op runs, for the caller's `stream`; null on the CPU.
  Status MakeStream(void* stream, Stream* out) const;

  CublasLt* cublas_lt() const;

 private:
  Device device_;
  Pin<Context> pin_;
};

}  // namespace tenon::abi

#endif  // TENON_ABI_CONTEXT_H_
