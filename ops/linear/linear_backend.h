#ifndef TENON_OPS_LINEAR_LINEAR_BACKEND_H_
#define TENON_OPS_LINEAR_LINEAR_BACKEND_H_

#include "ops/linear/cublas_lt.h"
#include "ops/linear/linear.h"
#include "ops/linear/linear_kernel.h"

namespace tenon {

namespace linear_fp8 {
struct Args;
}  // namespace linear_fp8

// Normalises p->x into p->norm.out, if that is asked for, and makes that x.
Status NormalizeLinearInput(LinearParams* p, Stream stream);

// The same of p->terms, ahead of it.
void AddLinearTermsCpu(LinearParams* p, Stream stream);

// Backends trust `params`: Linear() has validated them.
size_t LinearCpuWorkspaceBytes(const LinearParams& params);
size_t LinearCudaWorkspaceBytes(const LinearParams& params);
Status LinearCpu(const LinearParams& params, Stream stream);
Status LinearCuda(const LinearParams& params, Stream stream);

// The parts of LinearCuda. The first takes norm and residual; whether it can
// take a call at all depends on its shapes, alignments and GPU.
bool LinearStreams(const LinearParams& params);
Status LinearStream(const LinearParams& params, Stream stream);
Status LinearGemv(const LinearParams& params, Stream stream);
// `kernel` is one of the tiles; rows_aligned as in LinearProblem.
Status LinearTile(const LinearParams& params, LinearKernel kernel,
                  bool rows_aligned, Stream stream);
// *done: false where cuBLASLt has no algorithm for the call, and nothing was
// launched. x may be quantised, its x_scales [groups, tokens] without gaps.
Status LinearCublasLt(const LinearParams& params, const float* x_scales,
                      Stream stream, bool* done);

// fp8 weights. The first two are as LinearStreams and LinearStream; the others
// take what those do not.
bool LinearFp8Streams(const LinearParams& params);
Status LinearFp8Stream(const LinearParams& params, Stream stream);
// For some tens of tokens: takes norm and residual, with sums in another order
// than the others'.
bool LinearFp8Clusters(const LinearParams& params);
Status LinearFp8Cluster(const LinearParams& params, Stream stream);
Status LinearFp8Cuda(const LinearParams& params, Stream stream);
Status LinearFp8Gemv(const linear_fp8::Args& args, Stream stream);
// Quantises x itself.
Status LinearFp8QuantizingGemv(const LinearParams& params, Stream stream);
Status LinearFp8Tile(const linear_fp8::Args& args, LinearKernel kernel,
                     bool rows_aligned, Stream stream);

// How the workspace of a call on CUDA is used: the product before a residual is
// added to it comes first, then the rest.
struct LinearCudaWorkspace {
  void* product = nullptr;  // rows without gaps
  void* rest = nullptr;
};
LinearCudaWorkspace CutLinearCudaWorkspace(const LinearParams& params,
                                           size_t* size);

// The rest, of an fp8 call.
struct LinearFp8Workspace {
  uint8_t* q = nullptr;  // quantised x
  int64_t q_stride = 0;  // whole chunks of 16 bytes
  float* scales = nullptr;
  void* cublas_lt = nullptr;
};
// `size`, unless null, becomes its size.
LinearFp8Workspace CutLinearFp8Workspace(const LinearParams& params,
                                         size_t* size);

// CublasLt's own; see there.
StatusOr<CublasLt::State*> OpenCublasLt(Device device);
void CloseCublasLt(CublasLt::State* state);
Device CublasLtDevice(const CublasLt::State& state);
size_t CublasLtVersion(const CublasLt::State& state);

}  // namespace tenon

#endif  // TENON_OPS_LINEAR_LINEAR_BACKEND_H_
