#ifndef TENON_DLPACK_H_
#define TENON_DLPACK_H_

/* DLPack's tensor, as version 1.1 of its specification lays it out, so that
 * tenon.h needs no other header. Where <dlpack/dlpack.h> was included before,
 * its declarations are used: they have the same layout. (Include it before
 * tenon.h, not after.) */

#include <stdint.h>

#ifndef DLPACK_VERSION
#ifndef DLPACK_MAJOR_VERSION

typedef int32_t DLDeviceType;

typedef struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
} DLDevice;

typedef struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; NULL: compact, row-major */
  uint64_t byte_offset;
} DLTensor;

#endif /* DLPACK_MAJOR_VERSION */
#endif /* DLPACK_VERSION */

/* The codes that Tenon accepts, under names of its own, because older DLPack
 * headers lack some. */
#define TENON_DL_CPU 1 /* DLDevice.device_type */
#define TENON_DL_CUDA 2
#define TENON_DL_CUDA_HOST 3 /* pinned host memory: used as CPU memory */

#define TENON_DL_INT 0 /* DLDataType.code */
#define TENON_DL_UINT 1
#define TENON_DL_FLOAT 2
#define TENON_DL_BFLOAT 4
#define TENON_DL_FLOAT8_E4M3FN 10

#endif /* TENON_DLPACK_H_ */
