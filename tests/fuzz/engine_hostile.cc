#include "tests/abi/moe_kernels_json.h"
#include "tests/fuzz/engine_world.h"

// Handles that name nothing, absurd options, and objects beside sessions.

namespace tenon::fuzz {
namespace {

float AnyFloat(Input& in) {
  using Limits = std::numeric_limits<float>;
  return in.Pick<float>({-1.0f, 2.0f, Limits::quiet_NaN(), Limits::infinity(),
                         -Limits::infinity(), Limits::max(),
                         Limits::denorm_min(), 0.0f, -0.0f});
}

}  // namespace

void World::CreateHostileSession() {
  auto options = Zeroed<tenon_session_options>();
  options.num_threads = 1;
  options.max_sequences = options.max_tokens = options.max_context = 2;
  switch (in_.Below(9)) {
    case 0:
      options.struct_size = static_cast<uint32_t>(
          in_.Pick<uint64_t>({0, 1, 7, 8, 4097, 0xffffffffu}));
      break;
    case 1:
      options.flags = in_.Pick<uint32_t>({16, 0x80000000u, ~0u});
      break;
    case 2:
      options.max_sequences = in_.Pick<int32_t>({-1, kInt32Min, kInt32Max});
      break;
    case 3:
      options.max_tokens = in_.Pick<int32_t>({-1, kInt32Min, kInt32Max});
      break;
    case 4:
      options.max_context = in_.Pick<int32_t>({-1, 65, kInt32Max});
      break;
    case 5:
      options.page_size = in_.Pick<int32_t>({-1, 65537, kInt32Max});
      break;
    case 6:
      options.moe_kernels_json = in_.Pick<const char*>({"", "{}", "[]"});
      break;
    case 7:  // too many, or more than the machine has
      options.num_pages =
          in_.Pick<int64_t>({-1, 1 << 30, int64_t{1} << 31, int64_t{1} << 62,
                             std::numeric_limits<int64_t>::min()});
      break;
    default:
      options.num_threads = in_.Pick<int32_t>({-1, 4097, kInt32Max});
  }
  tenon_session handle = 77;
  ExpectFailure("tenon_session_create", [&](tenon_error* error) {
    return tenon_session_create(model_, &options, &handle, error);
  });
  if (handle != 77) Fail("a failed call wrote a session");
}

uint64_t World::HostileHandle() {
  switch (in_.Below(4)) {
    case 0:
      return stale_handles_.empty() ? 1 : in_.PickFrom(stale_handles_);
    case 1:
      return model_;  // another kind
    case 2:
      return in_.Pick<uint64_t>({1, ~uint64_t{0}, uint64_t{1} << 20});
    default:
      return in_.Bits() | uint64_t{1} << 63;
  }
}

tenon_sequence World::HostileSequence(const SessionOracle& s) {
  for (SessionOracle& other : sessions_) {
    if (other.handle == s.handle || other.sequences().empty()) continue;
    if (in_.OneIn(2)) return in_.PickFrom(other.sequences()).handle;
  }
  return in_.OneIn(4) ? 0 : HostileHandle();
}

void World::CallWithHostileHandle() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  const bool bad_session = in_.OneIn(2);
  const tenon_session session = bad_session ? HostileHandle() : s.handle;
  const SessionOracle::Sequence* good = AnySequence(s);
  const tenon_sequence sequence =
      bad_session && good != nullptr ? good->handle : HostileSequence(s);
  uint64_t result = 77;
  int32_t length = 77;
  switch (in_.Below(6)) {
    case 0:
      Expect("tenon_sequence_fork", TENON_NOT_FOUND, [&](tenon_error* error) {
        return tenon_sequence_fork(session, sequence, &result, error);
      });
      break;
    case 1:
      Expect("tenon_sequence_truncate", TENON_NOT_FOUND,
             [&](tenon_error* error) {
               return tenon_sequence_truncate(session, sequence, 0, error);
             });
      break;
    case 2:
      Expect("tenon_sequence_length", TENON_NOT_FOUND, [&](tenon_error* error) {
        return tenon_sequence_length(session, sequence, &length, error);
      });
      break;
    case 3:
      Expect("tenon_sequence_release", TENON_NOT_FOUND,
             [&](tenon_error* error) {
               return tenon_sequence_release(session, sequence, error);
             });
      break;
    case 4:
      CallWithNull(s, good);
      break;
    default:
      CallWithHostileSession(&result);
  }
  if (result != 77 || length != 77) Fail("a failed call wrote a result");
}

void World::CallWithNull(SessionOracle& s,
                         const SessionOracle::Sequence* good) {
  switch (in_.Below(4)) {
    case 0:
      return Expect("tenon_sequence_create", TENON_INVALID_ARGUMENT,
                    [&](tenon_error* error) {
                      return tenon_sequence_create(s.handle, nullptr, error);
                    });
    case 1:
      return Expect("tenon_session_query", TENON_INVALID_ARGUMENT,
                    [&](tenon_error* error) {
                      return tenon_session_query(s.handle, nullptr, error);
                    });
    case 2:
      return Expect("tenon_session_create", TENON_INVALID_ARGUMENT,
                    [&](tenon_error* error) {
                      return tenon_session_create(model_, nullptr, nullptr,
                                                  error);
                    });
    default:
      if (good == nullptr) return;
      Expect("tenon_sequence_length", TENON_INVALID_ARGUMENT,
             [&](tenon_error* error) {
               return tenon_sequence_length(s.handle, good->handle, nullptr,
                                            error);
             });
  }
}

void World::CallWithHostileSession(uint64_t* result) {
  const uint64_t hostile = HostileHandle();
  auto info = Zeroed<tenon_session_info>();
  switch (in_.Below(5)) {
    case 0:
      return Expect("tenon_session_destroy", TENON_NOT_FOUND,
                    [&](tenon_error* error) {
                      return tenon_session_destroy(hostile, error);
                    });
    case 1:
      return Expect("tenon_session_query", TENON_NOT_FOUND,
                    [&](tenon_error* error) {
                      return tenon_session_query(hostile, &info, error);
                    });
    case 2:
      return Expect("tenon_sequence_create", TENON_NOT_FOUND,
                    [&](tenon_error* error) {
                      return tenon_sequence_create(hostile, result, error);
                    });
    case 3:
      return Expect("tenon_session_destroy", TENON_OK, [&](tenon_error* error) {
        return tenon_session_destroy(0, error);
      });
    default:  // a session is no model
      return Expect("tenon_session_create", TENON_NOT_FOUND,
                    [&](tenon_error* error) {
                      return tenon_session_create(sessions_[0].handle, nullptr,
                                                  result, error);
                    });
  }
}

void World::CallObjects() {
  switch (in_.Below(9)) {
    case 0:
      return CallContext();
    case 1: {
      tenon_sampling_params params = Sampling(in_);
      const bool is_hostile = in_.OneIn(2);
      if (is_hostile) MakeHostile(&params);
      const int32_t code =
          Call("tenon_sampling_params_validate", is_hostile,
               [&](tenon_error* error) {
                 return tenon_sampling_params_validate(&params, error);
               });
      if (!is_hostile && code != TENON_OK) Fail(last_message_);
      return;
    }
    case 2: {
      Array<uint8_t> memory(
          in_.Pick<uint64_t>({0, 1, 4, 127, sizeof(tenon_sampling_params)}));
      return Expect(
          "tenon_sampling_params_init", TENON_OK, [&](tenon_error* error) {
            return tenon_sampling_params_init(
                reinterpret_cast<tenon_sampling_params*>(memory.get()),
                memory.size(), error);
          });
    }
    case 3: {
      int32_t count = 77;
      const int32_t type = AnyInt(in_);
      const int32_t code =
          Call("tenon_device_count", true, [&](tenon_error* error) {
            return tenon_device_count(type, &count, error);
          });
      if ((code == TENON_OK) != (count != 77)) Fail("device_count");
      return;
    }
    case 4: {
      auto info = Zeroed<tenon_device_info>();
      info.struct_size = static_cast<uint32_t>(
          in_.Pick<uint64_t>({0, 7, sizeof(info), 0xffffffffu}));
      const bool is_valid = info.struct_size == sizeof(info);
      const int32_t code =
          Call("tenon_device_query", !is_valid, [&](tenon_error* error) {
            return tenon_device_query(TENON_DEVICE_CPU, 0, &info, error);
          });
      if ((code == TENON_OK) != is_valid) Fail("device_query");
      return;
    }
    case 5:
      return CallModel();
    case 6:
      return LoadModel();
    case 7:
      return QueryObjects();
    default:
      if (std::strlen(tenon_status_name(AnyInt(in_))) == 0) Fail("no name");
  }
}

void World::CallContext() {
  auto options = Zeroed<tenon_context_options>();
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 1;
  const uint64_t hostile = in_.Below(6);
  if (hostile == 1) options.device_type = in_.Pick<int32_t>({0, 2, 3, -1});
  if (hostile == 2) options.device_index = in_.Pick<int32_t>({1, -1});
  if (hostile == 3) options.num_threads = in_.Pick<int32_t>({-1, kInt32Max});
  if (hostile == 4) options.cublas_lt = in_.Pick<int32_t>({1, 2, 3, -1});
  if (hostile == 5) options.reserved = 1;
  tenon_context context = 0;
  const auto create = [&](tenon_error* error) {
    return tenon_context_create(&options, &context, error);
  };
  if (hostile != 0) {
    ExpectFailure("tenon_context_create", create);
    if (context != 0) Fail("a failed call wrote a context");
    return;
  }
  Expect("tenon_context_create", TENON_OK, create);
  const auto set_kernels = [&](const char* json, int32_t code) {
    Expect("tenon_context_set_moe_kernels", code, [&](tenon_error* error) {
      return tenon_context_set_moe_kernels(context, json, error);
    });
  };
  set_kernels(in_.Pick<const char*>({nullptr, "", "{}", "{\"a\": 1"}),
              TENON_INVALID_ARGUMENT);
  if (in_.OneIn(2)) {
    set_kernels(testing::kMoeKernelsJson, TENON_OK);
    set_kernels(testing::kMoeKernelsJson, TENON_FAILED_PRECONDITION);
  }
  const auto destroy = [&](tenon_error* error) {
    return tenon_context_destroy(context, error);
  };
  Expect("tenon_context_destroy", TENON_OK, destroy);
  Expect("tenon_context_destroy", TENON_NOT_FOUND, destroy);
  stale_handles_.push_back(context);
}

void World::CallModel() {
  auto args = Zeroed<tenon_model_random_args>();
  args.device_type = TENON_DEVICE_CPU;
  args.dtype = TENON_DTYPE_FLOAT32;
  std::string config = kConfig;
  args.config_json = config.c_str();
  switch (in_.Below(5)) {
    case 0:
      args.dtype = in_.Pick<int32_t>({0, 4, -1, kInt32Max});
      break;
    case 1:
      args.rank = in_.Pick<int32_t>({1, -1, kInt32Max});
      break;
    case 2:
      args.world_size = in_.Pick<int32_t>({-1, 3, kInt32Max});
      break;
    case 3:
      config.resize(in_.Below(config.size()));
      break;
    default:
      args.config_json = nullptr;
  }
  tenon_model model = 77;
  ExpectFailure("tenon_model_create_random", [&](tenon_error* error) {
    return tenon_model_create_random(&args, &model, error);
  });
  if (model != 77) Fail("a failed call wrote a model");
  const uint64_t hostile =
      stale_handles_.empty() ? 1 : in_.PickFrom(stale_handles_);
  Expect("tenon_model_destroy", TENON_NOT_FOUND, [&](tenon_error* error) {
    return tenon_model_destroy(hostile, error);
  });
}

void World::LoadModel() {
  auto args = Zeroed<tenon_model_load_args>();
  args.device_type = TENON_DEVICE_CPU;
  args.directory =
      in_.Pick<const char*>({nullptr, "", "/", "/dev/null", "\xff"});
  const uint64_t kind = in_.Below(4);
  if (kind == 0) args.struct_size = static_cast<uint32_t>(in_.Below(8));
  if (kind == 1) args.device_type = AnyInt(in_);
  if (kind == 2) args.world_size = AnyInt(in_);
  tenon_model model = 77;
  ExpectFailure("tenon_model_load", [&](tenon_error* error) {
    return tenon_model_load(in_.OneIn(16) ? nullptr : &args, &model, error);
  });
  if (model != 77) Fail("a failed call wrote a model");
}

// Of a good model and of handles of another kind, into structs of any size.
void World::QueryObjects() {
  const uint64_t session = sessions_.empty() ? 1 : sessions_[0].handle;
  auto context_info = Zeroed<tenon_context_info>();
  Expect("tenon_context_query", TENON_NOT_FOUND, [&](tenon_error* error) {
    return tenon_context_query(session, &context_info, error);
  });
  auto info = Zeroed<tenon_model_info>();
  Expect("tenon_model_query", TENON_NOT_FOUND, [&](tenon_error* error) {
    return tenon_model_query(session, &info, error);
  });
  const uint32_t size = static_cast<uint32_t>(in_.Pick<uint64_t>(
      {4, 8, sizeof(info) - 1, sizeof(info), sizeof(info) + 24}));
  Array<uint8_t> memory(size);
  std::memcpy(memory.get(), &size, sizeof(size));
  const int32_t code =
      Call("tenon_model_query", size < sizeof(info), [&](tenon_error* error) {
        return tenon_model_query(
            model_, reinterpret_cast<tenon_model_info*>(memory.get()), error);
      });
  if (size >= sizeof(info) && code != TENON_OK) Fail(last_message_);
}

void World::MakeHostile(tenon_sampling_params* params) {
  switch (in_.Below(5)) {
    case 0:
      params->temperature = AnyFloat(in_);
      break;
    case 1:
      params->top_k = in_.Pick<int32_t>({-2, kInt32Min});
      break;
    case 2:
      params->top_p = AnyFloat(in_);
      break;
    case 3:
      params->min_p = AnyFloat(in_);
      break;
    default:
      params->filter_order = in_.Pick<int32_t>({2, -1, kInt32Max});
  }
}

}  // namespace tenon::fuzz
