#include <cmath>
#include <cstring>

#include "ops/core/cpu_matmul.h"
#include "ops/core/cpu_thread_pool.h"
#include "ops/qk_norm/qk_norm_backend.h"

namespace tenon {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// Independent sums: vector registers of any width can hold them without
// changing the order. All head dims are multiples of it.
constexpr int kLanes = 16;

float SumOfSquares(const float* x, int64_t count) {
  float sums[kLanes] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += x[i + lane] * x[i + lane];
    }
  }
  float sum = 0.0f;
  for (float s : sums) sum += s;
  return sum;
}

char* HeadData(const TensorView& heads, int64_t token, int64_t head) {
  return heads.As<char>() + (token * heads.stride[0] + head * heads.stride[1]) *
                                static_cast<int64_t>(DTypeSize(heads.dtype));
}

// Where head 0 of a slot is in a cache.
char* SlotData(const TensorView& cache, int64_t slot) {
  const int64_t page_size = cache.shape[1];
  return cache.As<char>() + (slot / page_size * cache.stride[0] +
                             slot % page_size * cache.stride[1]) *
                                static_cast<int64_t>(DTypeSize(cache.dtype));
}

int64_t PositionOf(const RotaryParams& rotary, int64_t token) {
  return rotary.positions.dtype == DType::kInt64
             ? rotary.positions.As<const int64_t>()[token]
             : rotary.positions.As<const int32_t>()[token];
}

// The cosines and sines of a token; null where it is not rotated.
const float* CosSin(const RotaryParams& rotary, int64_t token) {
  if (!rotary.cos_sin.present()) return nullptr;
  const int64_t position = PositionOf(rotary, token);
  if (position < 0 || position >= rotary.cos_sin.shape[0]) return nullptr;
  return rotary.cos_sin.As<const float>() + position * rotary.cos_sin.stride[0];
}

// Normalises one head in place. `weight` has been converted to float32.
void NormalizeHead(const QkNormParams& p, const float* weight, void* head) {
  const DType dtype = p.q.dtype;
  const int64_t head_dim = p.q.shape[2];
  float x[kMaxHeadDim];
  CpuConvertToFloat(dtype, head, head_dim, x);
  const float mean =
      SumOfSquares(x, head_dim) * (1.0f / static_cast<float>(head_dim));
  const float inv_rms = 1.0f / std::sqrt(mean + p.epsilon);
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= inv_rms;
  if (p.rounding == NormRounding::kCastThenMultiply) {
    CpuConvertFromFloat(dtype, x, head_dim, head);
    CpuConvertToFloat(dtype, head, head_dim, x);
  }
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= weight[i];
  CpuConvertFromFloat(dtype, x, head_dim, head);
}

// Rotates the first `rotary_dim` elements of one head in place.
void RotateHead(DType dtype, int64_t rotary_dim, const float* cos_sin,
                void* head) {
  const int64_t half = rotary_dim / 2;
  float x[kMaxHeadDim];
  float rotated[kMaxHeadDim];
  CpuConvertToFloat(dtype, head, rotary_dim, x);
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[half + i];
    const float cos = cos_sin[i];
    const float sin = cos_sin[half + i];
    rotated[i] = a * cos - b * sin;
    rotated[half + i] = b * cos + a * sin;
  }
  CpuConvertFromFloat(dtype, rotated, rotary_dim, head);
}

// Copies the heads of a token from `heads` into a slot of `cache`.
void WriteSlot(const TensorView& heads, int64_t token, float scale,
               const TensorView& cache, int64_t slot) {
  const int64_t head_dim = heads.shape[2];
  const int64_t head_bytes =
      cache.stride[2] * static_cast<int64_t>(DTypeSize(cache.dtype));
  for (int64_t h = 0; h < heads.shape[1]; ++h) {
    const char* from = HeadData(heads, token, h);
    char* to = SlotData(cache, slot) + h * head_bytes;
    if (cache.dtype == heads.dtype) {
      std::memcpy(to, from,
                  static_cast<size_t>(head_dim) * DTypeSize(heads.dtype));
      continue;
    }
    float x[kMaxHeadDim];
    CpuConvertToFloat(heads.dtype, from, head_dim, x);
    auto* const quantized = reinterpret_cast<Float8E4M3*>(to);
    for (int64_t i = 0; i < head_dim; ++i) {
      quantized[i] = FromFloat<Float8E4M3>(x[i] / scale);
    }
  }
}

void ProcessToken(const QkNormParams& p, const float* q_weight,
                  const float* k_weight, int64_t token) {
  const float* const cos_sin = CosSin(p.rotary, token);
  for (const TensorView* heads : {&p.q, &p.k}) {
    const float* const weight = heads == &p.q ? q_weight : k_weight;
    for (int64_t h = 0; h < heads->shape[1]; ++h) {
      char* const head = HeadData(*heads, token, h);
      NormalizeHead(p, weight, head);
      if (cos_sin == nullptr) continue;
      RotateHead(p.q.dtype, p.rotary.rotary_dim, cos_sin, head);
    }
  }
  const KvCacheWriteParams& cache = p.cache;
  if (!cache.k_cache.present()) return;
  const int64_t slot = cache.slot_mapping.As<const int64_t>()[token];
  if (slot < 0 || slot >= cache.k_cache.shape[0] * cache.k_cache.shape[1]) {
    return;
  }
  WriteSlot(p.k, token, cache.k_scale, cache.k_cache, slot);
  WriteSlot(p.v, token, cache.v_scale, cache.v_cache, slot);
}

}  // namespace

Status QkNormCpu(const QkNormParams& p, Stream stream) {
  const int64_t head_dim = p.q.shape[2];
  float q_weight[kMaxHeadDim];
  float k_weight[kMaxHeadDim];
  CpuConvertToFloat(p.q_weight.dtype, p.q_weight.data, head_dim, q_weight);
  CpuConvertToFloat(p.k_weight.dtype, p.k_weight.data, head_dim, k_weight);
  // Tokens of about 16k elements a piece, so that threads are worth waking.
  const int64_t token_size = (p.q.shape[1] + p.k.shape[1]) * head_dim;
  ParallelFor(stream, p.q.shape[0], 16384 / token_size + 1,
              [&](int64_t begin, int64_t end) {
                for (int64_t token = begin; token < end; ++token) {
                  ProcessToken(p, q_weight, k_weight, token);
                }
              });
  return Status();
}

}  // namespace tenon
