#include <algorithm>
#include <cmath>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"
#include "tests/reference/qk_norm_reference.h"
#include "tests/reference/rms_norm_reference.h"

namespace tenon::conformance {
namespace {

constexpr int64_t kHeadDim = 64;
constexpr int64_t kQueryHeads = 2;
constexpr int64_t kKeyHeads = 1;
constexpr int64_t kMaxPositions = 3;
constexpr int64_t kPages = 2;
constexpr int64_t kPageSize = 2;
constexpr float kEpsilon = 1e-6f;
constexpr double kQuarterTurn = 1.57079632679489662;

struct QkNorm {
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
  int32_t rounding = TENON_ROUNDING_FLOAT32_MULTIPLY;
  bool packed = true;
  int64_t rotary_dim = 0;  // 0: no rotation
  std::vector<int64_t> positions;
  DType position_dtype = DType::kInt32;
  DType cache_dtype = DType::kInvalid;  // kInvalid: no cache
  std::vector<int64_t> slots;
  float k_scale = 0.0f;
  float v_scale = 0.0f;
  int64_t tokens = 3;
  int ulps = 1;

  // The first seed for which no rounding is a close call.
  std::string Text(const std::string& variant) const {
    for (uint64_t seed = 1;; ++seed) {
      Require(seed < 1000, "qk_norm: no seed is good");
      double margin = 1.0;
      const std::string text = Text(variant, seed, &margin);
      if (margin > 2e-3 || dtype == DType::kFloat32) return text;
    }
  }

 private:
  // Heads of which the first half of the rotated elements is at least twice as
  // large as the second, so that no difference in a rotation is near zero.
  std::vector<double> Heads(int64_t heads, uint64_t seed) const {
    const int64_t count = tokens * heads * kHeadDim;
    std::vector<double> values = PositiveEighths(count, seed);
    const std::vector<double> signs = Eighths(count, seed + 1);
    const int64_t period = rotary_dim > 0 ? rotary_dim : kHeadDim;
    for (int64_t i = 0; i < count; ++i) {
      const bool first = i % kHeadDim % period < period / 2;
      values[i] = first ? 2.0 + values[i] / 2.0 : 0.25 + values[i] / 4.0;
      if (signs[i] < 0.0) values[i] = -values[i];
    }
    return values;
  }

  // Angles of 36 to 54 degrees, and these after one to three quarter turns.
  static std::vector<double> CosSin(int64_t rotary_dim) {
    std::vector<double> table;
    for (int64_t position = 0; position < kMaxPositions; ++position) {
      for (int64_t i = 0; i < rotary_dim; ++i) {
        const int64_t step = 5 * position + 3 * (i % (rotary_dim / 2));
        const double angle = 0.63 + static_cast<double>(step % 8) * 0.04 +
                             static_cast<double>(step % 4) * kQuarterTurn;
        table.push_back(i < rotary_dim / 2 ? std::cos(angle) : std::sin(angle));
      }
    }
    return table;
  }

  std::vector<double> Processed(const std::vector<double>& heads,
                                int64_t num_heads,
                                const std::vector<double>& weight,
                                const std::vector<double>& table,
                                double* margin) const {
    std::vector<double> out;
    for (size_t at = 0; at < heads.size(); at += kHeadDim) {
      const auto begin = heads.begin() + static_cast<int64_t>(at);
      std::vector<double> head = reference::RmsNorm(
          {begin, begin + kHeadDim}, weight, kEpsilon, [&](double v) {
            if (rounding == TENON_ROUNDING_FLOAT32_MULTIPLY) return v;
            *margin = std::min(*margin, RoundingMargin(dtype, v));
            return Round(dtype, v);
          });
      for (double& v : head) {
        *margin = std::min(*margin, RoundingMargin(dtype, v));
        v = Round(dtype, v);
      }
      const int64_t token = static_cast<int64_t>(at) / kHeadDim / num_heads;
      const int64_t position = rotary_dim > 0 ? positions[token] : -1;
      if (position >= 0 && position < kMaxPositions) {
        const double* row = &table[position * rotary_dim];
        head = reference::Rotate(head, {row, row + rotary_dim / 2},
                                 {row + rotary_dim / 2, row + rotary_dim});
      }
      for (double v : head) out.push_back(Round(dtype, v));
    }
    return out;
  }

  // Rows with the heads of Q, K and V, and `gap` other elements after each.
  std::vector<double> Pack(const std::vector<double>& q,
                           const std::vector<double>& k,
                           const std::vector<double>& v, int64_t gap) const {
    std::vector<double> rows;
    for (int64_t t = 0; t < tokens; ++t) {
      for (const std::vector<double>* part : {&q, &k, &v}) {
        const auto width = static_cast<int64_t>(part->size()) / tokens;
        rows.insert(rows.end(), part->begin() + t * width,
                    part->begin() + (t + 1) * width);
        rows.insert(rows.end(), static_cast<size_t>(gap), 7.0);
      }
    }
    return rows;
  }

  void AddCache(const std::string& field, const std::vector<double>& heads,
                double scale, Case* c) const {
    const int64_t width = kKeyHeads * kHeadDim;
    const HostTensor before(cache_dtype,
                            {kPages, kPageSize, kKeyHeads, kHeadDim},
                            Eighths(kPages * kPageSize * width, 21), {8, 8});
    std::vector<double> after = before.values();
    for (int64_t t = 0; t < tokens; ++t) {
      if (slots[t] < 0 || slots[t] >= kPages * kPageSize) continue;
      for (int64_t i = 0; i < width; ++i) {
        after[slots[t] * width + i] = heads[t * width + i] / scale;
      }
    }
    c->Out(field, before, after, field == "k_cache" ? ulps : 0);
  }

  std::string Text(const std::string& variant, uint64_t seed,
                   double* margin) const {
    std::vector<double> weight_values = PositiveEighths(kHeadDim, seed + 10);
    for (double& w : weight_values) w = 1.0 + w / 8.0;
    const HostTensor q_weight(weight_dtype, {kHeadDim}, weight_values);
    std::reverse(weight_values.begin(), weight_values.end());
    const HostTensor k_weight(weight_dtype, {kHeadDim}, weight_values);
    const int64_t columns = std::max<int64_t>(rotary_dim, 2);
    const HostTensor table(DType::kFloat32, {kMaxPositions, columns},
                           CosSin(columns));
    const HostTensor q(dtype, {tokens, kQueryHeads, kHeadDim},
                       Heads(kQueryHeads, seed), {24, 4});
    const HostTensor k(dtype, {tokens, kKeyHeads, kHeadDim},
                       Heads(kKeyHeads, seed + 2), {24, 4});
    const HostTensor v(dtype, {tokens, kKeyHeads, kHeadDim},
                       Heads(kKeyHeads, seed + 4));
    const std::vector<double> new_q = Processed(
        q.values(), kQueryHeads, q_weight.values(), table.values(), margin);
    const std::vector<double> new_k = Processed(
        k.values(), kKeyHeads, k_weight.values(), table.values(), margin);

    Case c("qk_norm", variant);
    c.Arg("epsilon", kEpsilon);
    c.Arg("rounding", rounding);
    if (packed) {
      const int64_t gap = 8;
      c.Arg("q_offset", int64_t{0});
      c.Arg("k_offset", kQueryHeads * kHeadDim + gap);
      c.Arg("v_offset", (kQueryHeads + kKeyHeads) * kHeadDim + 2 * gap);
      c.Arg("num_q_heads", kQueryHeads);
      c.Arg("num_kv_heads", kKeyHeads);
      c.Arg("head_dim", kHeadDim);
      const std::vector<double> rows =
          Pack(q.values(), k.values(), v.values(), gap);
      const auto width = static_cast<int64_t>(rows.size()) / tokens;
      c.Out("qkv", HostTensor(dtype, {tokens, width}, rows),
            Pack(new_q, new_k, v.values(), gap), ulps);
    } else {
      c.Out("q", q, new_q, ulps);
      c.Out("k", k, new_k, ulps);
      c.In("v", v);
    }
    c.In("q_weight", q_weight);
    c.In("k_weight", k_weight);
    if (rotary_dim > 0) {
      c.Arg("rotary_dim", rotary_dim);
      c.In("cos_sin", table);
      c.In("positions",
           HostTensor(position_dtype, {tokens}, FromIntegers(positions)));
    }
    if (cache_dtype != DType::kInvalid) {
      c.Arg("k_scale", k_scale);
      c.Arg("v_scale", v_scale);
      AddCache("k_cache", new_k, k_scale == 0.0f ? 1.0 : k_scale, &c);
      AddCache("v_cache", v.values(), v_scale == 0.0f ? 1.0 : v_scale, &c);
      c.In("slot_mapping",
           HostTensor(DType::kInt64, {tokens}, FromIntegers(slots)));
    }
    return c.Text();
  }
};

std::string QkNormOfHeadDim96() {
  Case c("qk_norm", "rejects_head_dim_96");
  c.Arg("epsilon", kEpsilon);
  c.Arg("num_q_heads", 1);
  c.Arg("num_kv_heads", 1);
  c.Arg("head_dim", 96);
  c.Arg("k_offset", 96);
  c.Arg("v_offset", 192);
  c.In("qkv", HostTensor(DType::kFloat32, {1, 288}, Eighths(288, 1)));
  c.In("q_weight", HostTensor(DType::kFloat32, {96}, Eighths(96, 2)));
  c.In("k_weight", HostTensor(DType::kFloat32, {96}, Eighths(96, 3)));
  c.Reject(TENON_INVALID_ARGUMENT, "head_dim");
  return c.Text();
}

}  // namespace

std::string QkNormCases() {
  QkNorm packed;
  packed.dtype = DType::kBFloat16;
  packed.weight_dtype = DType::kBFloat16;
  packed.rounding = TENON_ROUNDING_CAST_THEN_MULTIPLY;
  packed.tokens = 1;
  packed.ulps = 0;
  QkNorm strided;
  strided.dtype = DType::kFloat16;
  strided.packed = false;
  strided.rotary_dim = kHeadDim;
  strided.positions = {2, kMaxPositions};  // the second is not rotated
  strided.tokens = 2;
  QkNorm cached;
  cached.rotary_dim = kHeadDim / 2;
  cached.positions = {0, 2, -1};
  cached.position_dtype = DType::kInt64;
  cached.cache_dtype = DType::kFloat32;
  cached.slots = {3, -1, 0};
  cached.ulps = 16;
  QkNorm float8 = packed;
  float8.rounding = TENON_ROUNDING_FLOAT32_MULTIPLY;
  float8.cache_dtype = DType::kFloat8E4M3;
  float8.slots = {kPages * kPageSize, 1};
  float8.k_scale = 0.5f;
  float8.v_scale = 2.0f;
  float8.tokens = 2;
  return packed.Text("bfloat16_packed") +
         strided.Text("float16_strided_rotary") +
         cached.Text("float32_packed_partial_rotary_cache") +
         float8.Text("bfloat16_packed_float8_cache") + QkNormOfHeadDim96();
}

}  // namespace tenon::conformance
