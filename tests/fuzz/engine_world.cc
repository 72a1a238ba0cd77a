#include "tests/fuzz/engine_world.h"

#include "tests/abi/moe_kernels_json.h"

// Good calls, but for a number or two; checks of the state.

namespace tenon::fuzz {

constexpr int kCallsPerInput = 48;

int32_t AnyInt(Input& in) {
  return static_cast<int32_t>(
      in.Pick<int64_t>({-1, 0, 1, kInt32Max, kInt32Min, kVocab, 4096, 1 << 20,
                        static_cast<int32_t>(in.Bits())}));
}

tenon_sampling_params Sampling(Input& in) {
  tenon_sampling_params params = {};
  params.temperature = in.Pick<float>({0.0f, 0.7f, 1.0f});
  params.top_k = static_cast<int32_t>(in.Pick<int64_t>({0, -1, 1, 5}));
  params.top_p = in.Pick<float>({0.0f, 0.5f, 1.0f});
  params.min_p = in.Pick<float>({0.0f, 0.1f});
  params.filter_order = static_cast<int32_t>(in.Below(2));
  params.seed = in.Below(256);
  return params;
}

const std::vector<const char*>& World::FieldNames() {
  static const std::vector<const char*> fields = {"session",
                                                  "model",
                                                  "sequence",
                                                  "context",
                                                  "fork",
                                                  "num_tokens",
                                                  "options",
                                                  "info",
                                                  "args",
                                                  "rows",
                                                  "tokens",
                                                  "num_rows",
                                                  "distinct_experts",
                                                  "max_sequences",
                                                  "max_tokens",
                                                  "max_context",
                                                  "max_logit_rows",
                                                  "num_pages",
                                                  "page_size",
                                                  "num_threads",
                                                  "pages",
                                                  "params",
                                                  "temperature",
                                                  "top_k",
                                                  "top_p",
                                                  "min_p",
                                                  "filter_order",
                                                  "device_type",
                                                  "device_index",
                                                  "count",
                                                  "config_json",
                                                  "moe_kernels_json",
                                                  "json",
                                                  "dtype",
                                                  "rank",
                                                  "world_size",
                                                  "directory",
                                                  "flags",
                                                  "cublas_lt",
                                                  "reserved",
                                                  "sequences",
                                                  "config.json"};
  return fields;
}

void World::Run() {
  for (int i = 0; i < kCallsPerInput; ++i) {
    switch (in_.Below(16)) {
      case 0:
        CreateSession();
        break;
      case 1:
        in_.OneIn(4) ? DestroySession() : CreateHostileSession();
        break;
      case 2:
      case 3:
        CreateSequence();
        break;
      case 4:
        ForkSequence();
        break;
      case 5:
        TruncateSequence();
        break;
      case 6:
        ReleaseSequence();
        break;
      case 7:
      case 8:
        CallWithHostileHandle();
        break;
      case 9:
        CallObjects();
        break;
      case 10:
      case 11:
      case 12:
        HostileStep();
        break;
      default:
        Step();
    }
    if (in_.OneIn(4)) CheckState();
  }
  CheckState();
  while (!sessions_.empty()) DestroySession();
}

void World::CreateSession() {
  if (sessions_.size() == 3) return;
  auto options = Zeroed<tenon_session_options>();
  options.flags = static_cast<uint32_t>(in_.Below(16));
  options.max_sequences = static_cast<int32_t>(in_.Between(1, 4));
  options.max_tokens = static_cast<int32_t>(in_.Between(1, 10));
  options.max_context = static_cast<int32_t>(in_.Between(1, 20));
  options.page_size = static_cast<int32_t>(in_.Between(1, 4));
  options.num_pages = in_.Below(12);
  options.max_logit_rows = static_cast<int32_t>(in_.Below(6));
  options.num_threads = 1;  // coverage must not depend on interleaving
  if (in_.OneIn(8)) options.moe_kernels_json = testing::kMoeKernelsJson;
  tenon_session handle = 0;
  Expect("tenon_session_create", TENON_OK, [&](tenon_error* error) {
    return tenon_session_create(model_, &options, &handle, error);
  });
  auto info = Zeroed<tenon_session_info>();
  Expect("tenon_session_query", TENON_OK, [&](tenon_error* error) {
    return tenon_session_query(handle, &info, error);
  });
  if (info.num_free_pages != info.num_pages || info.num_sequences != 0) {
    Fail("a new session is not empty");
  }
  sessions_.emplace_back(handle, info);
}

void World::DestroySession() {
  if (sessions_.empty()) return;
  const size_t index = in_.Below(sessions_.size());
  SessionOracle& s = sessions_[index];
  if (in_.OneIn(2)) {
    while (!s.sequences().empty()) Release(s, s.sequences().size() - 1);
    CheckState(s);
  }
  const tenon_session handle = s.handle;
  Expect("tenon_session_destroy", TENON_OK, [&](tenon_error* error) {
    return tenon_session_destroy(handle, error);
  });
  Expect("tenon_session_destroy", TENON_NOT_FOUND, [&](tenon_error* error) {
    return tenon_session_destroy(handle, error);
  });
  stale_handles_.push_back(handle);
  sessions_.erase(sessions_.begin() + static_cast<ptrdiff_t>(index));
}

void World::CreateSequence() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  tenon_sequence handle = 0;
  Expect("tenon_sequence_create",
         s.is_full() ? TENON_RESOURCE_EXHAUSTED : TENON_OK,
         [&](tenon_error* error) {
           return tenon_sequence_create(s.handle, &handle, error);
         });
  if (!s.is_full()) s.sequences().push_back({handle, 0, {}});
}

void World::ForkSequence() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  const SessionOracle::Sequence* parent = AnySequence(s);
  if (parent == nullptr) return;
  tenon_sequence fork = 0;
  Expect("tenon_sequence_fork",
         s.is_full() ? TENON_RESOURCE_EXHAUSTED : TENON_OK,
         [&](tenon_error* error) {
           return tenon_sequence_fork(s.handle, parent->handle, &fork, error);
         });
  if (s.is_full()) return;
  SessionOracle::Sequence child = *parent;
  child.handle = fork;
  s.sequences().push_back(child);
}

void World::TruncateSequence() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  if (s.sequences().empty()) return;
  const size_t index = in_.Below(s.sequences().size());
  const SessionOracle::Sequence& sequence = s.sequences()[index];
  const int32_t length =
      in_.OneIn(4) ? AnyInt(in_)
                   : static_cast<int32_t>(in_.Between(0, sequence.length + 1));
  const bool is_valid = length >= 0 && length <= sequence.length;
  Expect("tenon_sequence_truncate",
         is_valid ? TENON_OK : TENON_INVALID_ARGUMENT, [&](tenon_error* error) {
           return tenon_sequence_truncate(s.handle, sequence.handle, length,
                                          error);
         });
  if (is_valid) s.Truncate(index, length);
}

void World::Release(SessionOracle& s, size_t index) {
  const tenon_sequence handle = s.sequences()[index].handle;
  Expect("tenon_sequence_release", TENON_OK, [&](tenon_error* error) {
    return tenon_sequence_release(s.handle, handle, error);
  });
  Expect("tenon_sequence_release", TENON_NOT_FOUND, [&](tenon_error* error) {
    return tenon_sequence_release(s.handle, handle, error);
  });
  stale_handles_.push_back(handle);
  s.sequences().erase(s.sequences().begin() + static_cast<ptrdiff_t>(index));
}

void World::ReleaseSequence() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  if (!s.sequences().empty()) Release(s, in_.Below(s.sequences().size()));
}

void World::CheckState(SessionOracle& s) {
  auto info = Zeroed<tenon_session_info>();
  Expect("tenon_session_query", TENON_OK, [&](tenon_error* error) {
    return tenon_session_query(s.handle, &info, error);
  });
  if (info.num_sequences != static_cast<int32_t>(s.sequences().size()) ||
      info.num_free_pages != s.num_free_pages() ||
      info.num_steps != s.num_steps || info.num_tokens != s.num_tokens) {
    Fail("a session has " + std::to_string(info.num_sequences) +
         " sequences, " + std::to_string(info.num_free_pages) +
         " free pages, " + std::to_string(info.num_steps) + " steps, " +
         std::to_string(info.num_tokens) + " tokens; expected " +
         std::to_string(s.sequences().size()) + ", " +
         std::to_string(s.num_free_pages()) + ", " +
         std::to_string(s.num_steps) + ", " + std::to_string(s.num_tokens));
  }
  for (const SessionOracle::Sequence& sequence : s.sequences()) {
    int32_t length = -1;
    Expect("tenon_sequence_length", TENON_OK, [&](tenon_error* error) {
      return tenon_sequence_length(s.handle, sequence.handle, &length, error);
    });
    if (length != sequence.length) {
      Fail("a sequence has " + std::to_string(length) + " tokens, expected " +
           std::to_string(sequence.length));
    }
  }
}

void World::CheckState() {
  for (SessionOracle& s : sessions_) CheckState(s);
}

}  // namespace tenon::fuzz
