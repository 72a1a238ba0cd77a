// embedding, rms_norm, linear and quantize_fp8.

#include <cmath>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"
#include "tests/reference/embedding_reference.h"
#include "tests/reference/linear_reference.h"
#include "tests/reference/quantize_reference.h"
#include "tests/reference/rms_norm_reference.h"

namespace tenon::conformance {
namespace {

std::string Embedding(const std::string& variant, DType dtype, DType id_dtype,
                      const std::vector<int64_t>& ids, Layout layout) {
  const int64_t vocab = 7;
  const int64_t hidden = 5;
  const auto tokens = static_cast<int64_t>(ids.size());
  const HostTensor table(dtype, {vocab, hidden}, Eighths(vocab * hidden, 1),
                         layout);
  Case c("embedding", variant);
  c.In("ids", HostTensor(id_dtype, {tokens}, FromIntegers(ids)));
  c.In("table", table);
  c.Out("out", HostTensor(dtype, {tokens, hidden}, {}, layout),
        reference::Embedding(ids, table.values(), vocab, hidden), 0);
  return c.Text();
}

std::string EmbeddingOfFloatIds() {
  Case c("embedding", "rejects_dtype_of_ids");
  c.In("ids", HostTensor(DType::kFloat32, {2}, {1, 2}));
  c.In("table", HostTensor(DType::kFloat32, {3, 4}, Eighths(12, 1)));
  c.In("out", HostTensor(DType::kFloat32, {2, 4}));
  c.Reject(TENON_INVALID_ARGUMENT, "ids");
  return c.Text();
}

struct RmsNorm {
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  int32_t rounding = TENON_ROUNDING_FLOAT32_MULTIPLY;
  bool residual = false;
  int64_t tokens = 3;
  int64_t hidden = 13;
  Layout layout;
  int ulps = 1;

  std::string Text(const std::string& variant) const {
    const float epsilon = 1e-5f;
    const int64_t count = tokens * hidden;
    const HostTensor x(dtype, {tokens, hidden}, Eighths(count, 2), layout);
    const HostTensor before(dtype, {tokens, hidden}, Eighths(count, 3), layout);
    const HostTensor weight(weight_dtype, {hidden}, PositiveEighths(hidden, 4));
    std::vector<double> sum = x.values();
    if (residual) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += before.values()[i];
    }
    std::vector<double> normed;
    for (auto row = sum.begin(); row != sum.end(); row += hidden) {
      const auto out = reference::RmsNorm(
          {row, row + hidden}, weight.values(), epsilon, [&](double v) {
            return rounding == TENON_ROUNDING_CAST_THEN_MULTIPLY
                       ? Round(dtype, v)
                       : v;
          });
      normed.insert(normed.end(), out.begin(), out.end());
    }
    Case c("rms_norm", variant);
    c.Arg("epsilon", epsilon);
    c.Arg("rounding", rounding);
    c.In("x", x);
    if (residual) c.Out("residual", before, sum, 0);
    c.In("weight", weight);
    c.Out("out", HostTensor(dtype, {tokens, hidden}, {}, layout), normed, ulps);
    return c.Text();
  }
};

std::string RmsNormWithoutEpsilon() {
  Case c("rms_norm", "rejects_epsilon_0");
  c.Arg("epsilon", 0.0f);
  c.In("x", HostTensor(DType::kFloat32, {1, 4}, Eighths(4, 1)));
  c.In("weight", HostTensor(DType::kFloat32, {4}, Eighths(4, 2)));
  c.In("out", HostTensor(DType::kFloat32, {1, 4}));
  c.Reject(TENON_INVALID_ARGUMENT, "epsilon");
  return c.Text();
}

struct Linear {
  DType dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;
  uint32_t flags = 0;
  bool with_bias = true;
  int64_t tokens = 3;
  Layout layout;

  std::string Text(const std::string& variant) const {
    const int64_t in = 13;
    const int64_t out = 5;
    const HostTensor x(dtype, {tokens, in}, Eighths(tokens * in, 5), layout);
    const HostTensor weight(dtype, {out, in}, Eighths(out * in, 6), layout);
    const HostTensor bias(dtype, {out}, Eighths(out, 7));
    Case c("linear", variant);
    c.Arg("flags", int64_t{flags});
    c.In("x", x);
    c.In("weight", weight);
    if (with_bias) c.In("bias", bias);
    c.Out("out", HostTensor(out_dtype, {tokens, out}, {}, layout),
          reference::Linear(x.values(), weight.values(),
                            with_bias ? bias.values() : std::vector<double>(),
                            tokens, out, in)
              .out,
          0);
    return c.Text();
  }
};

// x in steps of 1 / 8 up to 448 * scale is quantised exactly.
std::string LinearFp8() {
  const int64_t tokens = 2, in = 130, out = 3;
  const HostTensor x(DType::kBFloat16, {tokens, in}, Eighths(tokens * in, 8));
  const HostTensor weight(DType::kFloat8E4M3, {out, in}, Eighths(out * in, 9),
                          {2, 1});
  const HostTensor scales(DType::kFloat32, {1, 2}, {0.5, 2.0});
  std::vector<double> quantised =
      reference::QuantizeFp8(x.values(), tokens, in, 1, 128).Dequantized();
  std::vector<double> weights = weight.values();
  for (int64_t i = 0; i < out * in; ++i) {
    weights[i] *= scales.values()[i % in / 128];
  }
  Case c("linear", "float8_weight_of_blocks");
  c.In("x", x);
  c.In("weight", weight);
  c.In("weight_scales", scales);
  c.Out("out", HostTensor(DType::kFloat32, {tokens, out}),
        reference::Linear(quantised, weights, {}, tokens, out, in).out, 64);
  return c.Text();
}

std::string QuantizeFp8(const std::string& variant, DType dtype, int64_t rows,
                        int64_t cols, int32_t block_rows, int32_t block_cols,
                        Layout layout) {
  const HostTensor x(dtype, {rows, cols}, Eighths(rows * cols, 10), layout);
  const reference::QuantizedFp8 expected =
      reference::QuantizeFp8(x.values(), rows, cols, block_rows, block_cols);
  const std::vector<int64_t> of_scales =
      block_cols == 0
          ? std::vector<int64_t>{rows}
          : std::vector<int64_t>{(rows + block_rows - 1) / block_rows,
                                 (cols + block_cols - 1) / block_cols};
  Case c("quantize_fp8", variant);
  c.Arg("block_rows", block_rows);
  c.Arg("block_cols", block_cols);
  c.In("x", x);
  c.Out("out", HostTensor(DType::kFloat8E4M3, {rows, cols}, {}, layout),
        expected.out, 0);
  c.Out("scales", HostTensor(DType::kFloat32, of_scales), expected.scales, 0);
  return c.Text();
}

std::string QuantizeFp8OfAnotherBlock() {
  Case c("quantize_fp8", "rejects_block_rows");
  c.Arg("block_rows", 2);
  c.Arg("block_cols", 128);
  c.In("x", HostTensor(DType::kFloat32, {2, 4}, Eighths(8, 1)));
  c.In("out", HostTensor(DType::kFloat8E4M3, {2, 4}));
  c.In("scales", HostTensor(DType::kFloat32, {1, 1}));
  c.Reject(TENON_INVALID_ARGUMENT, "block_rows");
  return c.Text();
}

std::string LinearOfAnotherDepth() {
  Case c("linear", "rejects_in_features");
  c.In("x", HostTensor(DType::kFloat32, {2, 4}, Eighths(8, 1)));
  c.In("weight", HostTensor(DType::kFloat32, {3, 5}, Eighths(15, 2)));
  c.In("out", HostTensor(DType::kFloat32, {2, 3}));
  c.Reject(TENON_INVALID_ARGUMENT, "weight");
  return c.Text();
}

}  // namespace

std::string EmbeddingCases() {
  return Embedding("float32", DType::kFloat32, DType::kInt32, {3, 0, 6, 3},
                   {}) +
         Embedding("bfloat16_strided_ids_outside", DType::kBFloat16,
                   DType::kInt64, {6, -1, 2, 7}, {3, 1}) +
         Embedding("float16_zero_tokens", DType::kFloat16, DType::kInt32, {},
                   {}) +
         EmbeddingOfFloatIds();
}

std::string RmsNormCases() {
  RmsNorm bfloat16;
  bfloat16.dtype = DType::kBFloat16;
  bfloat16.weight_dtype = DType::kBFloat16;
  bfloat16.rounding = TENON_ROUNDING_CAST_THEN_MULTIPLY;
  bfloat16.residual = true;
  bfloat16.hidden = 16;
  bfloat16.layout = {5, 3};
  bfloat16.ulps = 2;  // a change of the first rounding, multiplied
  RmsNorm float16;
  float16.dtype = DType::kFloat16;
  float16.residual = true;
  float16.hidden = 8;
  RmsNorm float32;
  float32.ulps = 8;
  RmsNorm empty = bfloat16;
  empty.tokens = 0;
  return float32.Text("float32") +
         bfloat16.Text("bfloat16_residual_cast_strided") +
         float16.Text("float16_residual_float32_weight") +
         empty.Text("bfloat16_zero_tokens") + RmsNormWithoutEpsilon();
}

std::string LinearCases() {
  Linear bfloat16;
  bfloat16.dtype = DType::kBFloat16;
  bfloat16.layout = {3, 1};
  Linear float16;
  float16.dtype = DType::kFloat16;
  float16.out_dtype = DType::kFloat16;
  float16.flags = TENON_FLAG_BATCH_INVARIANT;
  float16.with_bias = false;
  float16.tokens = 9;
  return Linear().Text("float32_bias") +
         bfloat16.Text("bfloat16_strided_float32_out") +
         float16.Text("float16_batch_invariant") + LinearFp8() +
         LinearOfAnotherDepth();
}

std::string QuantizeFp8Cases() {
  return QuantizeFp8("float32_groups", DType::kFloat32, 3, 130, 1, 128, {}) +
         QuantizeFp8("bfloat16_blocks_strided", DType::kBFloat16, 2, 5, 128,
                     128, {3, 1}) +
         QuantizeFp8("float16_rows", DType::kFloat16, 2, 131, 1, 0, {}) +
         QuantizeFp8OfAnotherBlock();
}

}  // namespace tenon::conformance
