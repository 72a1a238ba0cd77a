#ifndef TENON_OPS_LINEAR_LINEAR_BACKEND_H_
#define TENON_OPS_LINEAR_LINEAR_BACKEND_H_

#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "ops/linear/linear_kernel.h"

namespace tenon {

// Backends trust `params`: Linear() has validated them.
size_t LinearCpuWorkspaceBytes(const LinearParams& params);
Status LinearCpu(const LinearParams& params, Stream stream);
Status LinearCuda(const LinearParams& params, Stream stream);

// The parts of LinearCuda.
Status LinearGemv(const LinearParams& params, Stream stream);
// `kernel` is one of the tiles; rows_aligned as in LinearProblem.
Status LinearTile(const LinearParams& params, LinearKernel kernel,
                  bool rows_aligned, Stream stream);
// *done: false where cuBLASLt has no algorithm for the call, and nothing was
// launched.
Status LinearCublasLt(const LinearParams& params, Stream stream, bool* done);

// CublasLt's own; see there.
StatusOr<CublasLt::State*> OpenCublasLt(Device device);
void CloseCublasLt(CublasLt::State* state);
Device CublasLtDevice(const CublasLt::State& state);
size_t CublasLtVersion(const CublasLt::State& state);

}  // namespace tenon

#endif  // TENON_OPS_LINEAR_LINEAR_BACKEND_H_
