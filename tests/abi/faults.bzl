"""The functions that tests/abi/faults.h makes fail."""

_SYSTEM = ["posix_memalign", "mmap", "munmap", "open", "close", "fstat", "read"]

# All of the runtime that ops/core and the ops call, but for
# those that only tell about errors.
_CUDA = [
    "cudaDeviceGetAttribute",
    "cudaEventCreateWithFlags",
    "cudaEventDestroy",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaFree",
    "cudaFreeHost",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetDeviceProperties_v2",  # its name before CUDA 13
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaGraphGetNodes",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaGraphUpload",
    "cudaLaunchKernelExC",
    "cudaMalloc",
    "cudaMallocHost",
    "cudaMemGetInfo",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
    "cudaOccupancyMaxActiveClusters",
    "cudaSetDevice",
    "cudaStreamBeginCapture",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamEndCapture",
    "cudaStreamSynchronize",
]

WRAP_SYSTEM = ["-Wl,--wrap=%s" % f for f in _SYSTEM]
WRAP_CUDA = ["-Wl,--wrap=%s" % f for f in _CUDA]
