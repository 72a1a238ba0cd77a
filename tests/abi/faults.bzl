"""The functions that tests/abi/faults.h makes fail."""

_SYSTEM = ["posix_memalign", "mmap", "munmap", "open", "close", "fstat", "read"]

# All of the runtime that core_cuda.cu, core_cuda.cuh and the ops call, but for
# those that only tell about errors.
_CUDA = [
    "cudaDeviceGetAttribute",
    "cudaFree",
    "cudaFreeHost",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetDeviceProperties_v2",  # its name before CUDA 13
    "cudaLaunchKernelExC",
    "cudaMalloc",
    "cudaMallocHost",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaSetDevice",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
]

WRAP_SYSTEM = ["-Wl,--wrap=%s" % f for f in _SYSTEM]
WRAP_CUDA = ["-Wl,--wrap=%s" % f for f in _CUDA]
