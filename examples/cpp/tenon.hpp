#ifndef TENON_EXAMPLES_CPP_TENON_HPP_
#define TENON_EXAMPLES_CPP_TENON_HPP_

// tenon.h for C++17: the library opened at run time, handles that destroy
// themselves, exceptions for status codes. Copy this file and make it yours; it
// needs tenon.h and libdl. Structs are the C ones: tenon::Make<T>() sets
// struct_size, and what is not set has its default.
//
//   const auto library = tenon::Library::Open();
//   const tenon::Context context(library, TENON_DEVICE_CPU);
//   std::vector<float> x(8, 1.0f), weight(4, 1.0f), out(8);
//   const tenon::Tensor x_view(x.data(), tenon::kFloat32, {2, 4});
//   ...
//   auto args = tenon::Make<tenon_rms_norm_args>();
//   args.x = x_view.get();
//   ...
//   context.Run(args);

#include <dlfcn.h>
#include <tenon/tenon.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace tenon {

// What a function returned other than TENON_OK.
class Error : public std::runtime_error {
 public:
  Error(int32_t code, const std::string& message)
      : std::runtime_error(message), code_(code) {}
  int32_t code() const { return code_; }

 private:
  int32_t code_;
};

// A zeroed struct that knows its size.
template <class Struct>
Struct Make() {
  Struct result = {};
  result.struct_size = sizeof(Struct);
  return result;
}

#define TENON_HPP_FUNCTIONS(X)         \
  X(abi_version)                       \
  X(version_string)                    \
  X(status_name)                       \
  X(device_count)                      \
  X(device_query)                      \
  X(context_create)                    \
  X(context_query)                     \
  X(context_set_moe_kernels)           \
  X(context_destroy)                   \
  X(embedding)                         \
  X(rms_norm)                          \
  X(linear_workspace_size)             \
  X(linear)                            \
  X(quantize_fp8)                      \
  X(qk_norm)                           \
  X(attention_workspace_size)          \
  X(attention)                         \
  X(moe_router)                        \
  X(moe_max_tiles)                     \
  X(moe_align_workspace_size)          \
  X(moe_align)                         \
  X(moe_grouped_matmul_workspace_size) \
  X(moe_grouped_matmul)                \
  X(moe_swiglu)                        \
  X(moe_sum_reduce)                    \
  X(moe_workspace_size)                \
  X(moe)                               \
  X(sampling_params_validate)          \
  X(sampler_workspace_size)            \
  X(sampler)                           \
  X(logit_edits_sort)                  \
  X(speculative)                       \
  X(model_load)                        \
  X(model_create_random)               \
  X(model_query)                       \
  X(model_destroy)                     \
  X(session_create)                    \
  X(session_query)                     \
  X(session_destroy)                   \
  X(sequence_create)                   \
  X(sequence_fork)                     \
  X(sequence_truncate)                 \
  X(sequence_length)                   \
  X(sequence_release)                  \
  X(session_step)                      \
  X(session_enqueue_step)              \
  X(session_wait_step)

// tenon_rms_norm is functions.rms_norm.
struct Functions {
#define TENON_HPP_MEMBER(name) decltype(&tenon_##name) name = nullptr;
  TENON_HPP_FUNCTIONS(TENON_HPP_MEMBER)
#undef TENON_HPP_MEMBER
};

// libtenon.so, open for as long as a copy of this lives.
class Library {
 public:
  // By default as the dynamic linker finds it. Throws std::runtime_error that
  // says why the library cannot be used.
  static Library Open(const std::string& path = "libtenon.so.1") {
    void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    Library library;
    library.handle_ = std::shared_ptr<void>(handle, dlclose);
    Functions functions;
    // The version first: another one may lack functions.
    library.Find(path, "tenon_abi_version", &functions.abi_version);
    CheckVersion(path, functions.abi_version());
#define TENON_HPP_FIND(name) \
  library.Find(path, "tenon_" #name, &functions.name);
    TENON_HPP_FUNCTIONS(TENON_HPP_FIND)
#undef TENON_HPP_FIND
    library.functions_ = std::make_shared<const Functions>(functions);
    return library;
  }

  const Functions* operator->() const { return functions_.get(); }

  // Calls a function with a tenon_error behind the arguments; throws Error.
  template <class... Parameters, class... Arguments>
  void Call(int32_t (*function)(Parameters...), Arguments... arguments) const {
    auto error = Make<tenon_error>();
    const int32_t code = function(arguments..., &error);
    if (code != TENON_OK) throw Error(code, error.message);
  }

 private:
  Library() = default;

  static void CheckVersion(const std::string& path, uint32_t version) {
    constexpr uint32_t kNeeded = TENON_ABI_MAJOR << 16 | TENON_ABI_MINOR;
    if (version >= kNeeded && version >> 16 == kNeeded >> 16) return;
    throw std::runtime_error(path + " has ABI " + VersionText(version) +
                             ", but this program was compiled for " +
                             VersionText(kNeeded));
  }

  static std::string VersionText(uint32_t version) {
    return std::to_string(version >> 16) + "." +
           std::to_string(version & 0xffff);
  }

  template <class Function>
  void Find(const std::string& path, const char* name, Function* function) {
    void* const symbol = dlsym(handle_.get(), name);
    if (symbol == nullptr) {
      throw std::runtime_error(path + " has no function " + name);
    }
    *function = reinterpret_cast<Function>(symbol);
  }

  std::shared_ptr<void> handle_;
  std::shared_ptr<const Functions> functions_;
};

// Owns a context, a model or a session.
class Handle {
 public:
  using Destroy = decltype(Functions::context_destroy);

  Handle(Library library, Destroy destroy)
      : library_(std::move(library)), destroy_(destroy) {}
  Handle(Handle&& other) noexcept
      : library_(other.library_),
        destroy_(other.destroy_),
        value_(std::exchange(other.value_, 0)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(destroy_, other.destroy_);
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() { destroy_(value_, nullptr); }

  uint64_t get() const { return value_; }
  uint64_t* out() { return &value_; }  // for the function that creates it
  const Library& library() const { return library_; }

 private:
  Library library_;
  Destroy destroy_;
  uint64_t value_ = 0;  // destroying 0 does nothing
};

inline constexpr DLDataType kFloat32 = {TENON_DL_FLOAT, 32, 1};
inline constexpr DLDataType kFloat16 = {TENON_DL_FLOAT, 16, 1};
inline constexpr DLDataType kBFloat16 = {TENON_DL_BFLOAT, 16, 1};
inline constexpr DLDataType kFloat8E4M3 = {TENON_DL_FLOAT8_E4M3FN, 8, 1};
inline constexpr DLDataType kInt32 = {TENON_DL_INT, 32, 1};
inline constexpr DLDataType kInt64 = {TENON_DL_INT, 64, 1};
inline constexpr DLDataType kUInt8 = {TENON_DL_UINT, 8, 1};

// A DLTensor with its shape: a view of memory that lives elsewhere.
class Tensor {
 public:
  // Compact and row-major unless strides (in elements) are given.
  Tensor(void* data, DLDataType dtype, std::vector<int64_t> shape,
         std::vector<int64_t> strides = {}, uint64_t byte_offset = 0,
         DLDevice device = {static_cast<DLDeviceType>(TENON_DL_CPU), 0})
      : shape_(std::move(shape)), strides_(std::move(strides)) {
    dl_.data = data;
    dl_.device = device;
    dl_.ndim = static_cast<int32_t>(shape_.size());
    dl_.dtype = dtype;
    dl_.shape = shape_.data();
    dl_.strides = strides_.empty() ? nullptr : strides_.data();
    dl_.byte_offset = byte_offset;
  }
  Tensor(Tensor&&) = default;  // the vectors' memory moves along
  Tensor(const Tensor&) = delete;

  const DLTensor* get() const { return &dl_; }

 private:
  std::vector<int64_t> shape_;
  std::vector<int64_t> strides_;
  DLTensor dl_ = {};
};

// The functions that take a struct of arguments.
template <class Args>
struct OpOf;
#define TENON_HPP_OP(op, workspace_size_or_null)                   \
  template <>                                                      \
  struct OpOf<tenon_##op##_args> {                                 \
    static constexpr auto kRun = &Functions::op;                   \
    static constexpr auto kWorkspaceSize = workspace_size_or_null; \
  };
TENON_HPP_OP(embedding, nullptr)
TENON_HPP_OP(rms_norm, nullptr)
TENON_HPP_OP(linear, &Functions::linear_workspace_size)
TENON_HPP_OP(quantize_fp8, nullptr)
TENON_HPP_OP(qk_norm, nullptr)
TENON_HPP_OP(attention, &Functions::attention_workspace_size)
TENON_HPP_OP(moe_router, nullptr)
TENON_HPP_OP(moe_align, &Functions::moe_align_workspace_size)
TENON_HPP_OP(moe_grouped_matmul, &Functions::moe_grouped_matmul_workspace_size)
TENON_HPP_OP(moe_swiglu, nullptr)
TENON_HPP_OP(moe_sum_reduce, nullptr)
TENON_HPP_OP(moe, &Functions::moe_workspace_size)
TENON_HPP_OP(sampler, &Functions::sampler_workspace_size)
TENON_HPP_OP(speculative, nullptr)
#undef TENON_HPP_OP

template <class Args>
inline constexpr bool kTakesWorkspace =
    !std::is_same_v<decltype(OpOf<Args>::kWorkspaceSize), const std::nullptr_t>;

// Runs ops on one device.
class Context {
 public:
  Context(const Library& library, const tenon_context_options& options)
      : handle_(library, library->context_destroy) {
    library.Call(library->context_create, &options, handle_.out());
  }
  Context(const Library& library, int32_t device_type, int32_t device_index = 0)
      : Context(library, Options(device_type, device_index)) {}

  // Sizes of the expert kernels: the text of a file of tools/tune. Once.
  void SetMoeKernels(const std::string& json) {
    const Library& library = handle_.library();
    library.Call(library->context_set_moe_kernels, get(), json.c_str());
  }

  // Bytes that args.workspace must have; for ops with a workspace.
  template <class Args>
  uint64_t WorkspaceSize(const Args& args) const {
    const Library& library = handle_.library();
    uint64_t bytes = 0;
    library.Call(library.operator->()->*OpOf<Args>::kWorkspaceSize, get(),
                 &args, &bytes);
    return bytes;
  }

  template <class Args>
  void Run(const Args& args, void* stream = nullptr) const {
    const Library& library = handle_.library();
    library.Call(library.operator->()->*OpOf<Args>::kRun, get(), &args, stream);
  }

  tenon_context get() const { return handle_.get(); }

 private:
  static tenon_context_options Options(int32_t type, int32_t index) {
    auto options = Make<tenon_context_options>();
    options.device_type = type;
    options.device_index = index;
    return options;
  }

  Handle handle_;
};

// Scratch memory for ops on the CPU; grows, and is used by one call at a time.
class Workspace {
 public:
  // Gives the arguments what their op asks for.
  template <class Args>
  void Provide(const Context& context, Args* args) {
    args->workspace_size = context.WorkspaceSize(*args);
    if (args->workspace_size > size_) {
      memory_.reset(static_cast<char*>(::operator new(
          static_cast<size_t>(args->workspace_size), kAlignment)));
      size_ = args->workspace_size;
    }
    args->workspace = memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(char* memory) const {
      ::operator delete(memory, kAlignment);
    }
  };

  std::unique_ptr<char, Delete> memory_;
  uint64_t size_ = 0;
};

class Model {
 public:
  Model(const Library& library, const tenon_model_load_args& args)
      : handle_(library, library->model_destroy) {
    library.Call(library->model_load, &args, handle_.out());
  }
  // A Hugging Face directory, on the CPU or another device.
  Model(const Library& library, const std::string& directory,
        int32_t device_type = TENON_DEVICE_CPU, int32_t device_index = 0)
      : Model(library, LoadArgs(directory, device_type, device_index)) {}

  tenon_model_info Info() const {
    auto info = Make<tenon_model_info>();
    library().Call(library()->model_query, get(), &info);
    return info;
  }

  tenon_model get() const { return handle_.get(); }
  const Library& library() const { return handle_.library(); }

 private:
  static tenon_model_load_args LoadArgs(const std::string& directory,
                                        int32_t type, int32_t index) {
    auto args = Make<tenon_model_load_args>();
    args.directory = directory.c_str();
    args.device_type = type;
    args.device_index = index;
    return args;
  }

  Handle handle_;
};

// Keeps what it needs of its model, which may go first.
class Session {
 public:
  explicit Session(const Model& model, const tenon_session_options& options =
                                           Make<tenon_session_options>())
      : handle_(model.library(), model.library()->session_destroy) {
    library().Call(library()->session_create, model.get(), &options,
                   handle_.out());
  }

  // Runs a step; args.rows and the outputs are the caller's.
  void Step(const tenon_step_args& args) {
    library().Call(library()->session_step, get(), &args);
  }

  // The same in two parts, of which two may be in flight: args have rows alone,
  // and what comes of them is the caller's `results` of the wait.
  void EnqueueStep(const tenon_step_args& args) {
    library().Call(library()->session_enqueue_step, get(), &args);
  }
  void WaitStep(const tenon_step_results& results) {
    library().Call(library()->session_wait_step, get(), &results);
  }

  tenon_session get() const { return handle_.get(); }
  const Library& library() const { return handle_.library(); }

 private:
  Handle handle_;
};

// A sequence of a session. It may outlive the session: what it then does fails
// with TENON_NOT_FOUND.
class Sequence {
 public:
  explicit Sequence(const Session& session)
      : library_(session.library()), session_(session.get()) {
    library_.Call(library_->sequence_create, session_, &sequence_);
  }
  Sequence(Sequence&& other) noexcept
      : library_(other.library_),
        session_(other.session_),
        sequence_(std::exchange(other.sequence_, 0)) {}
  Sequence& operator=(Sequence&& other) noexcept {
    std::swap(library_, other.library_);
    std::swap(session_, other.session_);
    std::swap(sequence_, other.sequence_);
    return *this;
  }
  ~Sequence() {
    if (sequence_ != 0)
      library_->sequence_release(session_, sequence_, nullptr);
  }

  Sequence Fork() const {
    Sequence fork(library_, session_);
    library_.Call(library_->sequence_fork, session_, sequence_,
                  &fork.sequence_);
    return fork;
  }
  void Truncate(int32_t num_tokens) {
    library_.Call(library_->sequence_truncate, session_, sequence_, num_tokens);
  }
  int32_t Length() const {
    int32_t num_tokens = 0;
    library_.Call(library_->sequence_length, session_, sequence_, &num_tokens);
    return num_tokens;
  }

  tenon_sequence get() const { return sequence_; }

 private:
  Sequence(Library library, tenon_session session)
      : library_(std::move(library)), session_(session) {}

  Library library_;
  tenon_session session_;
  tenon_sequence sequence_ = 0;
};

}  // namespace tenon

#endif  // TENON_EXAMPLES_CPP_TENON_HPP_
