/* Our DLPack declarations beside the system's: the layouts are the same. */

#include <stddef.h>

#ifdef __cplusplus
#define ASSERT(condition) static_assert(condition, #condition)
#else
#define ASSERT(condition) _Static_assert(condition, #condition)
#endif

#define DLTensor SystemTensor
#define DLDevice SystemDevice
#define DLDeviceType SystemDeviceType
#define DLDataType SystemDataType
#include <dlpack/dlpack.h>
#undef DLTensor
#undef DLDevice
#undef DLDeviceType
#undef DLDataType
#undef DLPACK_VERSION
#undef DLPACK_MAJOR_VERSION

#include "abi/tenon_dlpack.h"

#define SAME_FIELD(ours, theirs, field)                     \
  ASSERT(offsetof(ours, field) == offsetof(theirs, field)); \
  ASSERT(sizeof(((ours*)0)->field) == sizeof(((theirs*)0)->field))

ASSERT(sizeof(DLDevice) == sizeof(SystemDevice));
SAME_FIELD(DLDevice, SystemDevice, device_type);
SAME_FIELD(DLDevice, SystemDevice, device_id);

ASSERT(sizeof(DLDataType) == sizeof(SystemDataType));
SAME_FIELD(DLDataType, SystemDataType, code);
SAME_FIELD(DLDataType, SystemDataType, bits);
SAME_FIELD(DLDataType, SystemDataType, lanes);

ASSERT(sizeof(DLTensor) == sizeof(SystemTensor));
SAME_FIELD(DLTensor, SystemTensor, data);
SAME_FIELD(DLTensor, SystemTensor, device);
SAME_FIELD(DLTensor, SystemTensor, ndim);
SAME_FIELD(DLTensor, SystemTensor, dtype);
SAME_FIELD(DLTensor, SystemTensor, shape);
SAME_FIELD(DLTensor, SystemTensor, strides);
SAME_FIELD(DLTensor, SystemTensor, byte_offset);

ASSERT(TENON_DL_CPU == (int)kDLCPU);
ASSERT(TENON_DL_CUDA == (int)kDLCUDA);
ASSERT(TENON_DL_CUDA_HOST == (int)kDLCUDAHost);
ASSERT(TENON_DL_INT == (int)kDLInt);
ASSERT(TENON_DL_UINT == (int)kDLUInt);
ASSERT(TENON_DL_FLOAT == (int)kDLFloat);
ASSERT(TENON_DL_BFLOAT == (int)kDLBfloat);
