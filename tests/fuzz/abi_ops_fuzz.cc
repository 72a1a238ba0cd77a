#include <string>
#include <vector>

#include "abi/tenon.h"
#include "tests/fuzz/check.h"
#include "tests/fuzz/error_box.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/op_case.h"

// Hostile calls of every op. An input makes a number of calls, each a valid one
// with some mutations. What must hold:
//   no sanitizer report, whatever is passed that a library can check
//   a call that breaks a rule of tenon.h fails; a valid one does not, nor one
//   with any content of its tensors
//   a call that fails has changed no byte; one that succeeds none outside of
//   what it writes
//   results and messages as ErrorBox::Check has it

namespace tenon::fuzz {
namespace {

constexpr int kCallsPerInput = 16;

// Contexts of all kinds. One thread: what a run covers must not depend on how
// threads interleave.
struct Contexts {
  Contexts() {
    tenon_context_options options = {};
    options.struct_size = sizeof(options);
    options.device_type = TENON_DEVICE_CPU;
    options.num_threads = 1;
    if (tenon_context_create(&options, &live, nullptr) != TENON_OK ||
        tenon_context_create(&options, &stale, nullptr) != TENON_OK ||
        tenon_context_destroy(stale, nullptr) != TENON_OK) {
      Fail("contexts cannot be made");
    }
  }

  tenon_context live = 0;
  tenon_context stale = 0;
};

tenon_context HostileContext(const Contexts& contexts, Input& in) {
  return in.Pick<tenon_context>({contexts.stale,
                                 contexts.live ^ (uint64_t{1} << in.Below(64)),
                                 1, ~uint64_t{0}, in.Bits() | 1});
}

std::vector<const char*> FieldNames(const Op& op) {
  std::vector<const char*> names = {"args", "context", "stream", "struct_size",
                                    "bytes"};
  for (const Field& field : op.fields) names.push_back(field.name);
  return names;
}

int32_t NumCudaDevices() {
  int32_t count = 0;
  return tenon_device_count(TENON_DEVICE_CUDA, &count, nullptr) == TENON_OK
             ? count
             : 0;
}

bool AnyOnCuda(OpCase& c) {
  for (const OpCase::Given& given : c.GivenTensors()) {
    if (given.tensor->dl->device.device_type == TENON_DL_CUDA) return true;
  }
  return false;
}

class Caller {
 public:
  Caller(const Op& op, const Contexts& contexts, Input& in)
      : op_(op), in_(in), case_(op, in), fields_(FieldNames(op)) {
    case_.context = in.OneIn(2) ? contexts.live : 0;
    live_ = contexts.live;
    num_mutations_ = static_cast<int>(in.Pick<int64_t>({0, 1, 1, 1, 1, 2, 3}));
    for (int i = 0; i < num_mutations_; ++i) {
      if (in.OneIn(16)) {
        case_.context = HostileContext(contexts, in);
        may_fail_ = true;
      } else {
        mutation_ = Mutate(case_, in);
        may_fail_ = may_fail_ || mutation_.may_fail;
      }
    }
  }

  void Run() {
    if (op_.query != nullptr && is_mutated()) {
      uint64_t ignored;  // of shapes that need not have memory
      Query(&ignored);
    }
    // Where there is such a device, host memory said to be on it is a lie that
    // cannot be seen through.
    static const bool has_cuda = NumCudaDevices() > 0;
    if (has_cuda && AnyOnCuda(case_)) return;
    case_.MakeViewsTrue();
    if (op_.query != nullptr) {
      uint64_t bytes = 0;
      if (Query(&bytes) != TENON_OK) bytes = 0;
      case_.ProvideWorkspace(bytes);
      if (in_.OneIn(16)) {
        MutateWorkspace(case_, in_);
        may_fail_ = workspace_is_mutated_ = true;
      }
    }
    Call();
  }

 private:
  bool context_is_valid() const {
    return case_.context == 0 || case_.context == live_;
  }
  bool is_mutated() const {
    return num_mutations_ > 0 || workspace_is_mutated_;
  }
  const void* args() const {
    return case_.has_args ? case_.args->data() : nullptr;
  }

  int32_t Query(uint64_t* bytes) {
    ErrorBox error(in_);
    constexpr uint64_t kUntouched = 0x5a5a5a5a5a5a5a5a;
    uint64_t result = kUntouched;
    const bool has_result = !in_.OneIn(64);
    const int32_t code = op_.query(case_.context, args(),
                                   has_result ? &result : nullptr, error.get());
    const bool may_fail = may_fail_ || !has_result;
    if (!has_result) may_fail_ = true;  // the call lacks a workspace then
    error.Check(op_.query_name, code, is_mutated() || !has_result, fields_);
    if (code != TENON_OK) {
      if (result != kUntouched) Fail("a failed query wrote a size");
      if (!may_fail) Fail("a valid query failed: " + error.message());
      return code;
    }
    if (!has_result || !case_.has_args || !context_is_valid()) {
      Fail("a query succeeded that must not");
    }
    *bytes = result;
    return code;
  }

  void Call() {
    ErrorBox error(in_);
    case_.Snapshot();
    const int32_t code =
        op_.run(case_.context, args(), case_.stream, error.get());
    error.Check(op_.name, code, is_mutated(), fields_);
    if (code == TENON_OK) {
      CheckSuccess();
    } else {
      CheckFailure(error.message());
    }
  }

  void CheckSuccess() {
    const std::string name = op_.name;
    if (MustFail(case_, context_is_valid())) {
      Fail(name + " accepted a call that breaks a rule of all ops");
    }
    if (AnyOnCuda(case_)) {
      if (!case_.IsUnchanged()) Fail(name + " touched memory of a device");
    } else if (!workspace_is_mutated_ && !case_.HasNoStrayWrites()) {
      Fail(name + " wrote outside of its outputs");
    }
  }

  void CheckFailure(const std::string& message) {
    if (!may_fail_) Fail("a valid call failed: " + message);
    if (!case_.IsUnchanged()) Fail("memory changed: " + message);
    const Field* field = mutation_.field;
    if (num_mutations_ != 1 || field == nullptr || workspace_is_mutated_ ||
        !Mentions(message, field->name)) {
      return;
    }
    if (message.find(std::to_string(mutation_.value)) == std::string::npos) {
      Fail("the message lacks the value of " + std::string(field->name) + ", " +
           std::to_string(mutation_.value) + ": " + message);
    }
  }

  const Op& op_;
  Input& in_;
  OpCase case_;
  std::vector<const char*> fields_;
  tenon_context live_ = 0;
  Mutation mutation_;  // the last one
  int num_mutations_ = 0;
  bool may_fail_ = false;
  bool workspace_is_mutated_ = false;
};

}  // namespace
}  // namespace tenon::fuzz

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  static const tenon::fuzz::Contexts contexts;
  tenon::fuzz::Input in(data, size);
  for (int i = 0; i < tenon::fuzz::kCallsPerInput; ++i) {
    tenon::fuzz::Caller(in.PickFrom(tenon::fuzz::Ops()), contexts, in).Run();
  }
  return 0;
}
