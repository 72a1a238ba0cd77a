#ifndef TENON_OPS_CORE_MMA_CUDA_CUH_
#define TENON_OPS_CORE_MMA_CUDA_CUH_

#include <cstdint>
#include <type_traits>

#include "ops/core/core_cuda.cuh"

// The instructions of tensor-core kernels, sm_80 and later: asynchronous
// copies to shared memory, loads of matrices from there, and mma.

namespace tenon::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Ordinary accesses by such an address.
template <class T>
__device__ __forceinline__ T LoadShared(uint32_t from) {
  return *static_cast<const T*>(__cvta_shared_to_generic(from));
}
template <class T>
__device__ __forceinline__ void StoreShared(uint32_t to, T v) {
  *static_cast<T*>(__cvta_shared_to_generic(to)) = v;
}

// Copies 16 bytes to shared memory asynchronously, or writes zeros there
// without reading.
__device__ __forceinline__ void CopyOrZero16(uint32_t to, const void* from,
                                             bool copy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to),
      "l"(from), "r"(copy ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void CopyOrZero4(uint32_t to, const void* from,
                                            bool copy) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to),
               "l"(from), "r"(copy ? 4 : 0)
               : "memory");
}
// Asks for `bytes` at `from` in L2, both multiples of 16. That is safe before
// WaitForPreviousKernels(), even if a kernel ahead writes there, as all writes
// go to L2: so a kernel's weights come in while the one ahead of it still runs.
// Nothing before sm_90.
__device__ __forceinline__ void PrefetchToL2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from),
               "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits for all but the latest kPending groups of this thread.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8
// of matrix l / 8, and gets elements l % 4 * 2 + {0, 1} of row l / 4 of each.
__device__ __forceinline__ void LoadMatrices(uint32_t (&v)[4], uint32_t from) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
      : "r"(from)
      : "memory");
}
// The same with rows and columns of each matrix exchanged.
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&v)[4],
                                                       uint32_t from) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, "
      "[%4];\n"
      : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
      : "r"(from)
      : "memory");
}

// Four e4m3 values, exactly, as two pairs of halves: the lower bytes in v[0].
__device__ __forceinline__ void Fp8x4ToHalf(uint32_t q, uint32_t (&v)[2]) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}\n"
      : "=r"(v[0]), "=r"(v[1])
      : "r"(q));
#else
  // Shifted to the place of a half's exponent and fraction, the bits are the
  // value times 2^-8, subnormals included; NaN is told by its bits.
  const uint32_t bytes[2] = {__byte_perm(q, 0, 0x1404),
                             __byte_perm(q, 0, 0x3424)};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t magnitude = bytes[i] >> 1 & 0x3f803f80u;
    const uint32_t bits = (bytes[i] & 0x80008000u) | magnitude;
    uint32_t value;
    asm("mul.rn.f16x2 %0, %1, %2;\n"
        : "=r"(value)
        : "r"(bits), "r"(0x5c005c00u));  // 2^8 twice
    v[i] = value | __vcmpeq2(magnitude, 0x3f803f80u);
  }
#endif
}

// c += a * b, of 16x16 by 16x8.
template <class T>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4],
                                    uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_MMA_CUDA_CUH_
