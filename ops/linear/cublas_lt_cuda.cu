#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "ops/core/core_cuda.cuh"
#include "ops/core/device_info.h"
#include "ops/linear/linear_backend.h"

namespace tenon {
namespace {

// The entry points used. cublasLt.h gives their types; nothing links to the
// library.
struct Api {
  decltype(&::cublasLtCreate) create;
  decltype(&::cublasLtDestroy) destroy;
  decltype(&::cublasLtGetVersion) get_version;
  decltype(&::cublasLtGetStatusName) get_status_name;
  decltype(&::cublasLtMatmul) matmul;
  decltype(&::cublasLtMatmulAlgoGetHeuristic) get_heuristic;
  decltype(&::cublasLtMatmulDescInit_internal) init_desc;
  decltype(&::cublasLtMatmulDescSetAttribute) set_desc;
  decltype(&::cublasLtMatrixLayoutInit_internal) init_layout;
  decltype(&::cublasLtMatmulPreferenceInit_internal) init_preference;
  decltype(&::cublasLtMatmulPreferenceSetAttribute) set_preference;
};

template <class Function>
bool Resolve(void* library, const char* name, Function* function,
             std::string* missing) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) *missing = name;
  return *function != nullptr;
}

Status LoadApi(Api* api) {
  std::string tried;
  void* library = nullptr;
  for (const char* name :
       {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    if (!tried.empty()) tried += "; ";
    tried += dlerror();
  }
  if (library == nullptr) {
    return UnavailableError("CublasLt: cannot open the library: ", tried);
  }
  // Stays open for good: captured graphs may hold its kernels.
  std::string missing;
  const auto resolve = [&](const char* name, auto* function) {
    return Resolve(library, name, function, &missing);
  };
  if (resolve("cublasLtCreate", &api->create) &&
      resolve("cublasLtDestroy", &api->destroy) &&
      resolve("cublasLtGetVersion", &api->get_version) &&
      resolve("cublasLtGetStatusName", &api->get_status_name) &&
      resolve("cublasLtMatmul", &api->matmul) &&
      resolve("cublasLtMatmulAlgoGetHeuristic", &api->get_heuristic) &&
      resolve("cublasLtMatmulDescInit_internal", &api->init_desc) &&
      resolve("cublasLtMatmulDescSetAttribute", &api->set_desc) &&
      resolve("cublasLtMatrixLayoutInit_internal", &api->init_layout) &&
      resolve("cublasLtMatmulPreferenceInit_internal", &api->init_preference) &&
      resolve("cublasLtMatmulPreferenceSetAttribute", &api->set_preference)) {
    return Status();
  }
  return UnavailableError("CublasLt: the library lacks ", missing);
}

// All that an algorithm is chosen for.
struct Key {
  int64_t tokens, out_features, in_features;
  int64_t x_stride, weight_stride, out_stride;
  DType dtype, out_dtype;
  uint32_t x_alignment, weight_alignment, out_alignment;
  bool bias;  // added in the epilogue

  auto AsTuple() const {
    return std::tie(tokens, out_features, in_features, x_stride, weight_stride,
                    out_stride, dtype, out_dtype, x_alignment, weight_alignment,
                    out_alignment, bias);
  }
  bool operator<(const Key& other) const { return AsTuple() < other.AsTuple(); }
};

// Of fp8 matrices: a scale per 128 elements of a row of x, or per block of 128
// x 128 of weight. Known since version 12.9, and to its header.
constexpr size_t kScaleModesVersion = 120900;
constexpr auto kWeightScaleMode =
    static_cast<cublasLtMatmulDescAttributes_t>(31);
constexpr auto kXScaleMode = static_cast<cublasLtMatmulDescAttributes_t>(32);
constexpr int32_t kScalePer128 = 4;
constexpr int32_t kScalePer128x128 = 5;

// A call ready to run but for its pointers. The descriptors are plain data.
struct Plan {
  bool supported = false;
  cublasLtMatmulAlgo_t algorithm = {};
  cublasLtMatmulDescOpaque_t desc = {};
  cublasLtMatrixLayoutOpaque_t x = {};
  cublasLtMatrixLayoutOpaque_t weight = {};
  cublasLtMatrixLayoutOpaque_t out = {};
};

cudaDataType_t DataType(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return CUDA_R_16F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kFloat8E4M3:
      return CUDA_R_8F_E4M3;
    default:
      return CUDA_R_32F;
  }
}

// The largest alignment that makes a difference.
constexpr uintptr_t kMaxAlignment = 16;
constexpr uintptr_t kBiasAlignment = kMaxAlignment;

// The power of two that divides the address.
uint32_t Alignment(const TensorView& view) {
  const auto address = reinterpret_cast<uintptr_t>(view.data) | kMaxAlignment;
  return static_cast<uint32_t>(address & -address);
}

// A single row may come with any stride.
int64_t RowStride(const TensorView& matrix) {
  return matrix.shape[0] == 1 ? matrix.shape[1] : matrix.stride[0];
}

Key MakeKey(const LinearParams& p, bool bias) {
  Key key;
  key.tokens = p.x.shape[0];
  key.out_features = p.weight.shape[0];
  key.in_features = p.x.shape[1];
  key.x_stride = RowStride(p.x);
  key.weight_stride = RowStride(p.weight);
  key.out_stride = RowStride(p.out);
  key.dtype = p.x.dtype;
  key.out_dtype = p.out.dtype;
  key.x_alignment = Alignment(p.x);
  key.weight_alignment = Alignment(p.weight);
  key.out_alignment = Alignment(p.out);
  key.bias = bias;
  return key;
}

}  // namespace

struct CublasLt::State {
  Device device;
  Api api;
  cublasLtHandle_t handle = nullptr;
  std::mutex mutex;  // of `plans`
  std::map<Key, Plan> plans;

  Status ToStatus(cublasStatus_t status, const char* what) const {
    if (status == CUBLAS_STATUS_SUCCESS) return Status();
    return InternalError("Linear: ", what, ": ", api.get_status_name(status));
  }
  Status FindPlan(const Key& key, Plan* plan);
  Status SetBias(const void* bias, Plan* plan) const;
  Status SetScales(const void* weight, const void* x, Plan* plan) const;
  Status DescribeScales(Plan* plan) const;
  Status MakePlan(const Key& key, Plan* plan) const;
  Status Describe(const Key& key, Plan* plan) const;
  Status ChooseAlgorithm(const Key& key, Plan* plan) const;
};

// cuBLASLt's matrices are column-major: it sees out^T = weight * x^T with
// weight^T, x^T and out^T stored by columns.
Status CublasLt::State::Describe(const Key& key, Plan* plan) const {
  TENON_RETURN_IF_ERROR(ToStatus(
      api.init_layout(&plan->weight, sizeof(plan->weight), DataType(key.dtype),
                      key.in_features, key.out_features, key.weight_stride),
      "layout of weight"));
  TENON_RETURN_IF_ERROR(
      ToStatus(api.init_layout(&plan->x, sizeof(plan->x), DataType(key.dtype),
                               key.in_features, key.tokens, key.x_stride),
               "layout of x"));
  TENON_RETURN_IF_ERROR(ToStatus(
      api.init_layout(&plan->out, sizeof(plan->out), DataType(key.out_dtype),
                      key.out_features, key.tokens, key.out_stride),
      "layout of out"));
  TENON_RETURN_IF_ERROR(ToStatus(api.init_desc(&plan->desc, sizeof(plan->desc),
                                               CUBLAS_COMPUTE_32F, CUDA_R_32F),
                                 "descriptor"));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  TENON_RETURN_IF_ERROR(
      ToStatus(api.set_desc(&plan->desc, CUBLASLT_MATMUL_DESC_TRANSA,
                            &transpose, sizeof(transpose)),
               "transposition"));
  if (key.dtype == DType::kFloat8E4M3) {
    TENON_RETURN_IF_ERROR(DescribeScales(plan));
  }
  if (!key.bias) return Status();
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
  TENON_RETURN_IF_ERROR(
      ToStatus(api.set_desc(&plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE,
                            &epilogue, sizeof(epilogue)),
               "epilogue"));
  // Stands for any pointer of this alignment.
  return SetBias(reinterpret_cast<const void*>(kBiasAlignment), plan);
}

Status CublasLt::State::SetBias(const void* bias, Plan* plan) const {
  return ToStatus(api.set_desc(&plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                               &bias, sizeof(bias)),
                  "bias");
}

Status CublasLt::State::DescribeScales(Plan* plan) const {
  TENON_RETURN_IF_ERROR(
      ToStatus(api.set_desc(&plan->desc, kWeightScaleMode, &kScalePer128x128,
                            sizeof(kScalePer128x128)),
               "scales of weight"));
  TENON_RETURN_IF_ERROR(
      ToStatus(api.set_desc(&plan->desc, kXScaleMode, &kScalePer128,
                            sizeof(kScalePer128)),
               "scales of x"));
  // Stand for any pointers that are aligned as they must be.
  const auto* any = reinterpret_cast<const void*>(kMaxAlignment);
  return SetScales(any, any, plan);
}

Status CublasLt::State::SetScales(const void* weight, const void* x,
                                  Plan* plan) const {
  TENON_RETURN_IF_ERROR(
      ToStatus(api.set_desc(&plan->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                            &weight, sizeof(weight)),
               "scales of weight"));
  return ToStatus(
      api.set_desc(&plan->desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x,
                   sizeof(x)),
      "scales of x");
}

Status CublasLt::State::ChooseAlgorithm(const Key& key, Plan* plan) const {
  cublasLtMatmulPreferenceOpaque_t preference;
  TENON_RETURN_IF_ERROR(ToStatus(
      api.init_preference(&preference, sizeof(preference)), "preference"));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute,
                          auto value) {
    return ToStatus(
        api.set_preference(&preference, attribute, &value, sizeof(value)),
        "preference");
  };
  TENON_RETURN_IF_ERROR(prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                               uint64_t{kCublasLtWorkspaceBytes}));
  // Split sums are added in a fixed order and in float32, or not split at all.
  TENON_RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
             uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}));
  TENON_RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.weight_alignment));
  TENON_RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.x_alignment));
  TENON_RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.out_alignment));
  TENON_RETURN_IF_ERROR(
      prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.out_alignment));

  cublasLtMatmulHeuristicResult_t result = {};
  int count = 0;
  const cublasStatus_t status = api.get_heuristic(
      handle, &plan->desc, &plan->weight, &plan->x, &plan->out, &plan->out,
      &preference, 1, &result, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return Status();
  TENON_RETURN_IF_ERROR(ToStatus(status, "choice of an algorithm"));
  plan->supported = count == 1 && result.state == CUBLAS_STATUS_SUCCESS;
  plan->algorithm = result.algo;
  return Status();
}

Status CublasLt::State::MakePlan(const Key& key, Plan* plan) const {
  if (key.dtype == DType::kFloat8E4M3 &&
      api.get_version() < kScaleModesVersion) {
    return Status();
  }
  TENON_RETURN_IF_ERROR(Describe(key, plan));
  return ChooseAlgorithm(key, plan);
}

Status CublasLt::State::FindPlan(const Key& key, Plan* plan) {
  std::lock_guard<std::mutex> lock(mutex);
  auto it = plans.find(key);
  if (it == plans.end()) {
    TENON_RETURN_IF_ERROR(MakePlan(key, plan));
    it = plans.emplace(key, *plan).first;
  }
  *plan = it->second;
  return Status();
}

StatusOr<CublasLt::State*> OpenCublasLt(Device device) {
  const int count = NumCudaDevices();
  if (device.index < 0 || device.index >= count) {
    return UnavailableError("CublasLt: no CUDA device ", device.index,
                            ", this host has ", count);
  }
  auto state = std::make_unique<CublasLt::State>();
  state->device = device;
  TENON_RETURN_IF_ERROR(LoadApi(&state->api));
  const cuda::DeviceGuard guard(device);
  TENON_RETURN_IF_ERROR(guard.status());
  const cublasStatus_t status = state->api.create(&state->handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    return UnavailableError("CublasLt: cannot create a handle: ",
                            state->api.get_status_name(status));
  }
  return state.release();
}

void CloseCublasLt(CublasLt::State* state) {
  {
    const cuda::DeviceGuard guard(state->device);
    state->api.destroy(state->handle);
  }
  delete state;
}

Device CublasLtDevice(const CublasLt::State& state) { return state.device; }

size_t CublasLtVersion(const CublasLt::State& state) {
  return state.api.get_version();
}

namespace {

constexpr int kBiasThreads = 256;

template <class T>
__global__ void __launch_bounds__(kBiasThreads)
    AddBiasKernel(const T* bias, float* out, int64_t out_stride, int64_t cols) {
  float* row = out + int64_t{blockIdx.x} * out_stride;
  const int64_t step = int64_t{gridDim.y} * kBiasThreads;
  for (int64_t col = int64_t{blockIdx.y} * kBiasThreads + threadIdx.x;
       col < cols; col += step) {
    row[col] += cuda::ToFloat(bias[col]);
  }
}

// For a float32 out, where adding later rounds no differently.
template <class T>
Status AddBias(const LinearParams& p, Stream stream) {
  const int64_t cols = p.out.shape[1];
  const int64_t blocks = cuda::CeilDiv(cols, int64_t{kBiasThreads});
  const dim3 grid(static_cast<unsigned>(p.out.shape[0]),
                  static_cast<unsigned>(std::min<int64_t>(blocks, 65535)));
  return cuda::Launch("Linear", stream, grid, dim3(kBiasThreads), 0,
                      AddBiasKernel<T>, p.bias.As<const T>(), p.out.As<float>(),
                      p.out.stride[0], cols);
}

}  // namespace

Status LinearCublasLt(const LinearParams& p, const float* x_scales,
                      Stream stream, bool* done) {
  *done = false;
  CublasLt::State& state = p.cublas_lt->state();
  // The epilogue takes a bias of out's dtype, read in whole vectors; after an
  // fp8 product, one of 16 bits.
  const bool has_bias = p.bias.present();
  const bool is_fp8 = p.x.dtype == DType::kFloat8E4M3;
  const bool in_epilogue = has_bias && p.out.dtype == p.bias.dtype &&
                           !(is_fp8 && p.bias.dtype == DType::kFloat32) &&
                           Alignment(p.bias) == kBiasAlignment;
  if (has_bias && !in_epilogue && p.out.dtype != DType::kFloat32) {
    return Status();
  }
  Plan plan;
  TENON_RETURN_IF_ERROR(state.FindPlan(MakeKey(p, in_epilogue), &plan));
  if (!plan.supported) return Status();
  if (in_epilogue) {
    TENON_RETURN_IF_ERROR(state.SetBias(p.bias.data, &plan));
  }
  if (is_fp8) {
    TENON_RETURN_IF_ERROR(
        state.SetScales(p.weight_scales.data, x_scales, &plan));
  }
  const float alpha = 1.0f;
  const float beta = 0.0f;
  TENON_RETURN_IF_ERROR(state.ToStatus(
      state.api.matmul(state.handle, &plan.desc, &alpha, p.weight.data,
                       &plan.weight, p.x.data, &plan.x, &beta, p.out.data,
                       &plan.out, p.out.data, &plan.out, &plan.algorithm,
                       p.workspace, kCublasLtWorkspaceBytes,
                       cuda::Native(stream)),
      "cublasLtMatmul"));
  *done = true;
  if (!has_bias || in_epilogue) return Status();
  return cuda::WithFloatType(p.bias.dtype, [&](auto zero) {
    return AddBias<decltype(zero)>(p, stream);
  });
}

}  // namespace tenon
