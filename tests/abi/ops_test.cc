// Every op through its C function equals the C++ op bit for bit.

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "ops/core/build_config.h"
#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "tests/abi/moe_kernels_json.h"
#include "tests/abi/op_cases.h"
#include "tests/testing/cuda_graph.h"
#include "tests/testing/op_test.h"

namespace tenon::abi_test {
namespace {

class AbiOpsTest : public testing::OpTest {
 protected:
  void SetUp() override {
    testing::OpTest::SetUp();
    if (IsSkipped()) return;
    context_ = MakeContext(TENON_CUBLAS_LT_OFF);
  }
  void TearDown() override {
    for (tenon_context context : contexts_) {
      EXPECT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
    }
  }

  tenon_context MakeContext(int32_t cublas_lt) {
    const bool is_cpu = device().type == DeviceType::kCpu;
    tenon_context_options options = {};
    options.struct_size = sizeof(options);
    options.device_type = is_cpu ? TENON_DEVICE_CPU : TENON_DEVICE_CUDA;
    if (is_cpu) {
      options.num_threads = 2;
    } else {
      options.cublas_lt = cublas_lt;
    }
    tenon_context context = 0;
    tenon_error error = {sizeof(error), 0, ""};
    EXPECT_EQ(tenon_context_create(&options, &context, &error), TENON_OK)
        << error.message;
    contexts_.push_back(context);
    return context;
  }

  void Call(const OpCase& op, tenon_context context) {
    tenon_error error = {sizeof(error), -1, "unset"};
    ASSERT_EQ(op.call(context, stream().cuda, &error), TENON_OK)
        << error.message;
    EXPECT_EQ(error.code, TENON_OK);
    EXPECT_STREQ(error.message, "");
  }

  void CallCpp(const OpCase& op) {
    const Status status = op.call_cpp(stream());
    ASSERT_TRUE(status.ok()) << status.message();
  }

  void ExpectEqualBytes(const OpCase& op) {
    ASSERT_NO_FATAL_FAILURE(Finish());
    bool any_changed = false;
    for (const auto& operand : op.operands) {
      EXPECT_EQ(operand->c.Bytes(), operand->cpp.Bytes()) << operand->name;
      EXPECT_EQ(operand->c.NumStrayWrites(), 0) << operand->name;
      any_changed |= operand->c.Bytes() != operand->c.InitialBytes();
    }
    EXPECT_TRUE(any_changed);
  }

  tenon_context context_ = 0;

 private:
  std::vector<tenon_context> contexts_;
};

TEST_P(AbiOpsTest, EqualTheCppOps) {
  for (bool with_context : {false, true}) {
    for (int64_t tokens : {1, 5, 13}) {
      for (const OpCasePtr& op : MakeAllOps(GetParam(), tokens)) {
        SCOPED_TRACE(StrCat(op->function, " tokens ", tokens, " context ",
                            with_context));
        const tenon_context context = with_context ? context_ : 0;
        ASSERT_NO_FATAL_FAILURE(AddWorkspace(context, device(), op.get()));
        ASSERT_NO_FATAL_FAILURE(Call(*op, context));
        ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
        ExpectEqualBytes(*op);
      }
    }
  }
}

TEST_P(AbiOpsTest, LinearUsesCublasLtOfTheContext) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "CUDA alone";
  auto cublas_lt = CublasLt::Create(device());
  if (!cublas_lt.ok()) GTEST_SKIP() << cublas_lt.status().message();
  const tenon_context context = MakeContext(TENON_CUBLAS_LT_REQUIRED);
  const OpCasePtr op = MakeLinear(GetParam(), 64);
  static_cast<LinearParams*>(op->params_.get())->cublas_lt = cublas_lt->get();
  ASSERT_NO_FATAL_FAILURE(AddWorkspace(context, device(), op.get()));
  EXPECT_EQ(*op->workspace_size, op->query_cpp());
  EXPECT_GT(*op->workspace_size, 0u);
  ASSERT_NO_FATAL_FAILURE(Call(*op, context));
  ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
  ExpectEqualBytes(*op);
}

// The C++ op, without them, gives the same bits.
TEST_P(AbiOpsTest, MoeTakesMeasuredKernelSizesOfTheContext) {
  const tenon_context context = MakeContext(TENON_CUBLAS_LT_OFF);
  ASSERT_EQ(
      tenon_context_set_moe_kernels(context, testing::kMoeKernelsJson, nullptr),
      TENON_OK);
  for (int64_t tokens : {1, 40}) {
    const OpCasePtr op = MakeMoe(GetParam(), tokens);
    ASSERT_NO_FATAL_FAILURE(AddWorkspace(context, device(), op.get()));
    ASSERT_NO_FATAL_FAILURE(Call(*op, context));
    ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
    ExpectEqualBytes(*op);
  }
}

// Structs that have grown, as clients of the first version pass them.
TEST_P(AbiOpsTest, StructsOfTheFirstVersion) {
  for (OpMaker make : {MakeLinear, MakeMoeGroupedMatmul, MakeMoe}) {
    const OpCasePtr op = make(GetParam(), 5);
    SCOPED_TRACE(op->function);
    auto& struct_size = *static_cast<uint32_t*>(op->args_.get());
    ASSERT_LT(op->first_struct_size, struct_size);
    // What lies behind is the client's own.
    std::memset(static_cast<char*>(op->args_.get()) + op->first_struct_size,
                0xcc, struct_size - op->first_struct_size);
    struct_size = op->first_struct_size;
    ASSERT_NO_FATAL_FAILURE(AddWorkspace(context_, device(), op.get()));
    ASSERT_NO_FATAL_FAILURE(Call(*op, context_));
    ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
    ExpectEqualBytes(*op);
  }
}

TEST_P(AbiOpsTest, OptionalTensorsMayBeAbsent) {
  for (const OpCasePtr& op : MakeAllOps(GetParam(), 5)) {
    SCOPED_TRACE(op->function);
    for (const auto& operand : op->operands) {
      if (operand->optional) *operand->field = nullptr;
    }
    if (op->function == "tenon_qk_norm") {
      op->args<tenon_qk_norm_args>().rotary_dim = 0;
      op->args<tenon_qk_norm_args>().k_scale = 0.0f;  // as good as 1
      op->args<tenon_qk_norm_args>().v_scale = 1.0f;
    }
    ASSERT_NO_FATAL_FAILURE(AddWorkspace(context_, device(), op.get()));
    ASSERT_NO_FATAL_FAILURE(Call(*op, context_));
    ASSERT_NO_FATAL_FAILURE(Finish());
  }
}

// As DLPack's producers may leave them.
TEST_P(AbiOpsTest, StridesMayBeNullOrMeaningless) {
  for (int64_t tokens : {0, 1}) {
    for (const OpCasePtr& op : MakeAllOps(GetParam(), tokens)) {
      SCOPED_TRACE(StrCat(op->function, " tokens ", tokens));
      for (const auto& operand : op->operands) {
        bool is_empty = false;
        bool is_compact = true;
        int64_t compact = 1;
        for (int i = operand->tensor.ndim - 1; i >= 0; --i) {
          is_empty |= operand->shape[i] == 0;
          is_compact &=
              operand->shape[i] <= 1 || operand->strides[i] == compact;
          compact *= operand->shape[i];
        }
        if (is_compact) operand->tensor.strides = nullptr;
        for (int i = 0; i < operand->tensor.ndim; ++i) {
          if (is_empty || operand->shape[i] == 1) operand->strides[i] = -7;
        }
        if (is_empty) operand->tensor.data = nullptr;
      }
      ASSERT_NO_FATAL_FAILURE(AddWorkspace(context_, device(), op.get()));
      ASSERT_NO_FATAL_FAILURE(Call(*op, context_));
      if (tokens == 0) continue;
      ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
      ExpectEqualBytes(*op);
    }
  }
}

TEST_P(AbiOpsTest, ZeroTokensAreOk) {
  for (const OpCasePtr& op : MakeAllOps(GetParam(), 0)) {
    SCOPED_TRACE(op->function);
    ASSERT_NO_FATAL_FAILURE(AddWorkspace(context_, device(), op.get()));
    ASSERT_NO_FATAL_FAILURE(Call(*op, context_));
    ASSERT_NO_FATAL_FAILURE(Finish());
    for (const auto& operand : op->operands) {
      if (operand->name == "expert_offsets") continue;  // zeros
      EXPECT_EQ(operand->c.Bytes(), operand->c.InitialBytes()) << operand->name;
    }
  }
}

TEST_P(AbiOpsTest, WorkspaceQueriesIgnoreDataAndStreams) {
  for (const OpCasePtr& op : MakeAllOps(GetParam(), 13)) {
    if (!op->query) continue;
    SCOPED_TRACE(op->function);
    uint64_t with_data = 0;
    ASSERT_EQ(op->query(context_, &with_data, nullptr), TENON_OK);
    EXPECT_EQ(with_data, op->query_cpp());
    for (const auto& operand : op->operands) {
      operand->tensor.data = nullptr;
      operand->tensor.byte_offset = 3;  // aligned to nothing
    }
    uint64_t without = ~with_data;
    tenon_error error = {sizeof(error), 0, ""};
    ASSERT_EQ(op->query(context_, &without, &error), TENON_OK) << error.message;
    EXPECT_EQ(without, with_data);
  }
}

TEST_P(AbiOpsTest, WorkspacesDoNotShrinkWithMoreTokens) {
  std::vector<uint64_t> last(MakeAllOps(GetParam(), 0).size(), 0);
  for (int64_t tokens : {0, 1, 2, 5, 13, 40, 300}) {
    const std::vector<OpCasePtr> ops = MakeAllOps(GetParam(), tokens);
    for (size_t i = 0; i < ops.size(); ++i) {
      if (!ops[i]->query) continue;
      uint64_t bytes = 0;
      ASSERT_EQ(ops[i]->query(context_, &bytes, nullptr), TENON_OK);
      EXPECT_GE(bytes, last[i]) << ops[i]->function << " tokens " << tokens;
      last[i] = bytes;
    }
  }
}

// Capture forbids what allocates or waits for the device.
TEST_P(AbiOpsTest, CanBeCapturedInACudaGraph) {
  if (device().type == DeviceType::kCpu) GTEST_SKIP() << "CUDA alone";
  if constexpr (kCudaBuilt) {
    const std::vector<OpCasePtr> ops = MakeAllOps(GetParam(), 5);
    for (const OpCasePtr& op : ops) {
      ASSERT_NO_FATAL_FAILURE(AddWorkspace(context_, device(), op.get()));
    }
    const Status status = testing::RunAsCudaGraph(stream(), 1, [&]() -> Status {
      for (const OpCasePtr& op : ops) {
        tenon_error error = {sizeof(error), 0, ""};
        if (op->call(context_, stream().cuda, &error) != TENON_OK) {
          return InternalError(error.message);
        }
      }
      return Status();
    });
    ASSERT_TRUE(status.ok()) << status.message();
    for (const OpCasePtr& op : ops) {
      SCOPED_TRACE(op->function);
      ASSERT_NO_FATAL_FAILURE(CallCpp(*op));
      ExpectEqualBytes(*op);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AbiOpsTest,
                         ::testing::ValuesIn(testing::AllTargets()),
                         testing::TargetName);

TEST(MoeMaxTilesTest, IsZeroOutOfRange) {
  EXPECT_EQ(tenon_moe_max_tiles(10, 4, 3), 6);
  EXPECT_EQ(tenon_moe_max_tiles(0, 4, 3), 0);
  EXPECT_EQ(tenon_moe_max_tiles(2147483647, 1024, 2147483647), 1025);
  EXPECT_EQ(tenon_moe_max_tiles(-1, 4, 3), 0);
  EXPECT_EQ(tenon_moe_max_tiles(INT64_MAX, 4, 3), 0);
  EXPECT_EQ(tenon_moe_max_tiles(10, 0, 3), 0);
  EXPECT_EQ(tenon_moe_max_tiles(10, 1025, 3), 0);
  EXPECT_EQ(tenon_moe_max_tiles(10, 4, 0), 0);
  EXPECT_EQ(tenon_moe_max_tiles(10, 4, -3), 0);
}

}  // namespace
}  // namespace tenon::abi_test
