#include <algorithm>

#include "abi/tenon.h"
#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"
#include "tests/reference/attention_reference.h"

namespace tenon::conformance {
namespace {

constexpr int64_t kHeadDim = 64;

struct Sequence {
  int64_t queries;
  int64_t kv_len;
  std::vector<int64_t> pages;  // its row of the block table
};

struct Attention {
  DType dtype = DType::kFloat32;
  DType cache_dtype = DType::kFloat32;
  int64_t num_heads = 2;
  int64_t num_kv_heads = 1;
  int64_t num_pages = 3;
  int64_t page_size = 2;
  std::vector<Sequence> sequences;
  int64_t uncovered_tokens = 0;  // after those of the sequences
  Layout layout;
  float k_scale = 0.0f;
  float v_scale = 0.0f;
  uint32_t flags = 0;
  int32_t max_kv_len = 0;
  int32_t max_query_len = 0;
  int ulps = 2;

  std::string Text(const std::string& variant) const {
    const float scale = 0.125f;
    std::vector<int64_t> starts = {0};
    std::vector<int64_t> lengths;
    std::vector<int64_t> block_table;
    for (const Sequence& s : sequences) {
      starts.push_back(starts.back() + s.queries);
      lengths.push_back(s.kv_len);
      block_table.insert(block_table.end(), s.pages.begin(), s.pages.end());
    }
    const auto count = static_cast<int64_t>(sequences.size());
    const int64_t tokens = starts.back() + uncovered_tokens;
    const std::vector<int64_t> cache_shape = {num_pages, page_size,
                                              num_kv_heads, kHeadDim};
    const int64_t cache_size = num_pages * page_size * num_kv_heads * kHeadDim;
    const HostTensor q(dtype, {tokens, num_heads, kHeadDim},
                       Eighths(tokens * num_heads * kHeadDim, 31), layout);
    const HostTensor k(cache_dtype, cache_shape, Eighths(cache_size, 32),
                       layout);
    // Of one sign in a column, so that the sums keep their digits.
    std::vector<double> v_values = PositiveEighths(cache_size, 33);
    for (int64_t i = 0; i < cache_size; ++i) {
      if (i % kHeadDim % 3 == 0) v_values[i] = -v_values[i];
    }
    const HostTensor v(cache_dtype, cache_shape, v_values, layout);

    Case c("attention", variant);
    c.Arg("flags", int64_t{flags});
    c.Arg("scale", scale);
    c.Arg("k_scale", k_scale);
    c.Arg("v_scale", v_scale);
    c.Arg("max_kv_len", max_kv_len);
    c.Arg("max_query_len", max_query_len);
    c.In("q", q);
    c.In("k_cache", k);
    c.In("v_cache", v);
    c.In("block_table",
         HostTensor(DType::kInt32,
                    {count, static_cast<int64_t>(block_table.size()) / count},
                    FromIntegers(block_table)));
    c.In("query_start",
         HostTensor(DType::kInt32, {count + 1}, FromIntegers(starts)));
    c.In("kv_len", HostTensor(DType::kInt32, {count}, FromIntegers(lengths)));
    c.Out("out", HostTensor(dtype, {tokens, num_heads, kHeadDim}, {}, layout),
          Expected(q.values(), k.values(), v.values(), scale), ulps);
    return c.Text();
  }

 private:
  std::vector<double> Expected(const std::vector<double>& q,
                               const std::vector<double>& k,
                               const std::vector<double>& v,
                               double scale) const {
    const double key_scale = k_scale == 0.0f ? 1.0 : k_scale;
    const double value_scale = v_scale == 0.0f ? 1.0 : v_scale;
    std::vector<double> expected;
    auto query = q.begin();
    for (const Sequence& s : sequences) {
      for (int64_t i = 0; i < s.queries * num_heads; ++i, query += kHeadDim) {
        const int64_t visible =
            std::max<int64_t>(0, s.kv_len - s.queries + i / num_heads + 1);
        const int64_t kv_head = i % num_heads / (num_heads / num_kv_heads);
        const auto at = [&](int64_t position) {
          const int64_t slot =
              s.pages[position / page_size] * page_size + position % page_size;
          return (slot * num_kv_heads + kv_head) * kHeadDim;
        };
        for (double value : reference::Attention(
                 {query, query + kHeadDim}, visible,
                 [&](int64_t p) { return &k[at(p)]; },
                 [&](int64_t p) { return &v[at(p)]; }, scale * key_scale)) {
          expected.push_back(value * value_scale);
        }
      }
    }
    expected.resize(q.size());  // zeros for tokens of no sequence
    return expected;
  }
};

std::string AttentionWithoutScale() {
  Case c("attention", "rejects_scale_0");
  c.In("q", HostTensor(DType::kFloat32, {1, 1, 64}, Eighths(64, 1)));
  c.In("k_cache", HostTensor(DType::kFloat32, {1, 1, 1, 64}, Eighths(64, 2)));
  c.In("v_cache", HostTensor(DType::kFloat32, {1, 1, 1, 64}, Eighths(64, 3)));
  c.In("block_table", HostTensor(DType::kInt32, {1, 1}, {0}));
  c.In("query_start", HostTensor(DType::kInt32, {2}, {0, 1}));
  c.In("kv_len", HostTensor(DType::kInt32, {1}, {1}));
  c.In("out", HostTensor(DType::kFloat32, {1, 1, 64}));
  c.Reject(TENON_INVALID_ARGUMENT, "scale");
  return c.Text();
}

}  // namespace

std::string AttentionCases() {
  Attention decode;
  decode.sequences = {{1, 3, {2, 0}}, {1, 1, {1, 0}}};
  decode.max_query_len = 1;
  decode.ulps = 64;
  // Prefill, a sequence that waits, decode; a query before the first position;
  // a token of no sequence.
  Attention ragged;
  ragged.dtype = ragged.cache_dtype = DType::kBFloat16;
  ragged.num_heads = 4;
  ragged.num_kv_heads = 2;
  ragged.num_pages = 5;
  ragged.sequences = {{3, 5, {4, 0, 2}},
                      {0, 2, {1, 0, 0}},
                      {1, 2, {3, 0, 0}},
                      {2, 1, {1, 0, 0}}};
  ragged.uncovered_tokens = 1;
  ragged.layout = {8, 3};
  Attention float8;
  float8.dtype = DType::kFloat16;
  float8.cache_dtype = DType::kFloat8E4M3;
  float8.page_size = 3;
  float8.sequences = {{2, 7, {1, 0, 2}}};
  float8.k_scale = 0.5f;
  float8.v_scale = 1.5f;
  float8.flags = TENON_FLAG_BATCH_INVARIANT;
  float8.max_kv_len = 8;
  return decode.Text("float32_decode") +
         ragged.Text("bfloat16_ragged_strided") +
         float8.Text("float16_float8_cache") + AttentionWithoutScale();
}

}  // namespace tenon::conformance
