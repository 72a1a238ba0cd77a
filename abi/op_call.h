#ifndef TENON_ABI_OP_CALL_H_
#define TENON_ABI_OP_CALL_H_

#include <initializer_list>

#include "abi/call.h"
#include "abi/context.h"
#include "abi/handles.h"
#include "abi/tenon.h"
#include "abi/tensors.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

// What the functions of all ops do alike. An op brings a function that reads
// its arguments into the parameters of the C++ op:
//   Status ReadRmsNorm(const tenon_rms_norm_args&, OpCall*, RmsNormParams*);

namespace tenon::abi {

// A tensor of an op's arguments and the view to fill. An optional one that is
// not given leaves it as it is, not present.
struct TensorArg {
  const char* name;
  const DLTensor* tensor;
  TensorView* view;
  bool optional = false;
};

inline TensorArg Optional(const char* name, const DLTensor* tensor,
                          TensorView* view) {
  return {name, tensor, view, true};
}

// One call of an op, with its context, if any, kept alive.
class OpCall {
 public:
  explicit OpCall(TensorData data) : data_(data) {}

  Status SetContext(tenon_context context);

  // Requires all tensors to be on one device, the context's if there is one.
  Status ReadTensors(std::initializer_list<TensorArg> args);

  // Where the op runs. After ReadTensors.
  Status MakeStream(void* stream, Stream* out) const;

  // Null where the context has none.
  CublasLt* cublas_lt() const;
  const MoeKernelTable* moe_kernels() const;

 private:
  TensorData data_;
  Pin<Context> context_;
  Device device_;
  const char* device_of_ = nullptr;  // whose device that is; null: no one's yet
};

// Requires no bits but those of `known`.
Status CheckFlags(const char* field, uint32_t flags, uint32_t known);

// Requires the scales of float8_e4m3 weights.
Status CheckScalesGiven(const char* name, const DLTensor* scales,
                        const TensorView& weights);

// A field for which 0 means 1.
template <class T>
T ZeroMeansOne(T value) {
  return value == T{0} ? T{1} : value;
}

// Reads the arguments of a call on `context`, which may be 0.
template <class Args, class Params>
Status ReadCall(tenon_context context, const Args* args,
                Status (*read)(const Args&, OpCall*, Params*), OpCall* call,
                Params* params) {
  Args known;
  TENON_RETURN_IF_ERROR(ReadStruct("args", args, &known));
  TENON_RETURN_IF_ERROR(call->SetContext(context));
  return read(known, call, params);
}

template <class Args, class Params>
int32_t RunOp(const char* function, tenon_context context, const Args* args,
              void* stream, tenon_error* error,
              Status (*read)(const Args&, OpCall*, Params*),
              Status (*op)(const Params&, Stream)) {
  return Call(function, error, [&]() -> Status {
    OpCall call(TensorData::kUsed);
    Params params;
    Stream where;
    TENON_RETURN_IF_ERROR(ReadCall(context, args, read, &call, &params));
    TENON_RETURN_IF_ERROR(call.MakeStream(stream, &where));
    return op(params, where);
  });
}

template <class Args, class Params>
int32_t QueryWorkspace(const char* function, tenon_context context,
                       const Args* args, uint64_t* bytes, tenon_error* error,
                       Status (*read)(const Args&, OpCall*, Params*),
                       Status (*validate)(const Params&),
                       size_t (*workspace_bytes)(const Params&)) {
  return Call(function, error, [&]() -> Status {
    OpCall call(TensorData::kIgnored);
    Params params;
    TENON_RETURN_IF_ERROR(ReadCall(context, args, read, &call, &params));
    TENON_RETURN_IF_ERROR(CheckPresent("bytes", bytes));
    TENON_RETURN_IF_ERROR(validate(params));
    *bytes = workspace_bytes(params);
    return Status();
  });
}

}  // namespace tenon::abi

#endif  // TENON_ABI_OP_CALL_H_
