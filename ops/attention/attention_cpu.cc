#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ops/attention/attention_backend.h"
#include "ops/attention/attention_cpu_keys.h"
#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"

namespace tenon {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Floats of the keys and values of a block that wait in the L1 cache for all
// queries that share them.
constexpr int64_t kBlockFloats = 4096;

// Consecutive tokens that share the keys they convert.
constexpr int64_t kTokensPerItem = 8;

constexpr float DecodeFloat8(int bits) {
  const int exponent = bits >> 3 & 15;
  const int fraction = bits & 7;
  if (exponent == 15 && fraction == 7) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  float value = exponent == 0 ? fraction : fraction + 8;
  for (int i = exponent == 0 ? 1 : exponent; i < 10; ++i) value *= 0.5f;
  for (int i = exponent; i > 10; --i) value *= 2.0f;
  return bits < 128 ? value : -value;
}

constexpr std::array<float, 256> MakeFloat8Values() {
  std::array<float, 256> values = {};
  for (int i = 0; i < 256; ++i) values[i] = DecodeFloat8(i);
  return values;
}
constexpr std::array<float, 256> kFloat8Values = MakeFloat8Values();

// Returns the row as floats: itself where it is, else converted into `to`.
const float* AsFloats(DType dtype, const void* row, int64_t count, float* to) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row);
  if (dtype == DType::kFloat8E4M3) {
    const auto* bits = static_cast<const uint8_t*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = kFloat8Values[bits[i]];
  } else {
    CpuConvertToFloat(dtype, row, count, to);
  }
  return to;
}

const void* At(const TensorView& view, int64_t i, int64_t j, int64_t k) {
  const int64_t offset =
      i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
  return view.As<char>() + offset * static_cast<int64_t>(DTypeSize(view.dtype));
}

// Consecutive tokens of one sequence.
struct TokenRun {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t sequence = -1;  // -1: of none
  int32_t length = 0;     // keys that the first token attends to; may be < 0

  int32_t Length(int64_t token) const {
    return static_cast<int32_t>(std::max<int64_t>(0, length + token - begin));
  }
};

// One pass over the tokens [first_token, end_token): scores in parts, then the
// parts of each token combined.
class Pass {
 public:
  Pass(const AttentionParams& params, const AttentionPlan& plan,
       int64_t first_token, int64_t end_token)
      : p_(params),
        plan_(plan),
        isa_(DetectCpuIsa()),
        first_token_(first_token),
        end_token_(end_token),
        num_heads_(params.q.shape[1]),
        num_kv_heads_(params.k_cache.shape[2]),
        head_dim_(params.q.shape[2]) {
    const int64_t heads = (end_token - first_token) * num_heads_;
    query_ = static_cast<float*>(params.workspace);
    partial_ = query_ + heads * head_dim_;
    max_ = partial_ + heads * plan.max_parts * head_dim_;
    sum_ = max_ + heads * plan.max_parts;
  }

  void Run(Stream stream);

 private:
  TokenRun FindRun(int64_t token, int64_t end) const;
  void ScaleQueries(int64_t token) const;
  void AttendItem(int64_t begin, int64_t end, int64_t kv_head,
                  int32_t part) const;
  void AttendRun(const TokenRun& run, int64_t kv_head, int32_t part) const;
  void LoadKeys(const TokenRun& run, int64_t kv_head, int64_t begin,
                int64_t end, float* buffer, AttentionKeys* keys) const;
  void Combine(int64_t token, int64_t head) const;

  int64_t HeadIndex(int64_t token, int64_t head) const {
    return (token - first_token_) * num_heads_ + head;
  }
  AttentionRow Row(int64_t token, int64_t head, int32_t part) const {
    const int64_t index = HeadIndex(token, head) * plan_.max_parts + part;
    return {query_ + HeadIndex(token, head) * head_dim_,
            partial_ + index * head_dim_, max_ + index, sum_ + index};
  }

  const AttentionParams& p_;
  const AttentionPlan& plan_;
  const CpuIsa isa_;
  const int64_t first_token_;
  const int64_t end_token_;
  const int64_t num_heads_;
  const int64_t num_kv_heads_;
  const int64_t head_dim_;
  float* query_;    // [tokens, heads, head_dim], scaled
  float* partial_;  // [tokens, heads, parts, head_dim]
  float* max_;      // [tokens, heads, parts]
  float* sum_;
};

void Pass::Run(Stream stream) {
  const int64_t tokens = end_token_ - first_token_;
  ParallelFor(stream, tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) ScaleQueries(first_token_ + t);
  });
  // A decode batch has nothing to share, and may have few items.
  const int64_t step = p_.max_query_len == 1 ? 1 : kTokensPerItem;
  const int64_t blocks = (tokens + step - 1) / step;
  const int64_t items = blocks * num_kv_heads_ * plan_.max_parts;
  ParallelFor(stream, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      // Neighbours read one sequence's keys.
      const int64_t block = item / (num_kv_heads_ * plan_.max_parts);
      const int64_t first = first_token_ + block * step;
      AttendItem(first, std::min(first + step, end_token_),
                 item % num_kv_heads_,
                 static_cast<int32_t>(item / num_kv_heads_ % plan_.max_parts));
    }
  });
  ParallelFor(stream, tokens * num_heads_, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Combine(first_token_ + i / num_heads_, i % num_heads_);
    }
  });
}

// The tokens from `token` on, up to `end`, of its sequence.
TokenRun Pass::FindRun(int64_t token, int64_t end) const {
  const int64_t num_seqs = p_.block_table.shape[0];
  const auto* start = p_.query_start.As<const int32_t>();
  TokenRun run;
  run.begin = token;
  run.end = end;
  const int64_t sequence =
      std::upper_bound(start, start + num_seqs + 1, token) - start - 1;
  if (sequence == num_seqs) return run;
  run.end = std::min<int64_t>(end, start[sequence + 1]);
  if (sequence < 0) {
    run.end = std::min<int64_t>(end, start[0]);
    return run;
  }
  const int32_t kv_len =
      std::clamp(p_.kv_len.As<const int32_t>()[sequence], 0, plan_.max_kv_len);
  run.sequence = sequence;
  run.length = static_cast<int32_t>(int64_t{kv_len} -
                                    (int64_t{start[sequence + 1]} - token) + 1);
  return run;
}

// Queries go into the products scaled, in the units that FoldKeys() expects.
void Pass::ScaleQueries(int64_t token) const {
  const float scale = p_.scale * p_.k_scale * kLog2E;
  for (int64_t head = 0; head < num_heads_; ++head) {
    float* to = query_ + HeadIndex(token, head) * head_dim_;
    CpuConvertToFloat(p_.q.dtype, At(p_.q, token, head, 0), head_dim_, to);
    for (int64_t d = 0; d < head_dim_; ++d) to[d] *= scale;
  }
}

void Pass::AttendItem(int64_t begin, int64_t end, int64_t kv_head,
                      int32_t part) const {
  for (int64_t token = begin; token < end;) {
    const TokenRun run = FindRun(token, end);
    if (run.sequence >= 0) AttendRun(run, kv_head, part);
    token = run.end;
  }
}

void Pass::AttendRun(const TokenRun& run, int64_t kv_head, int32_t part) const {
  const int64_t group = num_heads_ / num_kv_heads_;
  // Part lengths follow from the token's own context, so that neighbours may
  // differ: each token has its own window of keys.
  const auto window = [&](int64_t token) {
    const int32_t length = run.Length(token);
    const int64_t part_length = length > 0 ? plan_.parts.Length(length) : 0;
    const int64_t begin = std::min<int64_t>(part * part_length, length);
    return std::pair<int64_t, int64_t>(
        begin, std::min<int64_t>(begin + part_length, length));
  };
  int64_t begin = std::numeric_limits<int64_t>::max();
  int64_t end = 0;
  for (int64_t token = run.begin; token < run.end; ++token) {
    const auto [first, last] = window(token);
    if (first == last) continue;
    begin = std::min(begin, first);
    end = std::max(end, last);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const AttentionRow row = Row(token, head, part);
      std::fill_n(row.out, head_dim_, 0.0f);
      *row.max = -kInfinity;
      *row.sum = 0.0f;
    }
  }
  alignas(64) float buffer[2 * kBlockFloats];
  AttentionKeys keys;
  const int64_t step = kBlockFloats / head_dim_;
  for (int64_t key = begin; key < end; key += step) {
    LoadKeys(run, kv_head, key, std::min(key + step, end), buffer, &keys);
    for (int64_t token = run.begin; token < run.end; ++token) {
      const auto [first, last] = window(token);
      const int64_t count = std::min(key + keys.count, last) - key;
      if (key < first || count <= 0) continue;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group;
           ++head) {
        FoldKeys(isa_, keys, static_cast<int>(count), head_dim_,
                 Row(token, head, part));
      }
    }
  }
}

void Pass::LoadKeys(const TokenRun& run, int64_t kv_head, int64_t begin,
                    int64_t end, float* buffer, AttentionKeys* keys) const {
  const int64_t page_size = p_.k_cache.shape[1];
  const auto* table = p_.block_table.As<const int32_t>() +
                      run.sequence * p_.block_table.stride[0];
  keys->count = static_cast<int>(end - begin);
  for (int i = 0; i < keys->count; ++i) {
    const int64_t key = begin + i;
    int64_t page = table[key / page_size];
    if (page < 0 || page >= p_.k_cache.shape[0]) page = 0;
    const int64_t slot = key % page_size;
    keys->k[i] = AsFloats(p_.k_cache.dtype, At(p_.k_cache, page, slot, kv_head),
                          head_dim_, buffer + i * head_dim_);
    keys->v[i] = AsFloats(p_.v_cache.dtype, At(p_.v_cache, page, slot, kv_head),
                          head_dim_, buffer + kBlockFloats + i * head_dim_);
  }
}

void Pass::Combine(int64_t token, int64_t head) const {
  const int32_t length = [&] {
    const TokenRun run = FindRun(token, token + 1);
    return run.sequence >= 0 ? run.Length(token) : 0;
  }();
  const int32_t parts = length > 0 ? plan_.parts.Count(length) : 0;
  float max = -kInfinity;
  for (int32_t i = 0; i < parts; ++i) {
    max = std::max(max, *Row(token, head, i).max);
  }
  float sum = 0.0f;
  float out[256] = {};
  for (int32_t i = 0; i < parts; ++i) {
    const AttentionRow row = Row(token, head, i);
    const float weight = *row.max == max ? 1.0f : std::exp2(*row.max - max);
    sum += *row.sum * weight;
    for (int64_t d = 0; d < head_dim_; ++d) out[d] += row.out[d] * weight;
  }
  const float scale = parts > 0 ? p_.v_scale / sum : 0.0f;
  for (int64_t d = 0; d < head_dim_; ++d) out[d] *= scale;
  CpuConvertFromFloat(p_.out.dtype, out, head_dim_,
                      const_cast<void*>(At(p_.out, token, head, 0)));
}

}  // namespace

Status AttentionCpu(const AttentionParams& params, const AttentionPlan& plan,
                    Stream stream) {
  const int64_t tokens = params.q.shape[0];
  for (int64_t first = 0; first < tokens; first += plan.rows_per_pass) {
    Pass(params, plan, first, std::min(first + plan.rows_per_pass, tokens))
        .Run(stream);
  }
  return Status();
}

}  // namespace tenon
