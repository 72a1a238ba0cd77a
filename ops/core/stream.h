#ifndef TENON_OPS_CORE_STREAM_H_
#define TENON_OPS_CORE_STREAM_H_

namespace tenon {

class CpuThreadPool;

// Where an op runs. Non-owning and always passed explicitly: the library has
// no current stream. Ops on CUDA tensors enqueue on `cuda` and return at once;
// ops on CPU tensors run on `cpu` and return when done.
struct Stream {
  void* cuda = nullptr;          // a cudaStream_t; null: the default stream
  CpuThreadPool* cpu = nullptr;  // null: the calling thread alone
};

}  // namespace tenon

#endif  // TENON_OPS_CORE_STREAM_H_
