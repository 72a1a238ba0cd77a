#ifndef TENON_TESTS_ABI_ENGINE_FIXTURE_H_
#define TENON_TESTS_ABI_ENGINE_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "abi/tenon.h"

// What tests of the C interface's engine share. Only tenon.h is used.

namespace tenon::testing {

// A struct of the interface, zeroed, with its size.
template <class Struct>
Struct Make() {
  Struct made = {};
  made.struct_size = sizeof(made);
  return made;
}

// Expects call(&error) to return `code`, with all of `parts` in the message.
template <class Function>
void ExpectError(int32_t code, std::initializer_list<const char*> parts,
                 Function&& call) {
  tenon_error error = Make<tenon_error>();
  EXPECT_EQ(call(&error), code) << error.message;
  EXPECT_EQ(error.code, code);
  for (const char* part : parts) {
    EXPECT_NE(std::string(error.message).find(part), std::string::npos)
        << "message: " << error.message << "\nexpected in it: " << part;
  }
}

template <class Function>
void ExpectOk(Function&& call) {
  tenon_error error = Make<tenon_error>();
  EXPECT_EQ(call(&error), TENON_OK) << error.message;
  EXPECT_STREQ(error.message, "");
}

// Destroys a handle at the end of a scope.
class Owned {
 public:
  using Destroy = int32_t (*)(uint64_t handle, tenon_error* error);
  Owned() = default;
  Owned(uint64_t handle, Destroy destroy)
      : handle_(handle), destroy_(destroy) {}
  Owned(Owned&& other) noexcept { *this = std::move(other); }
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(destroy_, other.destroy_);
    return *this;
  }
  ~Owned() {
    if (handle_ != 0) destroy_(handle_, nullptr);
  }
  operator uint64_t() const { return handle_; }  // NOLINT: implicit

 private:
  uint64_t handle_ = 0;
  Destroy destroy_ = nullptr;
};

inline constexpr char kTinyModel[] = "tests/golden/qwen3_moe_tiny";
inline constexpr int32_t kTinyVocab = 131;

inline tenon_model_load_args LoadArgs(int32_t device_type,
                                      const char* directory = kTinyModel) {
  auto args = Make<tenon_model_load_args>();
  args.device_type = device_type;
  args.directory = directory;
  return args;
}

inline Owned LoadModel(int32_t device_type,
                       const char* directory = kTinyModel) {
  const tenon_model_load_args args = LoadArgs(device_type, directory);
  tenon_model model = 0;
  ExpectOk([&](tenon_error* e) { return tenon_model_load(&args, &model, e); });
  return Owned(model, tenon_model_destroy);
}

inline std::string TinyConfig() {
  std::ifstream file(std::string(kTinyModel) + "/config.json");
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline tenon_model_random_args RandomArgs(int32_t device_type,
                                          const char* config) {
  auto args = Make<tenon_model_random_args>();
  args.device_type = device_type;
  args.dtype = TENON_DTYPE_BFLOAT16;
  args.seed = 7;
  args.config_json = config;
  return args;
}

// Small, and the same bits on every path.
inline tenon_session_options SmallSession() {
  auto options = Make<tenon_session_options>();
  options.flags = TENON_SESSION_BATCH_INVARIANT | TENON_SESSION_COUNT_EXPERTS;
  options.max_sequences = 4;
  options.max_tokens = 48;
  options.max_context = 64;
  options.page_size = 8;
  options.max_logit_rows = 32;
  return options;
}

inline Owned NewSession(tenon_model model,
                        tenon_session_options options = SmallSession()) {
  tenon_session session = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_session_create(model, &options, &session, e);
  });
  return Owned(session, tenon_session_destroy);
}

inline tenon_sequence NewSequence(tenon_session session) {
  tenon_sequence sequence = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_sequence_create(session, &sequence, e);
  });
  return sequence;
}

inline int32_t LengthOf(tenon_session session, tenon_sequence sequence) {
  int32_t length = -1;
  ExpectOk([&](tenon_error* e) {
    return tenon_sequence_length(session, sequence, &length, e);
  });
  return length;
}

inline std::vector<int32_t> Prompt(int32_t count, int32_t seed) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    tokens[static_cast<size_t>(i)] =
        (seed * 53 + i * 29 + i * i * 7) % kTinyVocab;
  }
  return tokens;
}

inline tenon_sampling_params Greedy() { return {}; }

inline tenon_sampling_params Seeded(uint64_t seed) {
  tenon_sampling_params params = {};
  params.temperature = 0.9f;
  params.top_p = 0.95f;
  params.top_k = 50;
  params.seed = seed;
  return params;
}

inline tenon_step_row Row(tenon_sequence sequence,
                          const std::vector<int32_t>& tokens,
                          const tenon_sampling_params* sampling) {
  auto row = Make<tenon_step_row>();
  row.sequence = sequence;
  row.tokens = tokens.data();
  row.num_tokens = static_cast<int32_t>(tokens.size());
  row.sampling = sampling;
  return row;
}

inline tenon_step_args StepArgs(const std::vector<tenon_step_row>& rows,
                                std::vector<int32_t>* tokens) {
  tokens->assign(rows.size(), -7);
  auto args = Make<tenon_step_args>();
  args.num_rows = static_cast<int32_t>(rows.size());
  args.rows = rows.data();
  args.tokens = tokens->data();
  return args;
}

// The token of each row.
inline std::vector<int32_t> Step(tenon_session session,
                                 const std::vector<tenon_step_row>& rows) {
  std::vector<int32_t> tokens;
  const tenon_step_args args = StepArgs(rows, &tokens);
  ExpectOk(
      [&](tenon_error* e) { return tenon_session_step(session, &args, e); });
  return tokens;
}

// The prompt in one step, then `count` tokens one by one.
inline std::vector<int32_t> Generate(tenon_session session,
                                     tenon_sequence sequence,
                                     std::vector<int32_t> input, int32_t count,
                                     const tenon_sampling_params& sampling) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) {
    tokens.push_back(Step(session, {Row(sequence, input, &sampling)})[0]);
    input = {tokens.back()};
  }
  return tokens;
}

// Tests that run on the CPU and, where there is one, on a GPU.
class DeviceTest : public ::testing::TestWithParam<int32_t> {
 protected:
  void SetUp() override {
    int32_t count = 0;
    ASSERT_EQ(tenon_device_count(GetParam(), &count, nullptr), TENON_OK);
    if (count == 0) GTEST_SKIP() << "no such device";
  }
};

// With a session of the tiny model.
class SessionTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    model_ = LoadModel(GetParam());
    session_ = NewSession(model_);
  }

  void ExpectStepFails(const tenon_step_args& args, int32_t code,
                       std::initializer_list<const char*> why) {
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_session_step(session_, &args, e);
    });
  }

  tenon_session_info Info() const {
    auto info = Make<tenon_session_info>();
    ExpectOk([&](tenon_error* e) {
      return tenon_session_query(session_, &info, e);
    });
    return info;
  }

  Owned model_;
  Owned session_;
};

inline std::string DeviceName(const ::testing::TestParamInfo<int32_t>& info) {
  return info.param == TENON_DEVICE_CPU ? "cpu" : "cuda";
}

#define TENON_FOR_EACH_DEVICE(Suite)                                          \
  INSTANTIATE_TEST_SUITE_P(                                                   \
      Devices, Suite, ::testing::Values(TENON_DEVICE_CPU, TENON_DEVICE_CUDA), \
      ::tenon::testing::DeviceName)

}  // namespace tenon::testing

#endif  // TENON_TESTS_ABI_ENGINE_FIXTURE_H_
