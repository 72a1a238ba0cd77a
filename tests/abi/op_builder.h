#ifndef TENON_TESTS_ABI_OP_BUILDER_H_
#define TENON_TESTS_ABI_OP_BUILDER_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "abi/call.h"
#include "tests/abi/op_cases.h"
#include "tests/testing/random.h"

// Puts an op's two calls together, for op_cases*.cc.

namespace tenon::abi_test {

using testing::Normal;
using testing::Target;
using testing::TestTensor;

constexpr int64_t kHidden = 64;
constexpr int64_t kTopK = 2;
constexpr int64_t kExperts = 4;

// What a tensor holds. Without values: poison, as an output starts.
struct Content {
  DType dtype;
  std::vector<int64_t> shape;
  int64_t padding = 0;  // elements after each row
  std::vector<float> floats = {};
  std::vector<int64_t> integers = {};
};

inline int64_t Count(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  return count;
}

inline Content Floats(DType dtype, std::vector<int64_t> shape, int64_t padding,
                      uint64_t seed) {
  std::vector<float> values = Normal(Count(shape), seed);
  return {dtype, std::move(shape), padding, std::move(values)};
}

inline Content Integers(DType dtype, std::vector<int64_t> shape,
                        std::vector<int64_t> values) {
  return {dtype, std::move(shape), 0, {}, std::move(values)};
}

inline std::vector<int64_t> Strides(const Content& content) {
  std::vector<int64_t> strides(content.shape.size(), 1);
  for (size_t i = strides.size() - 1; i-- > 0;) {
    strides[i] = strides[i + 1] * content.shape[i + 1];
    if (i + 2 == strides.size()) strides[i] += content.padding;
  }
  return strides;
}

inline TestTensor MakeTestTensor(Device device, const Content& content) {
  if (!content.integers.empty()) {
    return TestTensor::FromIntegers(device, content.dtype, content.shape,
                                    content.integers);
  }
  return TestTensor(device, content.dtype, content.shape, Strides(content),
                    content.floats);
}

inline DLDataType DlTypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {TENON_DL_FLOAT, 32, 1};
    case DType::kFloat16:
      return {TENON_DL_FLOAT, 16, 1};
    case DType::kBFloat16:
      return {TENON_DL_BFLOAT, 16, 1};
    case DType::kFloat8E4M3:
      return {TENON_DL_FLOAT8_E4M3FN, 8, 1};
    case DType::kInt32:
      return {TENON_DL_INT, 32, 1};
    case DType::kInt64:
      return {TENON_DL_INT, 64, 1};
    default:
      return {TENON_DL_UINT, 8, 1};
  }
}

inline std::unique_ptr<Operand> MakeOperand(Device device, const char* name,
                                            const Content& content) {
  constexpr uint64_t kByteOffset = 64;
  auto operand = std::make_unique<Operand>();
  operand->name = name;
  operand->c = MakeTestTensor(device, content);
  operand->cpp = MakeTestTensor(device, content);
  const TensorView& view = operand->c.view();
  operand->shape = content.shape;
  operand->strides.assign(view.stride, view.stride + view.rank);
  DLTensor& tensor = operand->tensor;
  tensor.data = view.As<char>() - kByteOffset;
  tensor.device.device_type =
      device.type == DeviceType::kCpu ? TENON_DL_CPU : TENON_DL_CUDA;
  tensor.device.device_id = device.index;
  tensor.ndim = view.rank;
  tensor.dtype = DlTypeOf(content.dtype);
  tensor.shape = operand->shape.data();
  tensor.strides = operand->strides.data();
  tensor.byte_offset = kByteOffset;
  return operand;
}

template <class Args, class Params>
class Builder {
 public:
  Builder(const Target& target, const char* function,
          int32_t (*c)(tenon_context, const Args*, void*, tenon_error*),
          Status (*cpp)(const Params&, Stream))
      : device_(target.device),
        op_(std::make_unique<OpCase>()),
        args_(std::make_shared<Args>()),
        params_(std::make_shared<Params>()) {
    args_->struct_size = sizeof(Args);
    op_->function = function;
    op_->first_struct_size = static_cast<uint32_t>(abi::kFirstSize<Args>);
    op_->args_ = args_;
    op_->params_ = params_;
    op_->call = [c, args = args_.get()](tenon_context context, void* stream,
                                        tenon_error* error) {
      return c(context, args, stream, error);
    };
    op_->call_cpp = [cpp, params = params_.get()](Stream stream) {
      return cpp(*params, stream);
    };
  }

  Args& args() { return *args_; }
  Params& params() { return *params_; }

  // Returns the C++ call's view.
  TensorView Add(const char* name, const DLTensor* Args::*field,
                 const Content& content) {
    op_->operands.push_back(MakeOperand(device_, name, content));
    Operand& operand = *op_->operands.back();
    operand.field = &((*args_).*field);
    *operand.field = &operand.tensor;
    return operand.cpp.view();
  }
  TensorView AddOptional(const char* name, const DLTensor* Args::*field,
                         const Content& content) {
    const TensorView view = Add(name, field, content);
    op_->operands.back()->optional = true;
    return view;
  }

  void SetQuery(int32_t (*c)(tenon_context, const Args*, uint64_t*,
                             tenon_error*),
                size_t (*cpp)(const Params&)) {
    op_->query = [c, args = args_.get()](tenon_context context, uint64_t* bytes,
                                         tenon_error* error) {
      return c(context, args, bytes, error);
    };
    op_->query_cpp = [cpp, params = params_.get()] { return cpp(*params); };
    op_->workspace = &args_->workspace;
    op_->workspace_size = &args_->workspace_size;
    op_->cpp_workspace = &params_->workspace;
    op_->cpp_workspace_size = &params_->workspace_size;
  }

  OpCasePtr Finish() { return std::move(op_); }

 private:
  Device device_;
  OpCasePtr op_;
  std::shared_ptr<Args> args_;
  std::shared_ptr<Params> params_;
};

// Expert ids of every slot; one is no expert.
inline std::vector<int64_t> ExpertIds(int64_t tokens) {
  std::vector<int64_t> ids;
  for (int64_t slot = 0; slot < tokens * kTopK; ++slot) {
    ids.push_back(slot == 3 ? -1 : (slot * 7 + slot / 2) % kExperts);
  }
  return ids;
}

// The slots of ExpertIds by expert, as MoeAlign makes them.
inline std::pair<std::vector<int64_t>, std::vector<int64_t>> SlotsByExpert(
    int64_t tokens) {
  const std::vector<int64_t> ids = ExpertIds(tokens);
  std::vector<int64_t> offsets = {0};
  std::vector<int64_t> slots;
  for (int64_t expert = 0; expert < kExperts; ++expert) {
    for (size_t slot = 0; slot < ids.size(); ++slot) {
      if (ids[slot] == expert) slots.push_back(static_cast<int64_t>(slot));
    }
    offsets.push_back(static_cast<int64_t>(slots.size()));
  }
  slots.resize(ids.size(), -1);
  return {offsets, slots};
}

}  // namespace tenon::abi_test

#endif  // TENON_TESTS_ABI_OP_BUILDER_H_
