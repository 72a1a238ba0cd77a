#ifndef TENON_TESTS_ABI_OP_CASES_H_
#define TENON_TESTS_ABI_OP_CASES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "tests/testing/op_test.h"
#include "tests/testing/test_tensor.h"

// A small valid call of every op, through its C function and, on equal copies
// of all tensors, through the C++ op.

namespace tenon::abi_test {

// A tensor of a call.
struct Operand {
  std::string name;
  bool optional = false;
  testing::TestTensor c;
  testing::TestTensor cpp;

  // Of `c`, with part of its address in byte_offset. A test may change these.
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  DLTensor tensor = {};
  const DLTensor** field = nullptr;  // in the arguments
};

struct OpCase {
  std::string function;
  std::vector<std::unique_ptr<Operand>> operands;

  std::function<int32_t(tenon_context, void* stream, tenon_error*)> call;
  std::function<Status(Stream)> call_cpp;

  // Of ops with a workspace; empty otherwise.
  std::function<int32_t(tenon_context, uint64_t* bytes, tenon_error*)> query;
  std::function<size_t()> query_cpp;
  void** workspace = nullptr;  // the arguments' fields
  uint64_t* workspace_size = nullptr;
  void** cpp_workspace = nullptr;
  size_t* cpp_workspace_size = nullptr;

  template <class Args>
  Args& args() {
    return *static_cast<Args*>(args_.get());
  }
  Operand& operand(const std::string& name);

  // Of the arguments in the first version that had them.
  uint32_t first_struct_size = 0;

  std::shared_ptr<void> args_;
  std::shared_ptr<void> params_;  // of the C++ op
  std::vector<Buffer> scratch_;
};

// Gives both calls as much scratch memory as they ask for.
void AddWorkspace(tenon_context context, Device device, OpCase* op);

using OpCasePtr = std::unique_ptr<OpCase>;

OpCasePtr MakeEmbedding(const testing::Target& target, int64_t tokens);
OpCasePtr MakeRmsNorm(const testing::Target& target, int64_t tokens);
OpCasePtr MakeLinear(const testing::Target& target, int64_t tokens);
OpCasePtr MakePackedQkNorm(const testing::Target& target, int64_t tokens);
OpCasePtr MakeStridedQkNorm(const testing::Target& target, int64_t tokens);
OpCasePtr MakeAttention(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoeRouter(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoeAlign(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoeGroupedMatmul(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoeSwiGlu(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoeSumReduce(const testing::Target& target, int64_t tokens);
OpCasePtr MakeMoe(const testing::Target& target, int64_t tokens);
OpCasePtr MakeSampler(const testing::Target& target, int64_t tokens);
OpCasePtr MakeQuantizeFp8(const testing::Target& target, int64_t tokens);
OpCasePtr MakeFp8Linear(const testing::Target& target, int64_t tokens);
OpCasePtr MakeFp8MoeGroupedMatmul(const testing::Target& target,
                                  int64_t tokens);
OpCasePtr MakeFp8Moe(const testing::Target& target, int64_t tokens);

// All of these.
using OpMaker = OpCasePtr (*)(const testing::Target& target, int64_t tokens);
std::vector<OpMaker> OpMakers();
std::vector<OpCasePtr> MakeAllOps(const testing::Target& target,
                                  int64_t tokens);

}  // namespace tenon::abi_test

#endif  // TENON_TESTS_ABI_OP_CASES_H_
