// What every op refuses: an error that names function, field and value, and no
// byte of any tensor changed.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "tests/abi/op_cases.h"
#include "tests/testing/op_test.h"

namespace tenon::abi_test {
namespace {

constexpr int64_t kTokens = 5;
constexpr testing::Target kTarget = {{DeviceType::kCpu, 0}, DType::kFloat32};

void ExpectMessage(const OpCase& op, const tenon_error& error,
                   const std::string& function,
                   const std::vector<std::string>& parts) {
  const std::string message = error.message;
  EXPECT_EQ(message.rfind(function + ": ", 0), 0u) << message;
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos)
        << "\"" << message << "\" does not name \"" << part << "\"";
  }
  for (const auto& operand : op.operands) {
    EXPECT_EQ(operand->c.Bytes(), operand->c.InitialBytes()) << operand->name;
  }
}

// That the call fails with this code.
void ExpectRefused(const OpCase& op, const std::vector<std::string>& parts,
                   int32_t code = TENON_INVALID_ARGUMENT,
                   tenon_context context = 0, void* stream = nullptr) {
  tenon_error error = {sizeof(error), 0, ""};
  EXPECT_EQ(op.call(context, stream, &error), code) << error.message;
  EXPECT_EQ(error.code, code);
  ExpectMessage(op, error, op.function, parts);
}

// The query too, without touching its result.
void ExpectQueryRefused(const OpCase& op,
                        const std::vector<std::string>& parts) {
  if (!op.query) return;
  uint64_t bytes = 12345;
  tenon_error error = {sizeof(error), 0, ""};
  EXPECT_EQ(op.query(0, &bytes, &error), TENON_INVALID_ARGUMENT)
      << error.message;
  EXPECT_EQ(bytes, 12345u);
  ExpectMessage(op, error, op.function + "_workspace_size", parts);
}

std::vector<OpCasePtr> Ops() {
  std::vector<OpCasePtr> ops = MakeAllOps(kTarget, kTokens);
  for (const OpCasePtr& op : ops) AddWorkspace(0, kTarget.device, op.get());
  return ops;
}

// Changes one tensor of one op at a time. `change` returns the parts of the
// message, or none where it does not apply.
template <class Change>
void ForEachOperand(bool also_query, const Change& change) {
  for (OpMaker make : OpMakers()) {
    for (size_t i = 0;; ++i) {
      const OpCasePtr op = make(kTarget, kTokens);
      if (i == op->operands.size()) break;
      AddWorkspace(0, kTarget.device, op.get());
      Operand& operand = *op->operands[i];
      SCOPED_TRACE(op->function + " " + operand.name);
      const std::vector<std::string> parts = change(&operand);
      if (parts.empty()) continue;
      ExpectRefused(*op, parts);
      if (also_query) ExpectQueryRefused(*op, parts);
    }
  }
}

TEST(AbiOpsRejectionTest, MissingTensors) {
  ForEachOperand(true, [](Operand* o) -> std::vector<std::string> {
    if (o->optional) return {};
    *o->field = nullptr;
    return {o->name, o->name == "k" ? " is missing" : " null"};
  });
}

TEST(AbiOpsRejectionTest, TensorsThatAreNone) {
  using Parts = std::vector<std::string>;
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.ndim = 0;
    return {o->name + ".ndim is 0, expected 1 to 4"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.ndim = 5;
    return {o->name + ".ndim is 5"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.ndim = -1;
    return {o->name + ".ndim is -1"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.shape = nullptr;
    return {o->name + ".shape is null"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->shape.back() = -3;
    return {StrCat(o->name, ".shape[", o->shape.size() - 1, "] is -3")};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->strides[0] = -1;
    return {o->name + ".strides[0] is -1, expected >= 0"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->strides[0] = std::numeric_limits<int64_t>::max();
    return {o->name + ".strides make more elements or bytes"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->shape[0] = std::numeric_limits<int64_t>::max();
    return {o->name};
  });
}

TEST(AbiOpsRejectionTest, WrongRankAndDType) {
  using Parts = std::vector<std::string>;
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->shape.push_back(1);
    o->strides.push_back(1);
    o->tensor.shape = o->shape.data();
    o->tensor.strides = o->strides.data();
    if (++o->tensor.ndim > 4) return {o->name + ".ndim is 5"};
    const bool of_rows = o->name == "gate_scales" || o->name == "up_scales" ||
                         o->name == "down_scales";
    if (of_rows) return {o->name + " has shape"};  // taken for blocks
    return {o->name, std::to_string(o->tensor.ndim)};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.dtype.lanes = 2;
    return {o->name + ".dtype is {code ", "lanes 2}"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.dtype = {6, 8, 1};
    return {o->name + ".dtype is {code 6, bits 8, lanes 1}"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.dtype = {TENON_DL_UINT, 8, 1};
    if (o->name == "params") o->tensor.dtype = {TENON_DL_FLOAT8_E4M3FN, 8, 1};
    return {o->name, "dtype"};
  });
}

TEST(AbiOpsRejectionTest, OtherDevices) {
  using Parts = std::vector<std::string>;
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.device.device_type = 7;
    return {o->name + ".device.device_type is 7"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.device.device_id = 1;
    return {o->name + ".device.device_id is 1"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.device = {TENON_DL_CUDA, -1};
    return {o->name + ".device.device_id is -1"};
  });
  ForEachOperand(true, [](Operand* o) -> Parts {
    o->tensor.device = {TENON_DL_CUDA, 3};
    return {o->name, "is on", "cuda:3", "cpu:0"};
  });
}

TEST(AbiOpsRejectionTest, UnusableData) {
  using Parts = std::vector<std::string>;
  ForEachOperand(false, [](Operand* o) -> Parts {
    o->tensor.data = nullptr;
    return {o->name + ".data is null"};
  });
  ForEachOperand(false, [](Operand* o) -> Parts {
    if (o->tensor.dtype.bits == 8 && o->name != "params") return {};
    ++o->tensor.byte_offset;
    return {o->name, "aligned"};
  });
  ForEachOperand(false, [](Operand* o) -> Parts {
    o->tensor.byte_offset = std::numeric_limits<uint64_t>::max();
    return {o->name, "byte_offset 18446744073709551615",
            "past the address space"};
  });
  ForEachOperand(false, [](Operand* o) -> Parts {
    o->tensor.byte_offset = uint64_t{1} << 63;
    return {o->name, "byte_offset 9223372036854775808"};
  });
}

TEST(AbiOpsRejectionTest, PinnedMemoryIsCpuMemory) {
  for (const OpCasePtr& op : Ops()) {
    for (const auto& operand : op->operands) {
      operand->tensor.device = {TENON_DL_CUDA_HOST, 5};
    }
    tenon_error error = {sizeof(error), 0, ""};
    EXPECT_EQ(op->call(0, nullptr, &error), TENON_OK) << error.message;
  }
}

TEST(AbiOpsRejectionTest, StreamsOnTheCpu) {
  int not_a_stream;
  for (const OpCasePtr& op : Ops()) {
    ExpectRefused(*op, {"stream is 0x", "must be NULL"}, TENON_INVALID_ARGUMENT,
                  0, &not_a_stream);
  }
}

TEST(AbiOpsRejectionTest, Contexts) {
  for (const OpCasePtr& op : Ops()) {
    ExpectRefused(*op, {"context is 4242"}, TENON_NOT_FOUND, 4242);
  }
  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 1;
  tenon_context context = 0;
  ASSERT_EQ(tenon_context_create(&options, &context, nullptr), TENON_OK);
  for (const OpCasePtr& op : Ops()) {
    const Operand& first = *op->operands.front();
    for (const auto& operand : op->operands) {
      operand->tensor.device = {TENON_DL_CUDA, 2};
    }
    ExpectRefused(*op, {first.name + " is on cuda:2, but the context on cpu:0"},
                  TENON_INVALID_ARGUMENT, context);
  }
  ASSERT_EQ(tenon_context_destroy(context, nullptr), TENON_OK);
  for (const OpCasePtr& op : Ops()) {
    ExpectRefused(*op, {"context is "}, TENON_NOT_FOUND, context);
  }
}

TEST(AbiOpsRejectionTest, StructSizes) {
  for (const OpCasePtr& op : Ops()) {
    SCOPED_TRACE(op->function);
    auto& size = *static_cast<uint32_t*>(op->args_.get());
    const uint32_t too_small = op->first_struct_size - 8;
    for (uint32_t bad : {0u, 4u, too_small, 4097u, 0xffffffffu}) {
      size = bad;
      ExpectRefused(*op, {"args.struct_size is " + std::to_string(bad)});
      ExpectQueryRefused(*op, {"args.struct_size is " + std::to_string(bad)});
    }
  }
  tenon_error error = {sizeof(error), 0, ""};
  EXPECT_EQ(tenon_rms_norm(0, nullptr, nullptr, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_rms_norm: args is null");
  const OpCasePtr op = MakeLinear(kTarget, kTokens);
  EXPECT_EQ(op->query(0, nullptr, &error), TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_linear_workspace_size: bytes is null");
}

TEST(AbiOpsRejectionTest, Workspaces) {
  for (const OpCasePtr& op : Ops()) {
    if (!op->query || *op->workspace_size == 0) continue;
    SCOPED_TRACE(op->function);
    void* const right = *op->workspace;
    *op->workspace = nullptr;
    ExpectRefused(*op, {"workspace is null"});
    *op->workspace = static_cast<char*>(right) + 8;
    ExpectRefused(*op, {"workspace is not aligned"});
    *op->workspace = right;
    --*op->workspace_size;
    ExpectRefused(*op, {"workspace_size is"});
    ++*op->workspace_size;
    for (const auto& operand : op->operands) {
      SCOPED_TRACE(operand->name);
      const uintptr_t data =
          reinterpret_cast<uintptr_t>(operand->c.view().data);
      *op->workspace = reinterpret_cast<void*>(data / 64 * 64);
      ExpectRefused(*op, {"workspace overlaps "});
    }
  }
}

// Fields that are no tensors.

template <class Args, class Change>
void ExpectField(OpMaker make, const std::vector<std::string>& parts,
                 const Change& change, bool also_query = true) {
  const OpCasePtr op = make(kTarget, kTokens);
  AddWorkspace(0, kTarget.device, op.get());
  change(op->args<Args>());
  ExpectRefused(*op, parts);
  if (also_query) ExpectQueryRefused(*op, parts);
}

TEST(AbiOpsRejectionTest, FieldsOfNorms) {
  const auto rms = [](std::vector<std::string> parts, auto change) {
    ExpectField<tenon_rms_norm_args>(MakeRmsNorm, parts, change);
  };
  using Rms = tenon_rms_norm_args;
  rms({"rounding is 2, expected 0 to 1"}, [](Rms& a) { a.rounding = 2; });
  rms({"rounding is -1"}, [](Rms& a) { a.rounding = -1; });
  rms({"reserved is 1, must be 0"}, [](Rms& a) { a.reserved = 1; });
  rms({"epsilon is 0"}, [](Rms& a) { a.epsilon = 0.0f; });
  rms({"epsilon is nan"}, [](Rms& a) { a.epsilon = NAN; });

  const auto qk = [](std::vector<std::string> parts, auto change) {
    ExpectField<tenon_qk_norm_args>(MakePackedQkNorm, parts, change);
  };
  using Qk = tenon_qk_norm_args;
  qk({"rounding is 7"}, [](Qk& a) { a.rounding = 7; });
  qk({"reserved is 9"}, [](Qk& a) { a.reserved = 9; });
  qk({"epsilon is -1"}, [](Qk& a) { a.epsilon = -1.0f; });
  qk({"q_offset is -1"}, [](Qk& a) { a.q_offset = -1; });
  qk({"k_offset is 9223372036854775807"},
     [](Qk& a) { a.k_offset = INT64_MAX; });
  qk({"v_offset is 409"}, [](Qk& a) { a.v_offset = 409; });
  qk({"num_q_heads is 0"}, [](Qk& a) { a.num_q_heads = 0; });
  qk({"num_kv_heads is -2"}, [](Qk& a) { a.num_kv_heads = -2; });
  qk({"head_dim is 96"}, [](Qk& a) { a.head_dim = 96; });
  qk({"rotary_dim is 31"}, [](Qk& a) { a.rotary_dim = 31; });
  qk({"rotary_dim is 66"}, [](Qk& a) { a.rotary_dim = 66; });
  qk({"rotary_dim is 0"}, [](Qk& a) { a.rotary_dim = 0; });
  qk({"rotary_dim is 32 without cos_sin"},
     [](Qk& a) { a.cos_sin = a.positions = nullptr; });
  qk({"positions is given, without cos_sin"},
     [](Qk& a) { a.cos_sin = nullptr; });
  qk({"positions is missing"}, [](Qk& a) { a.positions = nullptr; });
  qk({"v_cache is missing"}, [](Qk& a) { a.v_cache = nullptr; });
  qk({"v_cache is given, without k_cache"}, [](Qk& a) { a.k_cache = nullptr; });
  qk({"slot_mapping is missing"}, [](Qk& a) { a.slot_mapping = nullptr; });
  qk({"slot_mapping is given"}, [](Qk& a) { a.k_cache = a.v_cache = nullptr; });
  qk({"k_scale is 0"}, [](Qk& a) { a.k_scale = 0.0f; });
  qk({"v_scale is inf"}, [](Qk& a) { a.v_scale = INFINITY; });
  qk({"k_scale is 0.5, expected 1"},
     [](Qk& a) { a.k_cache = a.v_cache = a.slot_mapping = nullptr; });
  qk({"q is given, although qkv is"}, [](Qk& a) { a.q = a.qkv; });
  qk({"k overlaps q"}, [](Qk& a) { a.k_offset = a.q_offset; });
  ExpectField<Qk>(MakeStridedQkNorm, {"head_dim is 64, expected 0 without qkv"},
                  [](Qk& a) { a.head_dim = 64; });
  ExpectField<Qk>(MakeStridedQkNorm, {"v is missing"},
                  [](Qk& a) { a.v = nullptr; });
}

TEST(AbiOpsRejectionTest, FieldsOfDenseOps) {
  ExpectField<tenon_embedding_args>(
      MakeEmbedding, {"reserved is 5"},
      [](tenon_embedding_args& a) { a.reserved = 5; });
  ExpectField<tenon_embedding_args>(
      MakeEmbedding, {"out overlaps table"},
      [](tenon_embedding_args& a) {
        const_cast<DLTensor*>(a.out)->data = a.table->data;
      },
      false);
  ExpectField<tenon_linear_args>(MakeLinear, {"flags is 2, expected bits of 1"},
                                 [](tenon_linear_args& a) { a.flags = 2; });
  ExpectField<tenon_linear_args>(
      MakeLinear, {"out overlaps x"},
      [](tenon_linear_args& a) {
        const_cast<DLTensor*>(a.out)->data = a.x->data;
      },
      false);

  using Attention = tenon_attention_args;
  const auto attention = [](std::vector<std::string> parts, auto change) {
    ExpectField<Attention>(MakeAttention, parts, change);
  };
  attention({"flags is 4294967295"}, [](Attention& a) { a.flags = ~0u; });
  attention({"reserved is 1"}, [](Attention& a) { a.reserved = 1; });
  attention({"scale is 0"}, [](Attention& a) { a.scale = 0.0f; });
  attention({"k_scale is 0"}, [](Attention& a) { a.k_scale = 0.0f; });
  attention({"v_scale is -1"}, [](Attention& a) { a.v_scale = -1.0f; });
  attention({"max_kv_len is -1"}, [](Attention& a) { a.max_kv_len = -1; });
  attention({"max_query_len is -9"},
            [](Attention& a) { a.max_query_len = -9; });
}

TEST(AbiOpsRejectionTest, FieldsOfMoe) {
  using Router = tenon_moe_router_args;
  const auto router = [](std::vector<std::string> parts, auto change) {
    ExpectField<Router>(MakeMoeRouter, parts, change);
  };
  router({"top_k is 0"}, [](Router& a) { a.top_k = 0; });
  router({"scoring is 2"}, [](Router& a) { a.scoring = 2; });
  router({"renormalize is -1, expected 0 or 1"},
         [](Router& a) { a.renormalize = -1; });
  router({"routed_scaling_factor is nan"},
         [](Router& a) { a.routed_scaling_factor = NAN; });
  router({"num_expert_groups is 3"},
         [](Router& a) { a.num_expert_groups = 3; });
  router({"num_selected_groups is 5"},
         [](Router& a) { a.num_selected_groups = 5; });
  router({"group_score is 2"}, [](Router& a) { a.group_score = 2; });
  router({"num_fused_shared_experts is -1"},
         [](Router& a) { a.num_fused_shared_experts = -1; });
  router({"reserved is 3"}, [](Router& a) { a.reserved = 3; });

  using Align = tenon_moe_align_args;
  const auto align = [](std::vector<std::string> parts, auto change) {
    ExpectField<Align>(MakeMoeAlign, parts, change);
  };
  align({"num_experts is 0"}, [](Align& a) { a.num_experts = 0; });
  align({"num_experts is 1025"}, [](Align& a) { a.num_experts = 1025; });
  align({"tile_rows is 0"}, [](Align& a) { a.tile_rows = 0; });
  align({"number of tiles is 6, expected 10"},
        [](Align& a) { a.tile_rows = 1; });
  align({"reserved is 1"}, [](Align& a) { a.reserved = 1; });

  using Grouped = tenon_moe_grouped_matmul_args;
  const auto grouped = [](std::vector<std::string> parts, auto change) {
    ExpectField<Grouped>(MakeMoeGroupedMatmul, parts, change);
  };
  grouped({"flags is 4"}, [](Grouped& a) { a.flags = 4; });
  grouped({"slots_per_row is 0"}, [](Grouped& a) { a.slots_per_row = 0; });
  grouped({"reserved is 1"}, [](Grouped& a) { a.reserved = 1; });

  using SwiGlu = tenon_moe_swiglu_args;
  const auto swiglu = [](std::vector<std::string> parts, auto change) {
    ExpectField<SwiGlu>(MakeMoeSwiGlu, parts, change);
  };
  swiglu({"layout is 2"}, [](SwiGlu& a) { a.layout = 2; });
  swiglu({"limit is -1"}, [](SwiGlu& a) { a.limit = -1.0f; });
  swiglu({"alpha", "is 0"}, [](SwiGlu& a) { a.alpha = 0.0f; });

  ExpectField<tenon_moe_sum_reduce_args>(
      MakeMoeSumReduce, {"reserved is 1"},
      [](tenon_moe_sum_reduce_args& a) { a.reserved = 1; });
  ExpectField<tenon_moe_args>(MakeMoe, {"flags is 3, expected bits of 1"},
                              [](tenon_moe_args& a) { a.flags = 3; });
  ExpectField<tenon_moe_args>(
      MakeMoe, {"out overlaps down"},
      [](tenon_moe_args& a) {
        const_cast<DLTensor*>(a.out)->data = a.down->data;
      },
      false);
}

TEST(AbiOpsRejectionTest, FieldsOfFp8) {
  using Quantize = tenon_quantize_fp8_args;
  const auto quantize = [](std::vector<std::string> parts, auto change) {
    ExpectField<Quantize>(MakeQuantizeFp8, parts, change, false);
  };
  quantize({"block_rows is 0"}, [](Quantize& a) { a.block_rows = 0; });
  quantize({"block_cols is 64"}, [](Quantize& a) { a.block_cols = 64; });
  quantize({"reserved is 2"}, [](Quantize& a) { a.reserved = 2; });
  quantize({"scales has"}, [](Quantize& a) { a.block_cols = 0; });

  using Grouped = tenon_moe_grouped_matmul_args;
  ExpectField<Grouped>(
      MakeFp8MoeGroupedMatmul,
      {"weight_scales has shape [4, 1, 2], expected [4, 2, 2]"},
      [](Grouped& a) { a.weight_scales->shape[1] = 1; });

  using Moe = tenon_moe_args;
  const auto moe = [](std::vector<std::string> parts, auto change) {
    ExpectField<Moe>(MakeFp8Moe, parts, change);
  };
  moe({"down_scales has shape [4, 63], expected [4, 64]"},
      [](Moe& a) { a.down_scales->shape[1] = 63; });
  moe({"gate_scales has dtype int32"}, [](Moe& a) {
    const_cast<DLTensor*>(a.gate_scales)->dtype = {TENON_DL_INT, 32, 1};
  });
}

TEST(AbiOpsRejectionTest, FieldsOfTheRouterInMoe) {
  using Router = tenon_moe_router_args;
  const auto router = [](std::vector<std::string> parts, bool also_query,
                         auto change) {
    ExpectField<tenon_moe_args>(
        MakeFp8Moe, parts,
        [&](tenon_moe_args& a) { change(*const_cast<Router*>(a.router)); },
        also_query);
  };
  router({"router.struct_size is 4"}, true,
         [](Router& r) { r.struct_size = 4; });
  router({"logits is null"}, true, [](Router& r) { r.logits = nullptr; });
  router({"renormalize is 2"}, true, [](Router& r) { r.renormalize = 2; });
  // A query is about shapes alone.
  router({"top_k is 0"}, false, [](Router& r) { r.top_k = 0; });
  router({"num_fused_shared_experts is -1"}, false,
         [](Router& r) { r.num_fused_shared_experts = -1; });
  router({"topk_weights"}, false,
         [](Router& r) { r.topk_weights = r.topk_ids; });
}

TEST(AbiOpsRejectionTest, FieldsOfTheSampler) {
  using Sampler = tenon_sampler_args;
  const auto sampler = [](std::vector<std::string> parts, auto change) {
    ExpectField<Sampler>(MakeSampler, parts, change);
  };
  sampler({"flags is 2"}, [](Sampler& a) { a.flags = 2; });
  sampler({"params has shape [4, 128], expected [5, 128]"},
          [](Sampler& a) { a.params->shape[0] = 4; });
  sampler({"params has shape [5, 120], expected [5, 128]"},
          [](Sampler& a) { a.params->shape[1] = 120; });
  sampler({"params.strides[0] is 136, expected 128"},
          [](Sampler& a) { a.params->strides[0] = 136; });
}

TEST(SamplingParamsTest, Init) {
  tenon_sampling_params params;
  std::memset(&params, 0xff, sizeof(params));
  ASSERT_EQ(tenon_sampling_params_init(&params, sizeof(params), nullptr),
            TENON_OK);
  tenon_sampling_params expected = {};
  expected.temperature = 1.0f;
  expected.top_p = 1.0f;
  EXPECT_EQ(std::memcmp(&params, &expected, sizeof(params)), 0);
  EXPECT_EQ(tenon_sampling_params_validate(&params, nullptr), TENON_OK);

  // No byte past `size`.
  std::memset(&params, 0xff, sizeof(params));
  ASSERT_EQ(tenon_sampling_params_init(&params, 8, nullptr), TENON_OK);
  EXPECT_EQ(params.top_k, 0);
  EXPECT_TRUE(std::isnan(params.top_p));
  tenon_error error = {sizeof(error), 0, ""};
  EXPECT_EQ(tenon_sampling_params_init(nullptr, 128, &error),
            TENON_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "tenon_sampling_params_init: params is null");
}

TEST(SamplingParamsTest, Validate) {
  tenon_error error = {sizeof(error), 0, ""};
  const auto expect = [&](const std::string& message, auto change) {
    tenon_sampling_params params = {};
    change(params);
    EXPECT_EQ(tenon_sampling_params_validate(&params, &error),
              TENON_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(error.message)
                  .rfind("tenon_sampling_params_validate: " + message, 0),
              0u)
        << error.message;
  };
  using Params = tenon_sampling_params;
  expect("temperature is -1", [](Params& p) { p.temperature = -1.0f; });
  expect("top_k is -2", [](Params& p) { p.top_k = -2; });
  expect("top_p is nan", [](Params& p) { p.top_p = NAN; });
  expect("min_p is 2", [](Params& p) { p.min_p = 2.0f; });
  expect("filter_order is 3", [](Params& p) { p.filter_order = 3; });
  expect("reserved0 is 1", [](Params& p) { p.reserved0 = 1; });
  expect("reserved is 1", [](Params& p) { p.reserved[5] = 1; });
  EXPECT_EQ(tenon_sampling_params_validate(nullptr, &error),
            TENON_INVALID_ARGUMENT);
  const tenon_sampling_params greedy = {};
  EXPECT_EQ(tenon_sampling_params_validate(&greedy, &error), TENON_OK);
}

}  // namespace
}  // namespace tenon::abi_test
