#include <cublasLt.h>
#include <dlfcn.h>

#include "ops/core/core_cuda.cuh"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {
namespace {

// The entry points used. Nothing links to the library.
struct Api {
  decltype(&::cublasLtCreate) create;
  decltype(&::cublasLtDestroy) destroy;
  decltype(&::cublasLtGetStatusName) status_name;
  decltype(&::cublasLtMatmul) matmul;
  decltype(&::cublasLtMatmulAlgoGetHeuristic) get_heuristic;
  decltype(&::cublasLtMatmulDescInit_internal) init_desc;
  decltype(&::cublasLtMatmulDescSetAttribute) set_desc;
  decltype(&::cublasLtMatrixLayoutInit_internal) init_layout;
  decltype(&::cublasLtMatmulPreferenceInit_internal) init_preference;
  decltype(&::cublasLtMatmulPreferenceSetAttribute) set_preference;
};

Status LoadApi(Api* api) {
  void* library = nullptr;
  for (const char* name :
       {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) return UnavailableError("no cuBLASLt library");
  bool found = true;
  const auto resolve = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(
        dlsym(library, name));
    found = found && *function != nullptr;
  };
  resolve("cublasLtCreate", &api->create);
  resolve("cublasLtDestroy", &api->destroy);
  resolve("cublasLtGetStatusName", &api->status_name);
  resolve("cublasLtMatmul", &api->matmul);
  resolve("cublasLtMatmulAlgoGetHeuristic", &api->get_heuristic);
  resolve("cublasLtMatmulDescInit_internal", &api->init_desc);
  resolve("cublasLtMatmulDescSetAttribute", &api->set_desc);
  resolve("cublasLtMatrixLayoutInit_internal", &api->init_layout);
  resolve("cublasLtMatmulPreferenceInit_internal", &api->init_preference);
  resolve("cublasLtMatmulPreferenceSetAttribute", &api->set_preference);
  return found ? Status() : UnavailableError("the cuBLASLt library is too old");
}

class CublasLtFp8Matmul : public Fp8MatmulCuda {
 public:
  ~CublasLtFp8Matmul() override {
    if (handle_ != nullptr) api_.destroy(handle_);
    cudaFree(workspace_);
  }

  Status Init(int64_t size) {
    TENON_RETURN_IF_ERROR(LoadApi(&api_));
    TENON_RETURN_IF_ERROR(Check(api_.create(&handle_), "cublasLtCreate"));
    TENON_RETURN_IF_ERROR(
        cuda::ToStatus(cudaMalloc(&workspace_, kWorkspaceBytes), "cudaMalloc"));
    return Plan(size);
  }

  Status Run(const void* x, const void* weight, void* out,
             Stream stream) override {
    const float alpha = 1.0f;
    const float beta = 0.0f;
    return Check(api_.matmul(handle_, &desc_, &alpha, weight, &in_, x, &in_,
                             &beta, out, &out_, out, &out_, &algorithm_,
                             workspace_, kWorkspaceBytes, cuda::Native(stream)),
                 "cublasLtMatmul");
  }

 private:
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  Status Check(cublasStatus_t status, const char* what) const {
    if (status == CUBLAS_STATUS_SUCCESS) return Status();
    return UnavailableError(what, ": ", api_.status_name(status));
  }

  template <class T>
  Status Set(cublasLtMatmulDescAttributes_t attribute, T value) {
    return Check(api_.set_desc(&desc_, attribute, &value, sizeof(value)),
                 "cublasLtMatmulDescSetAttribute");
  }

  // Columns of the library are rows here: out^T = weight * x^T.
  Status Plan(int64_t size) {
    TENON_RETURN_IF_ERROR(Check(
        api_.init_layout(&in_, sizeof(in_), CUDA_R_8F_E4M3, size, size, size),
        "layout"));
    TENON_RETURN_IF_ERROR(Check(
        api_.init_layout(&out_, sizeof(out_), CUDA_R_16BF, size, size, size),
        "layout"));
    TENON_RETURN_IF_ERROR(Check(
        api_.init_desc(&desc_, sizeof(desc_), CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "descriptor"));
    TENON_RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T));
    TENON_RETURN_IF_ERROR(Set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1}));
    cublasLtMatmulPreferenceOpaque_t preference;
    TENON_RETURN_IF_ERROR(Check(
        api_.init_preference(&preference, sizeof(preference)), "preference"));
    const size_t bytes = kWorkspaceBytes;
    TENON_RETURN_IF_ERROR(
        Check(api_.set_preference(&preference,
                                  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                  &bytes, sizeof(bytes)),
              "preference"));
    cublasLtMatmulHeuristicResult_t result = {};
    int count = 0;
    TENON_RETURN_IF_ERROR(
        Check(api_.get_heuristic(handle_, &desc_, &in_, &in_, &out_, &out_,
                                 &preference, 1, &result, &count),
              "cublasLtMatmulAlgoGetHeuristic"));
    if (count == 0) return UnavailableError("cuBLASLt has no fp8 algorithm");
    algorithm_ = result.algo;
    return Status();
  }

  Api api_ = {};
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  cublasLtMatmulDescOpaque_t desc_ = {};
  cublasLtMatrixLayoutOpaque_t in_ = {};
  cublasLtMatrixLayoutOpaque_t out_ = {};
  cublasLtMatmulAlgo_t algorithm_ = {};
};

}  // namespace

StatusOr<std::unique_ptr<Fp8MatmulCuda>> Fp8MatmulCuda::Create(int64_t size,
                                                               Device device) {
  const cuda::DeviceGuard guard(device);
  auto matmul = std::make_unique<CublasLtFp8Matmul>();
  TENON_RETURN_IF_ERROR(matmul->Init(size));
  return std::unique_ptr<Fp8MatmulCuda>(std::move(matmul));
}

}  // namespace tenon::bench
