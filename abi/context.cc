#include "abi/context.h"

#include <memory>
#include <utility>

#include "abi/call.h"
#include "abi/handles.h"

namespace tenon::abi {
namespace {

Status CreateOnCpu(const tenon_context_options& options, Context* context) {
  if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
    return InvalidArgumentError("options.num_threads is ", options.num_threads,
                                ", expected 0 to ", kMaxThreads);
  }
  if (options.cublas_lt != 0) {
    return InvalidArgumentError("options.cublas_lt is ", options.cublas_lt,
                                ", expected 0 on the CPU");
  }
  context->threads = std::make_unique<CpuThreadPool>(options.num_threads);
  return Status();
}

Status CreateOnCuda(const tenon_context_options& options, Context* context) {
  if (options.num_threads != 0) {
    return InvalidArgumentError("options.num_threads is ", options.num_threads,
                                ", expected 0 on CUDA");
  }
  switch (options.cublas_lt) {
    case TENON_CUBLAS_LT_OFF:
      return Status();
    case TENON_CUBLAS_LT_IF_FOUND:
    case TENON_CUBLAS_LT_REQUIRED:
      break;
    default:
      return InvalidArgumentError("options.cublas_lt is ", options.cublas_lt,
                                  ", expected 0 to 2");
  }
  auto cublas_lt = CublasLt::Create(context->device);
  if (cublas_lt.ok()) {
    context->cublas_lt = *std::move(cublas_lt);
    return Status();
  }
  const bool is_missing = cublas_lt.status().code() == StatusCode::kUnavailable;
  return is_missing && options.cublas_lt == TENON_CUBLAS_LT_IF_FOUND
             ? Status()
             : cublas_lt.status();
}

Status CreateContext(const tenon_context_options* from, tenon_context* handle) {
  tenon_context_options options;
  TENON_RETURN_IF_ERROR(ReadStruct("options", from, &options));
  TENON_RETURN_IF_ERROR(CheckPresent("context", handle));
  TENON_RETURN_IF_ERROR(CheckReserved("options.reserved", options.reserved));
  auto context = std::make_unique<Context>();
  TENON_RETURN_IF_ERROR(ReadDevice("options.", options.device_type,
                                   options.device_index, &context->device));
  TENON_RETURN_IF_ERROR(context->device.type == DeviceType::kCpu
                            ? CreateOnCpu(options, context.get())
                            : CreateOnCuda(options, context.get()));
  const StatusOr<uint64_t> added = AddHandle(std::move(context));
  TENON_RETURN_IF_ERROR(added.status());
  *handle = *added;
  return Status();
}

Status QueryContext(tenon_context handle, tenon_context_info* to) {
  Pin<Context> context;
  TENON_RETURN_IF_ERROR(PinHandle("context", handle, &context));
  tenon_context_info info = {};
  info.device_type = DeviceTypeCode(context->device.type);
  info.device_index = context->device.index;
  if (context->threads) info.num_threads = context->threads->num_threads();
  if (context->cublas_lt)
    info.cublas_lt_version = context->cublas_lt->version();
  if (const MoeKernels* kernels = context->moe_kernels) {
    const MoeKernelTable& table = kernels->table;
    info.num_moe_kernels =
        table.float32.count + table.float16.count + table.float8.count;
  }
  return WriteStruct("info", info, to);
}

Status SetMoeKernels(tenon_context handle, const char* json) {
  Pin<Context> context;
  TENON_RETURN_IF_ERROR(PinHandle("context", handle, &context));
  TENON_RETURN_IF_ERROR(CheckPresent("json", json));
  StatusOr<MoeKernelFile> file = ParseMoeKernelFile(json, "json");
  TENON_RETURN_IF_ERROR(file.status());
  auto kernels = std::make_unique<MoeKernels>();
  kernels->file = *std::move(file);
  kernels->table = kernels->file.table();
  const MoeKernels* none = nullptr;
  if (!context->moe_kernels.compare_exchange_strong(none, kernels.get())) {
    return FailedPreconditionError("context is ", handle,
                                   ", which has sizes of kernels already");
  }
  kernels.release();  // it is the context's
  return Status();
}

}  // namespace
}  // namespace tenon::abi

int32_t tenon_context_create(const tenon_context_options* options,
                             tenon_context* context, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::CreateContext(options, context);
  });
}

int32_t tenon_context_query(tenon_context context, tenon_context_info* info,
                            tenon_error* error) {
  return tenon::abi::Call(
      __func__, error, [&] { return tenon::abi::QueryContext(context, info); });
}

int32_t tenon_context_set_moe_kernels(tenon_context context, const char* json,
                                      tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::SetMoeKernels(context, json);
  });
}

int32_t tenon_context_destroy(tenon_context context, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::DestroyHandle("context",
                                     tenon::abi::HandleKind::kContext, context);
  });
}
