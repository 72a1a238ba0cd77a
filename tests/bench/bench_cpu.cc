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

uint64_t XorGeneric(const char* data, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t v[8];
    std::memcpy(v, data + i, sizeof(v));
    for (int j = 0; j < 8; ++j) sums[j] ^= v[j];
  }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum ^= s;
  return sum;
}

// Keeps `value` alive without storing it.
template <class T>
void Use(T& value) {
  asm volatile("" : "+x"(value));
}

#if defined(__x86_64__)

__attribute__((target("avx512f"))) uint64_t XorAvx512(const char* data,
                                                      int64_t bytes) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(data + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(data + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(data + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(data + i + 192));
  }
  const __m512i all =
      _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  uint64_t v[8];
  _mm512_storeu_si512(v, all);
  return v[0] ^ v[1] ^ v[2] ^ v[3] ^ v[4] ^ v[5] ^ v[6] ^ v[7];
}

// Twelve chains hide the latency of four cycles on two ports.
constexpr int kChains = 12;

__attribute__((target("avx512f"))) void FmaAvx512(int64_t iterations) {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) {
    sums[i] = _mm512_set1_ps(static_cast<float>(i));
  }
  const __m512 x = _mm512_set1_ps(0.5f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_fmadd_ps(sums[i], x, x);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

__attribute__((target("avx2,fma"))) void FmaAvx2(int64_t iterations) {
  __m256 sums[kChains];
  for (int i = 0; i < kChains; ++i) {
    sums[i] = _mm256_set1_ps(static_cast<float>(i));
  }
  const __m256 x = _mm256_set1_ps(0.5f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm256_fmadd_ps(sums[i], x, x);
      asm volatile("" : "+x"(sums[i]));
    }
  }
}

#endif  // defined(__x86_64__)

void FmaGeneric(int64_t iterations) {
  float sums[32];
  for (int i = 0; i < 32; ++i) sums[i] = static_cast<float>(i);
  for (int64_t n = 0; n < iterations; ++n) {
    for (float& s : sums) s = s * 0.5f + 0.5f;
    Use(sums[0]);
  }
}

}  // namespace

uint64_t ReadAllCpu(const void* data, int64_t bytes, Stream stream) {
  std::atomic<uint64_t> total{0};
  const char* begin = static_cast<const char*>(data);
  ParallelFor(stream, bytes, int64_t{1} << 20, [&](int64_t from, int64_t to) {
    uint64_t sum;
#if defined(__x86_64__)
    if (DetectCpuIsa() == CpuIsa::kAvx512) {
      sum = XorAvx512(begin + from, to - from);
    } else {
      sum = XorGeneric(begin + from, to - from);
    }
#else
    sum = XorGeneric(begin + from, to - from);
#endif
    total.fetch_xor(sum, std::memory_order_relaxed);
  });
  return total.load();
}

double MultiplyAddCpu(int64_t iterations, Stream stream) {
  const int threads = NumThreads(stream);
  double flops_per_iteration = 2.0 * 32;
  void (*run)(int64_t) = FmaGeneric;
#if defined(__x86_64__)
  const CpuIsa isa = DetectCpuIsa();
  if (isa == CpuIsa::kAvx512) {
    run = FmaAvx512;
    flops_per_iteration = 2.0 * 16 * kChains;
  } else if (isa == CpuIsa::kAvx2) {
    run = FmaAvx2;
    flops_per_iteration = 2.0 * 8 * kChains;
  }
#endif
  ParallelFor(stream, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) run(iterations);
  });
  return flops_per_iteration * static_cast<double>(iterations) * threads;
}

}  // namespace tenon::bench
