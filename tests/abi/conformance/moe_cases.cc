// The ops of a mixture-of-experts layer.

#include <algorithm>
#include <cmath>
#include <functional>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"
#include "tests/reference/moe_align_reference.h"
#include "tests/reference/moe_grouped_matmul_reference.h"
#include "tests/reference/moe_reference.h"
#include "tests/reference/moe_router_reference.h"
#include "tests/reference/moe_sum_reduce_reference.h"
#include "tests/reference/moe_swiglu_reference.h"
#include "tests/reference/quantize_reference.h"

namespace tenon::conformance {
namespace {

HostTensor Int32(std::vector<int64_t> shape, const std::vector<int64_t>& values,
                 Layout layout = {}) {
  return HostTensor(DType::kInt32, std::move(shape), FromIntegers(values),
                    layout);
}

int64_t Size(const std::vector<int64_t>& values) {
  return static_cast<int64_t>(values.size());
}

std::string MoeAlign(const std::string& variant, int64_t top_k,
                     const std::vector<int64_t>& ids, int64_t num_experts,
                     int64_t tile_rows, Layout layout) {
  const int64_t slots = Size(ids);
  const int64_t num_tiles =
      tile_rows == 0
          ? 0
          : std::min(slots,
                     (slots + num_experts * (tile_rows - 1) + tile_rows - 1) /
                         tile_rows);
  const reference::MoeAlignment expected = reference::MoeAlign(
      ids, num_experts, std::max<int64_t>(tile_rows, 1), num_tiles);
  Case c("moe_align", variant);
  c.Arg("num_experts", num_experts);
  c.In("topk_ids", Int32({slots / top_k, top_k}, ids, layout));
  c.Out("expert_offsets", HostTensor(DType::kInt32, {num_experts + 1}),
        FromIntegers(expected.expert_offsets), 0);
  c.Out("sorted_slots", HostTensor(DType::kInt32, {slots}),
        FromIntegers(expected.sorted_slots), 0);
  if (tile_rows > 0) {
    // What an unused tile holds beside expert -1 is not defined.
    Require(Size(expected.tiles) == 3 * num_tiles &&
                expected.tiles[3 * num_tiles - 3] >= 0,
            "moe_align: a tile is unused");
    c.Arg("tile_rows", tile_rows);
    c.Out("tiles", HostTensor(DType::kInt32, {num_tiles, 3}),
          FromIntegers(expected.tiles), 0);
  }
  return c.Text();
}

std::string MoeAlignWithoutExperts() {
  Case c("moe_align", "rejects_num_experts_0");
  c.In("topk_ids", Int32({1, 2}, {0, 1}));
  c.In("expert_offsets", HostTensor(DType::kInt32, {1}));
  c.In("sorted_slots", HostTensor(DType::kInt32, {2}));
  c.Reject(TENON_INVALID_ARGUMENT, "num_experts");
  return c.Text();
}

struct MoeGroupedMatmul {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> ids;  // of each slot
  int64_t slots_per_row = 1;
  bool with_bias = false;
  bool with_routing_weights = false;
  uint32_t flags = 0;
  Layout layout;

  std::string Text(const std::string& variant) const {
    const int64_t experts = 3;
    const int64_t rows = 5;
    const int64_t cols = 11;
    const int64_t slots = Size(ids);
    const int64_t x_rows = (slots + slots_per_row - 1) / slots_per_row;
    const HostTensor x(dtype, {x_rows, cols}, Eighths(x_rows * cols, 41),
                       layout);
    const HostTensor weights(dtype, {experts, rows, cols},
                             Eighths(experts * rows * cols, 42), layout);
    const HostTensor bias(dtype, {experts, rows}, Eighths(experts * rows, 43));
    const HostTensor routing(DType::kFloat32, {slots},
                             PositiveEighths(slots, 44));
    const reference::MoeAlignment csr = reference::MoeAlign(ids, experts, 1, 0);
    std::vector<double> expected;
    for (int64_t s = 0; s < slots; ++s) {
      std::vector<double> row(rows);
      const int64_t e = ids[s];
      if (e >= 0 && e < experts) {
        const auto at = x.values().begin() + s / slots_per_row * cols;
        const auto b = bias.values().begin() + e * rows;
        row = reference::MoeGroupedMatmulRow(
            {at, at + cols}, &weights.values()[e * rows * cols], rows,
            with_bias ? std::vector<double>(b, b + rows)
                      : std::vector<double>(),
            with_routing_weights ? routing.values()[s] : 1.0);
      }
      expected.insert(expected.end(), row.begin(), row.end());
    }
    Case c("moe_grouped_matmul", variant);
    c.Arg("flags", int64_t{flags});
    c.Arg("slots_per_row", slots_per_row);
    c.In("x", x);
    c.In("weights", weights);
    c.In("expert_offsets", Int32({experts + 1}, csr.expert_offsets));
    c.In("sorted_slots", Int32({slots}, csr.sorted_slots));
    if (with_bias) c.In("bias", bias);
    if (with_routing_weights) c.In("routing_weights", routing);
    c.Out("out", HostTensor(dtype, {slots, rows}, {}, layout), expected, 0);
    return c.Text();
  }
};

std::string MoeSwiglu(const std::string& variant, DType dtype, int32_t layout,
                      float limit, float alpha, Layout strides, int ulps) {
  const int64_t rows = 3;
  const int64_t n = 7;
  const bool blocked = layout == TENON_SWIGLU_BLOCKED;
  const HostTensor x(dtype, {rows, 2 * n}, Eighths(rows * 2 * n, 51), strides);
  std::vector<double> expected;
  for (int64_t i = 0; i < rows * n; ++i) {
    const double* row = &x.values()[i / n * 2 * n];
    const double gate = row[blocked ? i % n : 2 * (i % n)];
    const double up = row[blocked ? i % n + n : 2 * (i % n) + 1];
    expected.push_back(limit > 0.0f
                           ? reference::SwiGluLimited(gate, up, limit, alpha)
                           : reference::SwiGlu(gate, up, [&](double v) {
                               return Round(dtype, v);
                             }));
  }
  Case c("moe_swiglu", variant);
  c.Arg("layout", layout);
  c.Arg("limit", limit);
  c.Arg("alpha", alpha);
  c.In("x", x);
  c.Out("out", HostTensor(dtype, {rows, n}, {}, strides), expected, ulps);
  return c.Text();
}

std::string MoeSwigluOfNegativeLimit() {
  Case c("moe_swiglu", "rejects_limit");
  c.Arg("limit", -1.0f);
  c.Arg("alpha", 1.0f);
  c.In("x", HostTensor(DType::kFloat32, {2, 4}, Eighths(8, 1)));
  c.In("out", HostTensor(DType::kFloat32, {2, 2}));
  c.Reject(TENON_INVALID_ARGUMENT, "limit");
  return c.Text();
}

std::string MoeSumReduce(const std::string& variant, DType dtype, int64_t top_k,
                         Layout layout) {
  const int64_t tokens = 3;
  const int64_t hidden = 9;
  const HostTensor x(dtype, {tokens, top_k, hidden},
                     Eighths(tokens * top_k * hidden, 61), layout);
  Case c("moe_sum_reduce", variant);
  c.In("x", x);
  c.Out("out", HostTensor(dtype, {tokens, hidden}, {}, layout),
        reference::MoeSumReduce(x.values(), tokens, top_k, hidden), 0);
  return c.Text();
}

struct Moe {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> ids;
  uint32_t flags = 0;
  Layout layout;  // of x, out and the experts
  int ulps = 0;
  bool fp8 = false;  // experts with scales of blocks
  // [tokens, experts], in place of ids: the router is part of the call.
  std::vector<double> router_logits;

  // A row as fp8 keeps it.
  static std::vector<double> Quantised(const std::vector<double>& row) {
    return reference::QuantizeFp8(row, 1, static_cast<int64_t>(row.size()), 1,
                                  128)
        .Dequantized();
  }

  // The same with what the router chooses.
  Moe Routed(int64_t experts, int64_t top_k,
             std::vector<double>* weights) const {
    reference::MoeRouterOptions options;
    options.top_k = top_k;
    options.renormalize = true;
    Moe routed = *this;
    for (auto row = router_logits.begin(); row != router_logits.end();
         row += experts) {
      const reference::MoeRouting routing =
          reference::MoeRoute({row, row + experts}, {}, options);
      Require(routing.margin > 1e-3, "moe: a close choice");
      routed.ids.insert(routed.ids.end(), routing.ids.begin(),
                        routing.ids.end());
      weights->insert(weights->end(), routing.weights.begin(),
                      routing.weights.end());
    }
    return routed;
  }

  std::string Text(const std::string& variant) const {
    const int64_t experts = 3;
    const int64_t top_k = 2;
    std::vector<double> chosen_weights;
    if (router_logits.empty()) {
      chosen_weights = PositiveEighths(Size(ids), 75);
      return Text(variant, experts, top_k, chosen_weights);
    }
    const Moe routed = Routed(experts, top_k, &chosen_weights);
    return routed.Text(variant, experts, top_k, chosen_weights);
  }

  std::string Text(const std::string& variant, int64_t experts, int64_t top_k,
                   const std::vector<double>& routing_weights) const {
    const int64_t hidden = 10;
    const int64_t intermediate = 6;
    const DType weight_dtype = fp8 ? DType::kFloat8E4M3 : dtype;
    const double scale = fp8 ? 0.5 : 1.0;  // of all experts
    const int64_t tokens = Size(ids) / top_k;
    const HostTensor x(dtype, {tokens, hidden},
                       PositiveEighths(tokens * hidden, 71), layout);
    const HostTensor gate(weight_dtype, {experts, intermediate, hidden},
                          PositiveEighths(experts * intermediate * hidden, 72),
                          layout);
    // Signs such that all terms of a sum have one, and the sums have either.
    const auto sign = [](int64_t i) { return i % 3 == 0 ? -1.0 : 1.0; };
    std::vector<double> up_values =
        PositiveEighths(experts * intermediate * hidden, 73);
    std::vector<double> down_values =
        PositiveEighths(experts * hidden * intermediate, 74);
    for (int64_t i = 0; i < experts * intermediate * hidden; ++i) {
      up_values[i] *= sign(i / hidden % intermediate) / 8;
      down_values[i] *=
          sign(i / intermediate % hidden) * sign(i % intermediate) / 8;
    }
    const HostTensor up(weight_dtype, {experts, intermediate, hidden},
                        up_values, layout);
    const HostTensor down(weight_dtype, {experts, hidden, intermediate},
                          down_values, layout);
    const HostTensor weights(DType::kFloat32, {tokens, top_k}, routing_weights);
    const auto scaled = [&](const HostTensor& matrices) {
      std::vector<double> values = matrices.values();
      for (double& v : values) v *= scale;
      return values;
    };
    const std::vector<double> gates = scaled(gate);
    const std::vector<double> ups = scaled(up);
    const std::vector<double> downs = scaled(down);
    const auto round = [&](double v) { return Round(dtype, v); };
    std::vector<double> expected;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<reference::MoeExpert> chosen;
      std::vector<double> chosen_weights;
      for (int64_t j = t * top_k; j < (t + 1) * top_k; ++j) {
        if (ids[j] < 0 || ids[j] >= experts) continue;
        const int64_t at = ids[j] * intermediate * hidden;
        chosen.push_back({&gates[at], &ups[at], &downs[at]});
        chosen_weights.push_back(weights.values()[j]);
      }
      const auto begin = x.values().begin() + t * hidden;
      const std::vector<double> row(begin, begin + hidden);
      const std::vector<double> y =
          fp8 ? reference::MoeToken(Quantised(row), intermediate, chosen,
                                    chosen_weights, round, Quantised)
              : reference::MoeToken(row, intermediate, chosen, chosen_weights,
                                    round);
      expected.insert(expected.end(), y.begin(), y.end());
    }
    Case c("moe", variant);
    c.Arg("flags", int64_t{flags});
    c.In("x", x);
    if (router_logits.empty()) {
      c.In("topk_weights", weights);
      c.In("topk_ids", Int32({tokens, top_k}, ids));
    } else {
      c.Arg("router.top_k", top_k);
      c.Arg("router.renormalize", 1);
      c.In("router.logits",
           HostTensor(DType::kFloat32, {tokens, experts}, router_logits));
      c.Out("topk_weights", HostTensor(DType::kFloat32, {tokens, top_k}),
            routing_weights, 16);
      c.Out("topk_ids", HostTensor(DType::kInt32, {tokens, top_k}),
            FromIntegers(ids), 0);
    }
    c.In("gate", gate);
    c.In("up", up);
    c.In("down", down);
    for (const char* field : {"gate_scales", "up_scales", "down_scales"}) {
      if (!fp8) continue;
      c.In(field, HostTensor(DType::kFloat32, {experts, 1, 1},
                             std::vector<double>(experts, scale)));
    }
    c.Out("out", HostTensor(dtype, {tokens, hidden}, {}, layout), expected,
          ulps);
    return c.Text();
  }
};

std::string MoeOfAnotherIdDtype() {
  Case c("moe", "rejects_dtype_of_ids");
  c.In("x", HostTensor(DType::kFloat32, {1, 4}, Eighths(4, 1)));
  c.In("topk_weights", HostTensor(DType::kFloat32, {1, 1}, {1.0}));
  c.In("topk_ids", HostTensor(DType::kInt64, {1, 1}, {0}));
  for (const char* field : {"gate", "up"}) {
    c.In(field, HostTensor(DType::kFloat32, {1, 2, 4}, Eighths(8, 2)));
  }
  c.In("down", HostTensor(DType::kFloat32, {1, 4, 2}, Eighths(8, 3)));
  c.In("out", HostTensor(DType::kFloat32, {1, 4}));
  c.Reject(TENON_INVALID_ARGUMENT, "topk_ids");
  return c.Text();
}

}  // namespace

std::string MoeAlignCases() {
  return MoeAlign("plain", 2, {3, 0, 1, 3, 0, 2}, 4, 0, {}) +
         MoeAlign("strided_ids_outside", 3, {1, -1, 4, 2, 1, 9}, 4, 0, {1, 1}) +
         MoeAlign("tiles", 1, {1, 0, 1, 1, 2}, 3, 2, {}) +
         MoeAlignWithoutExperts();
}

std::string MoeGroupedMatmulCases() {
  MoeGroupedMatmul up;
  up.ids = {2, 0, 0, 2, 1, 0};
  up.slots_per_row = 2;
  up.with_bias = true;
  MoeGroupedMatmul down;
  down.dtype = DType::kBFloat16;
  down.ids = {1, -1, 0, 1};
  down.with_routing_weights = true;
  down.layout = {5, 1};
  MoeGroupedMatmul both;
  both.dtype = DType::kFloat16;
  both.ids = {2, 2, 2, 3, 1};
  both.slots_per_row = 3;
  both.with_bias = true;
  both.with_routing_weights = true;
  both.flags = TENON_FLAG_BATCH_INVARIANT;
  return up.Text("float32_up_bias") +
         down.Text("bfloat16_down_strided_id_outside") +
         both.Text("float16_bias_routing");
}

std::string MoeSwigluCases() {
  return MoeSwiglu("float32_blocked", DType::kFloat32, TENON_SWIGLU_BLOCKED,
                   0.0f, 0.0f, {}, 16) +
         MoeSwiglu("bfloat16_interleaved_strided", DType::kBFloat16,
                   TENON_SWIGLU_INTERLEAVED, 0.0f, 0.0f, {3, 1}, 2) +
         MoeSwiglu("float16_limit", DType::kFloat16, TENON_SWIGLU_INTERLEAVED,
                   1.25f, 1.702f, {}, 2) +
         MoeSwigluOfNegativeLimit();
}

std::string MoeSumReduceCases() {
  return MoeSumReduce("float32", DType::kFloat32, 4, {}) +
         MoeSumReduce("bfloat16_strided", DType::kBFloat16, 3, {3, 1}) +
         MoeSumReduce("float16", DType::kFloat16, 1, {});
}

std::string MoeCases() {
  Moe float32;
  float32.ids = {2, 0, 1, 2, 0, 1};
  float32.ulps = 32;
  Moe bfloat16;
  bfloat16.dtype = DType::kBFloat16;
  bfloat16.ids = {0, -1, 1, 0};
  bfloat16.layout = {6, 3};
  bfloat16.ulps = 2;
  Moe float16;
  float16.dtype = DType::kFloat16;
  float16.ids = {1, 2};
  float16.flags = TENON_FLAG_BATCH_INVARIANT;
  float16.ulps = 2;
  Moe float8;
  float8.dtype = DType::kBFloat16;
  float8.ids = {1, 0, 2, 1};
  float8.fp8 = true;
  float8.ulps = 2;
  Moe with_router;
  with_router.router_logits = {0.5, -1.0, 2.0, 1.5, 0.25, -0.5};
  with_router.ulps = 64;
  return float32.Text("float32") + with_router.Text("float32_router") +
         bfloat16.Text("bfloat16_strided_id_outside") +
         float16.Text("float16_batch_invariant") +
         float8.Text("bfloat16_float8_experts") + MoeOfAnotherIdDtype();
}

}  // namespace tenon::conformance
