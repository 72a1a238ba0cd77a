#include <algorithm>
#include <atomic>
#include <cstring>

#include "ops/core/cpu_thread_pool.h"
#include "ops/core/device_info.h"
#include "tests/bench/bench_backend.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tenon::bench {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;

// Takes what loops compute, so that they are not optimised away.
volatile float g_sink;

template <int kCount>
uint64_t Xor(const uint64_t (&values)[kCount]) {
  uint64_t all = 0;
  for (uint64_t v : values) all ^= v;
  return all;
}

uint64_t ReadGeneric(const char* data, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < bytes; i += 64) {
    uint64_t v[8];
    std::memcpy(v, data + i, sizeof(v));
    for (int j = 0; j < 8; ++j) sums[j] ^= v[j];
  }
  return Xor(sums);
}

// Twelve chains hide the latency of a multiply-add: four cycles, on two ports.
constexpr int kChains = 12;

void MultiplyAddGeneric(int64_t iterations) {
  constexpr int kFloats = 4 * kChains;
  float sums[kFloats];
  for (int i = 0; i < kFloats; ++i) sums[i] = static_cast<float>(i);
  for (int64_t n = 0; n < iterations; ++n) {
    for (float& s : sums) s = s * 0.5f + 0.5f;
  }
  for (float s : sums) g_sink = s;
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) uint64_t ReadAvx2(const char* data,
                                                  int64_t bytes) {
  __m256i sums[8];
  for (__m256i& s : sums) s = _mm256_setzero_si256();
  for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const auto* from = reinterpret_cast<const __m256i*>(data + i) + j;
      sums[j] = _mm256_xor_si256(sums[j], _mm256_loadu_si256(from));
    }
  }
  uint64_t values[32];
  std::memcpy(values, sums, sizeof(values));
  return Xor(values);
}

__attribute__((target("avx512f"))) uint64_t ReadAvx512(const char* data,
                                                       int64_t bytes) {
  __m512i sums[4];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto* from = reinterpret_cast<const __m512i*>(data + i) + j;
      sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(from));
    }
  }
  uint64_t values[32];
  std::memcpy(values, sums, sizeof(values));
  return Xor(values);
}

// Named variables: compilers keep arrays in memory here.
__attribute__((target("avx2,fma"))) void MultiplyAddAvx2(int64_t iterations) {
  const __m256 half = _mm256_set1_ps(0.5f);
  __m256 a = half, b = a, c = a, d = a, e = a, f = a;
  __m256 g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t n = 0; n < iterations; ++n) {
    a = _mm256_fmadd_ps(a, half, half);
    b = _mm256_fmadd_ps(b, half, half);
    c = _mm256_fmadd_ps(c, half, half);
    d = _mm256_fmadd_ps(d, half, half);
    e = _mm256_fmadd_ps(e, half, half);
    f = _mm256_fmadd_ps(f, half, half);
    g = _mm256_fmadd_ps(g, half, half);
    h = _mm256_fmadd_ps(h, half, half);
    i = _mm256_fmadd_ps(i, half, half);
    j = _mm256_fmadd_ps(j, half, half);
    k = _mm256_fmadd_ps(k, half, half);
    l = _mm256_fmadd_ps(l, half, half);
    // Keeps equal chains apart.
    asm volatile(""
                 : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f),
                   "+x"(g), "+x"(h), "+x"(i), "+x"(j), "+x"(k), "+x"(l));
  }
}

__attribute__((target("avx512f"))) void MultiplyAddAvx512(int64_t iterations) {
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 a = half, b = a, c = a, d = a, e = a, f = a;
  __m512 g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t n = 0; n < iterations; ++n) {
    a = _mm512_fmadd_ps(a, half, half);
    b = _mm512_fmadd_ps(b, half, half);
    c = _mm512_fmadd_ps(c, half, half);
    d = _mm512_fmadd_ps(d, half, half);
    e = _mm512_fmadd_ps(e, half, half);
    f = _mm512_fmadd_ps(f, half, half);
    g = _mm512_fmadd_ps(g, half, half);
    h = _mm512_fmadd_ps(h, half, half);
    i = _mm512_fmadd_ps(i, half, half);
    j = _mm512_fmadd_ps(j, half, half);
    k = _mm512_fmadd_ps(k, half, half);
    l = _mm512_fmadd_ps(l, half, half);
    // Keeps equal chains apart.
    asm volatile(""
                 : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f),
                   "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
  }
}

#endif  // defined(__x86_64__)

// The loops for this host.
struct Loops {
  uint64_t (*read)(const char* data, int64_t bytes) = ReadGeneric;
  void (*multiply_add)(int64_t iterations) = MultiplyAddGeneric;
  double flops_per_iteration = 2.0 * 4 * kChains;
};

Loops SelectLoops() {
#if defined(__x86_64__)
  switch (DetectCpuIsa()) {
    case CpuIsa::kAvx512:
      return {ReadAvx512, MultiplyAddAvx512, 2.0 * 16 * kChains};
    case CpuIsa::kAvx2:
      return {ReadAvx2, MultiplyAddAvx2, 2.0 * 8 * kChains};
    case CpuIsa::kGeneric:
      break;
  }
#endif
  return {};
}

}  // namespace

uint64_t ReadAllCpu(const void* data, int64_t bytes, Stream stream) {
  const Loops loops = SelectLoops();
  const char* from = static_cast<const char*>(data);
  std::atomic<uint64_t> total{0};
  ParallelFor(stream, bytes, kPieceBytes, [&](int64_t begin, int64_t end) {
    const uint64_t sum = loops.read(from + begin, end - begin);
    total.fetch_xor(sum, std::memory_order_relaxed);
  });
  return total.load();
}

void CopyAllCpu(const void* from, void* to, int64_t bytes, Stream stream) {
  ParallelFor(stream, bytes, kPieceBytes, [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(to) + begin,
                static_cast<const char*>(from) + begin,
                static_cast<size_t>(end - begin));
  });
}

double MultiplyAddCpu(int64_t iterations, Stream stream) {
  const Loops loops = SelectLoops();
  const int threads = NumThreads(stream);
  ParallelFor(stream, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loops.multiply_add(iterations);
  });
  return loops.flops_per_iteration * static_cast<double>(iterations) * threads;
}

}  // namespace tenon::bench
