#ifndef TENON_OPS_CORE_CORE_CUDA_CUH_
#define TENON_OPS_CORE_CORE_CUDA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

// Shared by the CUDA backends of the ops.

namespace tenon::cuda {

inline cudaStream_t Native(Stream stream) {
  return static_cast<cudaStream_t>(stream.cuda);
}

// The Status of a CUDA runtime call; `what` names the op or the call. An error
// is told here, so that it is not left for the caller's next check.
inline Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status();
  (void)cudaGetLastError();
  return UnavailableError(what, ": CUDA error ", cudaGetErrorName(error), ": ",
                          cudaGetErrorString(error));
}

// Makes `device` current for one scope, as launches need it to be.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ != cudaSuccess || previous_ == device.index) return;
    error_ = cudaSetDevice(device.index);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  // Whether it is current.
  Status status() const { return ToStatus(error_, "cudaSetDevice"); }

 private:
  cudaError_t error_ = cudaSuccess;
  int previous_ = 0;
  bool changed_ = false;
};

// Lets blocks of `kernel` have `bytes` of dynamic shared memory. What is set is
// the most that the device has, once: were it each launch's own size, a thread
// that launches with less could lower it between another's call and launch.
// Asking for attributes takes the host 0.6 us, a launch 4.
inline Status AllowDynamicShared(const char* op, const void* kernel,
                                 size_t bytes) {
  // The limit at first, for static shared memory as well.
  constexpr int kUsual = 48 * 1024;
  constexpr int kRoomForStatic = 16 * 1024;
  if (bytes <= kUsual - kRoomForStatic) return Status();
  cudaFuncAttributes attributes;
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaFuncGetAttributes(&attributes, kernel), op));
  if (attributes.maxDynamicSharedSizeBytes > kUsual) return Status();
  int device = 0;
  int most = 0;
  TENON_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), op));
  TENON_RETURN_IF_ERROR(
      ToStatus(cudaDeviceGetAttribute(
                   &most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               op));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  return ToStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           most),
      op);
}

// Launches and returns the launch's own error (cudaGetLastError could report
// one of the caller's).
template <class... KernelArgs, class... Args>
Status LaunchWithConfig(const char* op, const cudaLaunchConfig_t& config,
                        void (*kernel)(KernelArgs...), Args&&... args) {
  TENON_RETURN_IF_ERROR(AllowDynamicShared(
      op, reinterpret_cast<const void*>(kernel), config.dynamicSmemBytes));
  return ToStatus(
      cudaLaunchKernelEx(&config, kernel, static_cast<KernelArgs>(args)...),
      op);
}

inline cudaLaunchConfig_t LaunchConfig(Stream stream, dim3 grid, dim3 block,
                                       size_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = Native(stream);
  return config;
}

template <class... KernelArgs, class... Args>
Status Launch(const char* op, Stream stream, dim3 grid, dim3 block,
              size_t shared_bytes, void (*kernel)(KernelArgs...),
              Args&&... args) {
  return LaunchWithConfig(op, LaunchConfig(stream, grid, block, shared_bytes),
                          kernel, std::forward<Args>(args)...);
}

// The same for a kernel whose threads all call WaitForPreviousKernels() before
// they touch what a kernel ahead of it in the stream may still write or read:
// where the GPU can (sm_90), its blocks are set up while the one before it
// still runs (programmatic dependent launch).
template <class... KernelArgs, class... Args>
Status LaunchDependent(const char* op, Stream stream, dim3 grid, dim3 block,
                       size_t shared_bytes, void (*kernel)(KernelArgs...),
                       Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = LaunchConfig(stream, grid, block, shared_bytes);
  int device = 0;
  int major = 0;
  TENON_RETURN_IF_ERROR(ToStatus(cudaGetDevice(&device), op));
  TENON_RETURN_IF_ERROR(ToStatus(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
      op));
  // Later GPUs run code of compute_80, whose kernels wait for nothing.
  if (major == 9) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return LaunchWithConfig(op, config, kernel, std::forward<Args>(args)...);
}

// Waits until the kernels before this one in the stream are done and their
// writes can be seen. Without LaunchDependent it does nothing.
__device__ __forceinline__ void WaitBeforeReading() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel set up its blocks, once all of this one's are running.
// Called before the wait, it lets the next one begin while kernels ahead of
// this one still run: then the next one may read nothing before its own wait
// but what no kernel writes (weights), and what was complete before those
// kernels could begin (AttentionParams::early_reads).
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, in the order that always works: what kernels ahead of this one wrote
// can be read by the next one before its wait.
__device__ __forceinline__ void WaitForPreviousKernels() {
  WaitBeforeReading();
  LetNextKernelStart();
}

template <class A, class B>
constexpr __host__ __device__ auto CeilDiv(A a, B b) -> decltype(a / b) {
  return (a + b - 1) / b;
}

// Launches a thread per element of a matrix: row blockIdx.x * blockDim.y +
// threadIdx.y, column blockIdx.y * blockDim.x + threadIdx.x, either of which
// may not exist. Only the grid's first dimension has no small limit, so threads
// have to go on to further columns, gridDim.y * blockDim.x apart. A dependent
// launch.
template <class... KernelArgs, class... Args>
Status LaunchOverRows(const char* op, Stream stream, int64_t rows, int64_t cols,
                      int max_threads, void (*kernel)(KernelArgs...),
                      const Args&... args) {
  const unsigned columns = static_cast<unsigned>(
      std::min<int64_t>(CeilDiv(cols, int64_t{32}) * 32, max_threads));
  const dim3 block(columns, max_threads / columns);
  const dim3 grid(static_cast<unsigned>(CeilDiv(rows, int64_t{block.y})),
                  static_cast<unsigned>(std::min<int64_t>(
                      CeilDiv(cols, int64_t{columns}), 65535)));
  return LaunchDependent(op, stream, grid, block, 0, kernel, args...);
}

// Returns f(T()) for the device's type of float32, float16 or bfloat16.
template <class F>
Status WithFloatType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(__half());
    default:
      return f(__nv_bfloat16());
  }
}

// Conversions through float; storing rounds to nearest, ties to even.
__device__ __forceinline__ float ToFloat(float v) { return v; }
__device__ __forceinline__ float ToFloat(__half v) { return __half2float(v); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <class T>
__device__ __forceinline__ T FromFloat(float v);
template <>
__device__ __forceinline__ float FromFloat<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two floats rounded to __half or __nv_bfloat16, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(low, high);
    memcpy(&bits, &v, sizeof(bits));
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &v, sizeof(bits));
  }
  return bits;
}

// N elements moved by one access of N * sizeof(T) <= 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// Whether rows of `view` (innermost dimension) can be read `bytes` at a time.
inline bool RowsAreAligned(const TensorView& view, size_t bytes) {
  const size_t element = DTypeSize(view.dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0) return false;
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.shape[i] > 1 && view.stride[i] * element % bytes != 0) {
      return false;
    }
  }
  return true;
}

// Whether rows of `view` can be read 16 bytes at a time from end to end.
inline bool RowsAreWholeChunks(const TensorView& view) {
  const int64_t per_chunk = 16 / static_cast<int64_t>(DTypeSize(view.dtype));
  return view.shape[view.rank - 1] % per_chunk == 0 && RowsAreAligned(view, 16);
}

// 2^x within 2 units in the last place; 0 below 2^-126.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Sum and maximum over the 32 lanes of a warp, the same on every lane. Fixed
// order: the same inputs give the same bits.
__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(~0u, value, mask);
  }
  return value;
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, mask));
  }
  return value;
}

// Sum over this lane and all lower ones.
template <class Value>
__device__ __forceinline__ Value WarpInclusiveSum(Value value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Value lower = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

// Sum over a block of kThreads, the same on every thread. `shared` holds
// kThreads / 32 floats and may be reused after the next __syncthreads().
template <int kThreads>
__device__ __forceinline__ float BlockSum(float value, float* shared) {
  value = WarpSum(value);
  if constexpr (kThreads == 32) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += shared[i];
  return total;
}

}  // namespace tenon::cuda

#endif  // TENON_OPS_CORE_CORE_CUDA_CUH_
