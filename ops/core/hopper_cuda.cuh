#ifndef TENON_OPS_CORE_HOPPER_CUDA_CUH_
#define TENON_OPS_CORE_HOPPER_CUDA_CUH_

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "ops/core/core_cuda.cuh"
#include "ops/core/mma_cuda.cuh"

// Hopper's own instructions (sm_90a): transaction barriers, the tensor memory
// accelerator (TMA), warpgroup matrix products (wgmma). Kernels that use them
// have an empty body on other architectures and are not launched there.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TENON_SM90A 1
#else
#define TENON_SM90A 0
#endif

namespace tenon::cuda {

// Whether kernels of sm_90a run on a device.
bool IsHopper(Device device);

// A map of a row-major tensor [planes, rows, cols] for TMA, whose boxes are
// box_rows rows of 128 bytes of one plane, swizzled by 128 bytes; what lies
// outside of the tensor reads as zeros. Strides are in elements. All addresses
// and strides have to be multiples of 16 bytes.
Status MakeTensorMap(const char* op, DType dtype, const void* data,
                     int64_t planes, int64_t plane_stride, int64_t rows,
                     int64_t row_stride, int64_t cols, int box_rows,
                     CUtensorMap* map);

// The same of any tensor of `rank` dimensions, up to 5, the innermost first and
// contiguous; `strides` are the others'. The box is `box` elements, 128 bytes
// in its first dimension.
Status MakeTensorMap(const char* op, DType dtype, const void* data, int rank,
                     const int64_t* shape, const int64_t* strides,
                     const int* box, CUtensorMap* map);

#if TENON_SM90A

// ---------------------------------------------------------------------------
// Barriers in shared memory
// ---------------------------------------------------------------------------

__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers known to TMA; then __syncthreads().
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}
// Arrives, and lets the phase wait for `bytes` of TMA as well.
__device__ __forceinline__ void ArriveExpectBytes(uint32_t barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}
// Arrives once all of this thread's earlier cp.async are done.
__device__ __forceinline__ void ArriveAfterCopies(uint32_t barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier)
      : "memory");
}
// The address of the same place in the shared memory of block `rank` of the
// cluster.
__device__ __forceinline__ uint32_t ClusterAddress(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n"
      : "=r"(address)
      : "r"(shared), "r"(rank));
  return address;
}
// Arrives at a barrier given by such an address.
__device__ __forceinline__ void ArriveInCluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}
// __syncthreads() of all blocks of the cluster.
__device__ __forceinline__ void SyncCluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}
// Waits for the end of the phase with this parity.
__device__ __forceinline__ void Wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni DONE;\n"
      "bra.uni WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Writes to shared memory by ordinary accesses and cp.async, ahead of reads of
// it by wgmma and TMA.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// __syncthreads() for some of the warps. Id 0 is that of __syncthreads().
__device__ __forceinline__ void SyncThreads(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// The same barrier, without waiting.
__device__ __forceinline__ void ArriveThreads(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(num_threads) : "memory");
}

// ---------------------------------------------------------------------------
// Tensor memory accelerator
// ---------------------------------------------------------------------------

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
// Copies the box that begins at (plane, row, col) to shared memory (aligned to
// 1024 bytes); `barrier` counts its bytes.
__device__ __forceinline__ void LoadBox(uint32_t to, const CUtensorMap* map,
                                        int plane, int row, int col,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(plane), "r"(barrier)
      : "memory");
}
// The same for every block of the cluster whose bit is set in `blocks`: to the
// same place of its shared memory, counted by its own barrier.
__device__ __forceinline__ void LoadBoxToCluster(uint32_t to,
                                                 const CUtensorMap* map,
                                                 int plane, int row, int col,
                                                 uint32_t barrier,
                                                 uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(
          to),
      "l"(map), "r"(col), "r"(row), "r"(plane), "r"(barrier), "h"(blocks)
      : "memory");
}
// The same for a map of 5 dimensions, the innermost first.
__device__ __forceinline__ void LoadBox(uint32_t to, const CUtensorMap* map,
                                        const int (&at)[5], uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::"
      "bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];\n" ::"r"(to),
      "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
      "r"(barrier)
      : "memory");
}

// ---------------------------------------------------------------------------
// Warpgroup matrix product
// ---------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void IncreaseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void DecreaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Orders accesses to accumulators and shared memory ahead of the next Wgmma.
__device__ __forceinline__ void FenceWgmma() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void CommitWgmma() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits for all but the latest kPending groups.
template <int kPending>
__device__ __forceinline__ void WaitForWgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending)
               : "memory");
}

// Describes a matrix in shared memory of blocks of 8 rows of 128 bytes, aligned
// to 1024 bytes and swizzled by 128 bytes, as LoadBox writes them: chunk c of
// 16 bytes of row r lies at chunk c ^ (r % 8). Blocks of further rows follow
// each other at distances of row_step bytes. Adding 2 goes on by 32 bytes along
// the rows. Blocks of further columns, for WgmmaColumns, are column_step apart.
__device__ __forceinline__ uint64_t MatrixDescriptor(uint32_t shared,
                                                     int row_step = 1024,
                                                     int column_step = 16) {
  constexpr uint64_t kSwizzle128 = 1;
  return kSwizzle128 << 62 | static_cast<uint64_t>(row_step >> 4) << 32 |
         static_cast<uint64_t>(column_step >> 4) << 16 |
         (shared & 0x3ffff) >> 4;
}

// d (+)= a * b^T for 64 rows of a and kN rows of b, over 32 bytes of each. Lane
// l of warp w of the group has, in d[4 * j + {0, 1, 2, 3}], row 16 * w + l / 4
// and (the last two) that + 8, columns 8 * j + l % 4 * 2 + {0, 1}.
template <class T, int kN>
__device__ __forceinline__ void Wgmma(float (&d)[kN / 2], uint64_t a,
                                      uint64_t b, bool accumulate);

#define TENON_WGMMA(T, N, TYPES, TRANSPOSED, REGISTERS, A, B, P, ...)        \
  template <>                                                                \
  __device__ __forceinline__ void Wgmma<T, N>(float(&d)[N / 2], uint64_t a,  \
                                              uint64_t b, bool accumulate) { \
    asm volatile(                                                            \
        "{\n"                                                                \
        ".reg .pred p;\n"                                                    \
        "setp.ne.b32 p, " P                                                  \
        ", 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n" #N TYPES " {" REGISTERS "}, " A  \
        ", " B ", p, 1, 1" TRANSPOSED                                        \
        ";\n"                                                                \
        "}\n"                                                                \
        : __VA_ARGS__                                                        \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                \
  }
#define TENON_WGMMA_TYPES(N, REGISTERS, A, B, P, ...)                        \
  TENON_WGMMA(__nv_bfloat16, N, "k16.f32.bf16.bf16", ", 0, 0", REGISTERS, A, \
              B, P, __VA_ARGS__)                                             \
  TENON_WGMMA(__half, N, "k16.f32.f16.f16", ", 0, 0", REGISTERS, A, B, P,    \
              __VA_ARGS__)                                                   \
  TENON_WGMMA(__nv_fp8_e4m3, N, "k32.f32.e4m3.e4m3", "", REGISTERS, A, B, P, \
              __VA_ARGS__)
#define TENON_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TENON_D16(i) \
  TENON_D4(i), TENON_D4(i + 4), TENON_D4(i + 8), TENON_D4(i + 12)

// clang-format off
// The registers of N columns, as operands of the instruction and as constraints.
#define TENON_REGISTERS_8 "%0, %1, %2, %3"
#define TENON_REGISTERS_16 TENON_REGISTERS_8 ", %4, %5, %6, %7"
#define TENON_REGISTERS_24 TENON_REGISTERS_16 ", %8, %9, %10, %11"
#define TENON_REGISTERS_32 TENON_REGISTERS_24 ", %12, %13, %14, %15"
#define TENON_REGISTERS_40 TENON_REGISTERS_32 ", %16, %17, %18, %19"
#define TENON_REGISTERS_48 TENON_REGISTERS_40 ", %20, %21, %22, %23"
#define TENON_REGISTERS_56 TENON_REGISTERS_48 ", %24, %25, %26, %27"
#define TENON_REGISTERS_64 TENON_REGISTERS_56 ", %28, %29, %30, %31"
#define TENON_REGISTERS_72 TENON_REGISTERS_64 ", %32, %33, %34, %35"
#define TENON_REGISTERS_80 TENON_REGISTERS_72 ", %36, %37, %38, %39"
#define TENON_REGISTERS_88 TENON_REGISTERS_80 ", %40, %41, %42, %43"
#define TENON_REGISTERS_96 TENON_REGISTERS_88 ", %44, %45, %46, %47"
#define TENON_REGISTERS_104 TENON_REGISTERS_96 ", %48, %49, %50, %51"
#define TENON_REGISTERS_112 TENON_REGISTERS_104 ", %52, %53, %54, %55"
#define TENON_REGISTERS_120 TENON_REGISTERS_112 ", %56, %57, %58, %59"
#define TENON_REGISTERS_128 TENON_REGISTERS_120 ", %60, %61, %62, %63"
#define TENON_REGISTERS_136 TENON_REGISTERS_128 ", %64, %65, %66, %67"
#define TENON_REGISTERS_144 TENON_REGISTERS_136 ", %68, %69, %70, %71"
#define TENON_REGISTERS_152 TENON_REGISTERS_144 ", %72, %73, %74, %75"
#define TENON_REGISTERS_160 TENON_REGISTERS_152 ", %76, %77, %78, %79"
#define TENON_REGISTERS_168 TENON_REGISTERS_160 ", %80, %81, %82, %83"
#define TENON_REGISTERS_176 TENON_REGISTERS_168 ", %84, %85, %86, %87"
#define TENON_D_8 TENON_D4(0)
#define TENON_D_16 TENON_D_8, TENON_D4(4)
#define TENON_D_24 TENON_D_16, TENON_D4(8)
#define TENON_D_32 TENON_D_24, TENON_D4(12)
#define TENON_D_40 TENON_D_32, TENON_D4(16)
#define TENON_D_48 TENON_D_40, TENON_D4(20)
#define TENON_D_56 TENON_D_48, TENON_D4(24)
#define TENON_D_64 TENON_D_56, TENON_D4(28)
#define TENON_D_72 TENON_D_64, TENON_D4(32)
#define TENON_D_80 TENON_D_72, TENON_D4(36)
#define TENON_D_88 TENON_D_80, TENON_D4(40)
#define TENON_D_96 TENON_D_88, TENON_D4(44)
#define TENON_D_104 TENON_D_96, TENON_D4(48)
#define TENON_D_112 TENON_D_104, TENON_D4(52)
#define TENON_D_120 TENON_D_112, TENON_D4(56)
#define TENON_D_128 TENON_D_120, TENON_D4(60)
#define TENON_D_136 TENON_D_128, TENON_D4(64)
#define TENON_D_144 TENON_D_136, TENON_D4(68)
#define TENON_D_152 TENON_D_144, TENON_D4(72)
#define TENON_D_160 TENON_D_152, TENON_D4(76)
#define TENON_D_168 TENON_D_160, TENON_D4(80)
#define TENON_D_176 TENON_D_168, TENON_D4(84)
TENON_WGMMA_TYPES(8, TENON_REGISTERS_8, "%4", "%5", "%6", TENON_D_8)
TENON_WGMMA_TYPES(16, TENON_REGISTERS_16, "%8", "%9", "%10", TENON_D_16)
TENON_WGMMA_TYPES(24, TENON_REGISTERS_24, "%12", "%13", "%14", TENON_D_24)
TENON_WGMMA_TYPES(32, TENON_REGISTERS_32, "%16", "%17", "%18", TENON_D_32)
TENON_WGMMA_TYPES(40, TENON_REGISTERS_40, "%20", "%21", "%22", TENON_D_40)
TENON_WGMMA_TYPES(48, TENON_REGISTERS_48, "%24", "%25", "%26", TENON_D_48)
TENON_WGMMA_TYPES(56, TENON_REGISTERS_56, "%28", "%29", "%30", TENON_D_56)
TENON_WGMMA_TYPES(64, TENON_REGISTERS_64, "%32", "%33", "%34", TENON_D_64)
TENON_WGMMA_TYPES(72, TENON_REGISTERS_72, "%36", "%37", "%38", TENON_D_72)
TENON_WGMMA_TYPES(80, TENON_REGISTERS_80, "%40", "%41", "%42", TENON_D_80)
TENON_WGMMA_TYPES(88, TENON_REGISTERS_88, "%44", "%45", "%46", TENON_D_88)
TENON_WGMMA_TYPES(96, TENON_REGISTERS_96, "%48", "%49", "%50", TENON_D_96)
TENON_WGMMA_TYPES(104, TENON_REGISTERS_104, "%52", "%53", "%54", TENON_D_104)
TENON_WGMMA_TYPES(112, TENON_REGISTERS_112, "%56", "%57", "%58", TENON_D_112)
TENON_WGMMA_TYPES(120, TENON_REGISTERS_120, "%60", "%61", "%62", TENON_D_120)
TENON_WGMMA_TYPES(128, TENON_REGISTERS_128, "%64", "%65", "%66", TENON_D_128)
TENON_WGMMA_TYPES(136, TENON_REGISTERS_136, "%68", "%69", "%70", TENON_D_136)
TENON_WGMMA_TYPES(144, TENON_REGISTERS_144, "%72", "%73", "%74", TENON_D_144)
TENON_WGMMA_TYPES(152, TENON_REGISTERS_152, "%76", "%77", "%78", TENON_D_152)
TENON_WGMMA_TYPES(160, TENON_REGISTERS_160, "%80", "%81", "%82", TENON_D_160)
TENON_WGMMA_TYPES(168, TENON_REGISTERS_168, "%84", "%85", "%86", TENON_D_168)
TENON_WGMMA_TYPES(176, TENON_REGISTERS_176, "%88", "%89", "%90", TENON_D_176)
// clang-format on

// d += a * b for 64 rows of a, 16 elements each, in registers, and 16 rows of b
// of kN columns each. Lane l of warp w of the group gives, of rows 16 * w + l /
// 4 (a[0], a[2]) and that + 8 (a[1], a[3]), columns l % 4 * 2 + {0, 1} (a[0],
// a[1]) and those + 8. d is laid out as Wgmma's.
template <class T, int kN>
__device__ __forceinline__ void WgmmaColumns(float (&d)[kN / 2],
                                             const uint32_t (&a)[4],
                                             uint64_t b);

#define TENON_WGMMA_COLUMNS(T, N, TYPES, REGISTERS, A, B, ...)           \
  template <>                                                            \
  __device__ __forceinline__ void WgmmaColumns<T, N>(                    \
      float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b) {             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES \
                 " {" REGISTERS "}, {" A "}, " B ", 1, 1, 1, 1;\n"       \
                 : __VA_ARGS__                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));  \
  }
#define TENON_WGMMA_COLUMNS_TYPES(N, REGISTERS, A, B, ...)            \
  TENON_WGMMA_COLUMNS(__nv_bfloat16, N, "bf16.bf16", REGISTERS, A, B, \
                      __VA_ARGS__)                                    \
  TENON_WGMMA_COLUMNS(__half, N, "f16.f16", REGISTERS, A, B, __VA_ARGS__)

// clang-format off
TENON_WGMMA_COLUMNS_TYPES(64,
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
    "%32, %33, %34, %35", "%36", TENON_D16(0), TENON_D16(16))
TENON_WGMMA_COLUMNS_TYPES(128,
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",
    "%64, %65, %66, %67", "%68", TENON_D16(0), TENON_D16(16), TENON_D16(32), TENON_D16(48))
// clang-format on

#undef TENON_WGMMA_COLUMNS_TYPES
#undef TENON_WGMMA_COLUMNS
#undef TENON_D16
#undef TENON_D4
#undef TENON_WGMMA_TYPES
#undef TENON_WGMMA

// Stores four 8x8 matrices of 16-bit elements: lane l holds elements l % 4 * 2
// + {0, 1} of row l / 4 of each, and gives the address of row l % 8 of matrix
// l / 8.
__device__ __forceinline__ void StoreMatrices(uint32_t to,
                                              const uint32_t (&v)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::
          "r"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}
// The same, of 4 or 2, with rows and columns exchanged: lane
// l gives the address for column l % 8 of matrix l / 8.
__device__ __forceinline__ void StoreMatricesTransposed(
    uint32_t to, const uint32_t (&v)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, "
      "%4};\n" ::"r"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}
__device__ __forceinline__ void StoreMatricesTransposed(
    uint32_t to, const uint32_t (&v)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(
          to),
      "r"(v[0]), "r"(v[1])
      : "memory");
}

#endif  // TENON_SM90A

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_HOPPER_CUDA_CUH_
