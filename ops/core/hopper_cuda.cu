#include <cudaTypedefs.h>

#include "ops/core/hopper_cuda.cuh"

namespace tenon::cuda {
namespace {

using EncodeFunction = PFN_cuTensorMapEncodeTiled_v12000;

// Null where the driver has none. The driver is asked at run time, so that the
// library loads without it.
EncodeFunction FindEncodeFunction() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                       12000, cudaEnableDefault,
                                       &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<EncodeFunction>(function);
}

CUtensorMapDataType DataType(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:  // of 1 byte
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

bool IsHopper(Device device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor,
                                device.index) == cudaSuccess &&
         major == 9;
}

Status MakeTensorMap(const char* op, DType dtype, const void* data, int rank,
                     const int64_t* shape, const int64_t* strides,
                     const int* box, CUtensorMap* map) {
  static const EncodeFunction encode = FindEncodeFunction();
  if (encode == nullptr) {
    return UnavailableError(op, ": the driver has no cuTensorMapEncodeTiled");
  }
  constexpr int kMaxMapRank = 5;
  cuuint64_t map_shape[kMaxMapRank];
  cuuint64_t stride_bytes[kMaxMapRank];
  cuuint32_t map_box[kMaxMapRank];
  cuuint32_t steps[kMaxMapRank];
  for (int i = 0; i < rank; ++i) {
    map_shape[i] = static_cast<cuuint64_t>(shape[i]);
    map_box[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i == 0) continue;
    stride_bytes[i - 1] =
        static_cast<cuuint64_t>(strides[i - 1]) * DTypeSize(dtype);
  }
  const CUresult result = encode(
      map, DataType(dtype), static_cast<cuuint32_t>(rank),
      const_cast<void*>(data), map_shape, stride_bytes, map_box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return InternalError(op, ": cuTensorMapEncodeTiled of ", rank,
                         " dimensions, [", shape[rank - 1], ", ",
                         shape[rank - 2], ", ...], failed with ",
                         static_cast<int>(result));
  }
  return Status();
}

Status MakeTensorMap(const char* op, DType dtype, const void* data,
                     int64_t planes, int64_t plane_stride, int64_t rows,
                     int64_t row_stride, int64_t cols, int box_rows,
                     CUtensorMap* map) {
  const int64_t shape[3] = {cols, rows, planes};
  // A stride of one plane alone is never used, but has to be a valid one.
  const int64_t strides[2] = {row_stride,
                              planes > 1 ? plane_stride : rows * row_stride};
  const int box[3] = {128 / static_cast<int>(DTypeSize(dtype)), box_rows, 1};
  return MakeTensorMap(op, dtype, data, 3, shape, strides, box, map);
}

}  // namespace tenon::cuda
