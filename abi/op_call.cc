#include "abi/op_call.h"

namespace tenon::abi {
namespace {

Status DeviceError(const char* name, Device device, const char* other_name,
                   Device other) {
  return InvalidArgumentError(name, " is on ", DeviceTypeName(device.type), ":",
                              device.index, ", but ", other_name, " on ",
                              DeviceTypeName(other.type), ":", other.index);
}

}  // namespace

Status OpCall::SetContext(tenon_context context) {
  if (context == 0) return Status();
  TENON_RETURN_IF_ERROR(PinHandle("context", context, &context_));
  device_ = context_->device;
  device_of_ = "the context";
  return Status();
}

Status OpCall::ReadTensors(std::initializer_list<TensorArg> args) {
  for (const TensorArg& arg : args) {
    if (arg.tensor == nullptr) {
      if (arg.optional) continue;
      return InvalidArgumentError(arg.name, " is null");
    }
    TENON_RETURN_IF_ERROR(ReadTensor(arg.name, arg.tensor, data_, arg.view));
    if (device_of_ == nullptr) {
      device_ = arg.view->device;
      device_of_ = arg.name;
    } else if (arg.view->device != device_) {
      return DeviceError(arg.name, arg.view->device, device_of_, device_);
    }
  }
  return Status();
}

Status OpCall::MakeStream(void* stream, Stream* out) const {
  if (device_.type == DeviceType::kCuda) {
    out->cuda = stream;
    return Status();
  }
  if (stream != nullptr) {
    return InvalidArgumentError("stream is ", stream,
                                ", must be NULL for tensors on the CPU");
  }
  if (context_.get() != nullptr) out->cpu = context_->threads.get();
  return Status();
}

CublasLt* OpCall::cublas_lt() const {
  return context_.get() == nullptr ? nullptr : context_->cublas_lt.get();
}

const MoeKernelTable* OpCall::moe_kernels() const {
  if (context_.get() == nullptr) return nullptr;
  const MoeKernels* kernels =
      context_->moe_kernels.load(std::memory_order_acquire);
  return kernels == nullptr ? nullptr : &kernels->table;
}

Status CheckScalesGiven(const char* name, const DLTensor* scales,
                        const TensorView& weights) {
  if (scales != nullptr || weights.dtype != DType::kFloat8E4M3) return Status();
  return InvalidArgumentError(
      name, " is null, expected scales of float8_e4m3 weights");
}

Status CheckFlags(const char* field, uint32_t flags, uint32_t known) {
  if ((flags & ~known) == 0) return Status();
  return InvalidArgumentError(field, " is ", flags, ", expected bits of ",
                              known);
}

}  // namespace tenon::abi
