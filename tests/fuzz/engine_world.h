#ifndef TENON_TESTS_FUZZ_ENGINE_WORLD_H_
#define TENON_TESTS_FUZZ_ENGINE_WORLD_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "tests/fuzz/check.h"
#include "tests/fuzz/error_box.h"
#include "tests/fuzz/input.h"
#include "tests/fuzz/session_oracle.h"

namespace tenon::fuzz {

inline constexpr int32_t kInt32Max = std::numeric_limits<int32_t>::max();
inline constexpr int32_t kInt32Min = std::numeric_limits<int32_t>::min();

// The tiny model that all sessions run.
inline constexpr int32_t kVocab = 13;
inline constexpr int32_t kLayers = 2;
inline constexpr char kConfig[] = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
  "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
  "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 13,
  "max_position_embeddings": 64, "intermediate_size": 8, "num_experts": 3,
  "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": true,
  "decoder_sparse_step": 1, "mlp_only_layers": [1], "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false})";

template <class Struct>
Struct Zeroed() {
  Struct made = {};
  made.struct_size = sizeof(made);
  return made;
}

// Memory of exactly `count` elements that begins as 0x77 bytes.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : data_(new T[count]), count_(count) {
    std::memset(static_cast<void*>(data_.get()), 0x77, count * sizeof(T));
  }
  T* get() { return data_.get(); }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }
  bool IsUntouched() const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data_.get());
    return std::all_of(bytes, bytes + count_ * sizeof(T),
                       [](uint8_t byte) { return byte == 0x77; });
  }

 private:
  std::unique_ptr<T[]> data_;
  size_t count_;
};

// One of the numbers that code forgets about.
int32_t AnyInt(Input& in);

// Good sampling parameters.
tenon_sampling_params Sampling(Input& in);

// One row of a step, with memory of its own.
struct Row {
  size_t index = 0;  // of the oracle's sequence
  tenon_step_row row;
  std::unique_ptr<Array<int32_t>> tokens;
  std::unique_ptr<Array<float>> logits;
  std::unique_ptr<tenon_sampling_params> sampling;

  int64_t NumLogitRows() const {
    if (row.logits_mode == TENON_LOGITS_ALL) return row.num_tokens;
    return row.sampling != nullptr || row.logits_mode == TENON_LOGITS_LAST;
  }
};

// Sessions of a model and what they should hold. A test case is a sequence of
// random calls, good and hostile.
class World {
 public:
  World(tenon_model model, Input& in) : model_(model), in_(in) {
    CreateSession();
  }

  void Run();

 private:
  // Makes one call, call(error), and checks what all results have in common.
  template <class Function>
  int32_t Call(const char* name, bool is_hostile, Function&& call) {
    ErrorBox error(in_);
    const int32_t code = call(error.get());
    error.Check(name, code, is_hostile, FieldNames());
    last_message_ = error.message();
    return code;
  }

  template <class Function>
  void Expect(const char* name, int32_t expected, Function&& call) {
    const bool is_hostile = expected != TENON_OK;
    const int32_t code = Call(name, is_hostile, call);
    if (code == expected) return;
    Fail(std::string(name) + " returned " + std::to_string(code) +
         ", expected " + std::to_string(expected) + ": " + last_message_);
  }

  template <class Function>
  void ExpectFailure(const char* name, Function&& call) {
    if (Call(name, true, call) == TENON_OK) {
      Fail(std::string(name) + " accepted a hostile call");
    }
  }

  // What messages may speak of.
  static const std::vector<const char*>& FieldNames();

  SessionOracle& AnySession() { return in_.PickFrom(sessions_); }
  // Null where the session has none.
  SessionOracle::Sequence* AnySequence(SessionOracle& s) {
    return s.sequences().empty() ? nullptr : &in_.PickFrom(s.sequences());
  }

  // Good calls, and checks of the state: engine_world.cc.
  void CreateSession();
  void DestroySession();
  void CreateSequence();
  void ForkSequence();
  void TruncateSequence();
  void Release(SessionOracle& s, size_t index);
  void ReleaseSequence();
  void CheckState(SessionOracle& s);
  void CheckState();

  // engine_hostile.cc
  void CreateHostileSession();
  // A number that is no handle of the kind that a call asks for.
  uint64_t HostileHandle();
  // A sequence of another session, or no handle at all.
  tenon_sequence HostileSequence(const SessionOracle& s);
  void CallWithHostileHandle();
  void CallWithNull(SessionOracle& s, const SessionOracle::Sequence* good);
  void CallWithHostileSession(uint64_t* result);
  // Contexts, models, devices, sampling parameters.
  void CallObjects();
  void CallContext();
  void CallModel();
  void LoadModel();
  void QueryObjects();
  void MakeHostile(tenon_sampling_params* params);

  // engine_step.cc
  // Up to four different sequences with a few tokens each.
  std::vector<Row> MakeRows(SessionOracle& s);
  // Calls tenon_session_step and checks what it wrote. Rows are passed as they
  // are in `rows`, `stride` bytes apart.
  int32_t RunStep(tenon_session session, std::vector<Row>& rows,
                  const tenon_step_args& given, bool is_hostile,
                  bool wants_experts, uint32_t stride);
  // The step of tenon_session_step in two parts.
  int32_t EnqueueAndWait(tenon_session session, const tenon_step_args& args);
  void Step();
  void HostileStep();
  void MakeHostile(SessionOracle& s, std::vector<Row>& rows);

  tenon_model model_;
  Input& in_;
  std::vector<SessionOracle> sessions_;
  std::vector<uint64_t> stale_handles_;
  int null_array_ = 0;  // of the next step: 1: rows, 2: tokens
  std::string last_message_;
};

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_ENGINE_WORLD_H_
