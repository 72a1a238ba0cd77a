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

Status MakeTensorMap(const char* op, DType dtype, const void* data,
                     int64_t planes, int64_t plane_stride, int64_t rows,
                     int64_t row_stride, int64_t cols, int box_rows,
                     CUtensorMap* map) {
  static const EncodeFunction encode = FindEncodeFunction();
  if (encode == nullptr) {
    return UnavailableError(op, ": the driver has no cuTensorMapEncodeTiled");
  }
  const uint64_t element = DTypeSize(dtype);
  // A stride of one plane alone is never used, but has to be a valid one.
  const uint64_t row_bytes = static_cast<uint64_t>(row_stride) * element;
  const uint64_t plane_bytes =
      planes > 1 ? static_cast<uint64_t>(plane_stride) * element
                 : static_cast<uint64_t>(rows) * row_bytes;
  const cuuint64_t shape[3] = {static_cast<cuuint64_t>(cols),
                               static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {row_bytes, plane_bytes};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / element),
                             static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode(
      map, DataType(dtype), 3, const_cast<void*>(data), shape, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return InternalError(op, ": cuTensorMapEncodeTiled of [", planes, ", ",
                         rows, ", ", cols, "] failed with ",
                         static_cast<int>(result));
  }
  return Status();
}

}  // namespace tenon::cuda
