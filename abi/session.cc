#include "abi/session.h"

#include <algorithm>
#include <utility>

#include "abi/call.h"
#include "abi/handles.h"
#include "abi/model.h"
#include "abi/op_call.h"

namespace tenon::abi {
namespace {

Status ReadOptions(const tenon_session_options* from, const ModelConfig& config,
                   SessionOptions* options) {
  tenon_session_options o = {};
  if (from != nullptr) TENON_RETURN_IF_ERROR(ReadStruct("options", from, &o));
  TENON_RETURN_IF_ERROR(CheckFlags(
      "options.flags", o.flags,
      TENON_SESSION_BATCH_INVARIANT | TENON_SESSION_COUNT_EXPERTS |
          TENON_SESSION_NO_CUDA_GRAPHS | TENON_SESSION_LOGIT_BITMASKS));
  TENON_RETURN_IF_ERROR(CheckReserved("options.reserved", o.reserved));
  options->batch_invariant = (o.flags & TENON_SESSION_BATCH_INVARIANT) != 0;
  options->count_experts = (o.flags & TENON_SESSION_COUNT_EXPERTS) != 0;
  options->cuda_graphs = (o.flags & TENON_SESSION_NO_CUDA_GRAPHS) == 0;
  options->logit_bitmasks = (o.flags & TENON_SESSION_LOGIT_BITMASKS) != 0;
  options->max_logit_edits = o.max_logit_edits;
  options->max_top_logprobs = o.max_top_logprobs;
  if (o.kv_cache_dtype == TENON_KV_CACHE_FLOAT8_E4M3) {
    options->kv_cache_dtype = DType::kFloat8E4M3;
  } else if (o.kv_cache_dtype != TENON_KV_CACHE_MODEL_DTYPE) {
    return InvalidArgumentError("options.kv_cache_dtype is ", o.kv_cache_dtype,
                                ", expected 0 or 1");
  }
  options->kv_cache_k_scale = ZeroMeansOne(o.kv_cache_k_scale);
  options->kv_cache_v_scale = ZeroMeansOne(o.kv_cache_v_scale);
  if (o.max_sequences != 0) options->max_sequences = o.max_sequences;
  if (o.max_tokens != 0) options->max_tokens = o.max_tokens;
  options->max_context =
      o.max_context != 0
          ? o.max_context
          : std::min(options->max_context, config.max_position_embeddings);
  if (o.page_size != 0) options->page_size = o.page_size;
  options->num_pages = o.num_pages;
  options->kv_cache_bytes = o.kv_cache_bytes;
  options->max_logit_rows = o.max_logit_rows;
  options->num_threads = o.num_threads;
  if (o.moe_kernels_json == nullptr) return Status();
  StatusOr<MoeKernelFile> file =
      ParseMoeKernelFile(o.moe_kernels_json, "options.moe_kernels_json");
  TENON_RETURN_IF_ERROR(file.status());
  options->moe_kernels =
      std::make_shared<const MoeKernelFile>(*std::move(file));
  return Status();
}

// What steps work with, so that they need no memory.
void ReserveForSteps(SessionObject* s) {
  const auto max_sequences =
      static_cast<size_t>(s->session->options().max_sequences);
  s->sequences.resize(max_sequences);
  s->rows.reserve(max_sequences);
  s->results.reserve(max_sequences);
  s->stats.distinct_experts.reserve(
      static_cast<size_t>(s->session->model().config.num_layers));
}

Status CreateSession(tenon_model model_handle,
                     const tenon_session_options* from, tenon_session* handle) {
  TENON_RETURN_IF_ERROR(CheckPresent("session", handle));
  Pin<ModelObject> model;
  TENON_RETURN_IF_ERROR(PinHandle("model", model_handle, &model));
  SessionOptions options;
  TENON_RETURN_IF_ERROR(ReadOptions(from, model->model->config, &options));
  StatusOr<std::unique_ptr<Session>> session =
      Session::Create(model->model, options);
  TENON_RETURN_IF_ERROR(session.status());
  auto object = std::make_unique<SessionObject>();
  object->session = *std::move(session);
  ReserveForSteps(object.get());
  const StatusOr<uint64_t> added = AddHandle(std::move(object));
  TENON_RETURN_IF_ERROR(added.status());
  *handle = *added;
  return Status();
}

Status QuerySession(tenon_session handle, tenon_session_info* to) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(handle));
  const SessionOptions& options = s->session->options();
  tenon_session_info info = {};
  if (options.batch_invariant) info.flags |= TENON_SESSION_BATCH_INVARIANT;
  if (options.count_experts) info.flags |= TENON_SESSION_COUNT_EXPERTS;
  if (!options.cuda_graphs) info.flags |= TENON_SESSION_NO_CUDA_GRAPHS;
  if (options.logit_bitmasks) info.flags |= TENON_SESSION_LOGIT_BITMASKS;
  info.max_sequences = options.max_sequences;
  info.max_tokens = options.max_tokens;
  info.max_context = options.max_context;
  info.page_size = options.page_size;
  info.num_pages = options.num_pages;
  info.max_logit_rows = options.max_logit_rows;
  info.num_sequences = s->session->num_sequences();
  info.num_free_pages = s->session->num_free_pages();
  info.num_steps = s->num_steps;
  info.num_tokens = s->num_tokens;
  info.kv_cache_bytes = s->session->kv_cache_bytes();
  info.kv_cache_dtype = options.kv_cache_dtype == DType::kFloat8E4M3
                            ? TENON_KV_CACHE_FLOAT8_E4M3
                            : TENON_KV_CACHE_MODEL_DTYPE;
  info.max_logit_edits = options.max_logit_edits;
  info.max_top_logprobs = options.max_top_logprobs;
  info.num_cuda_graphs = static_cast<int32_t>(s->session->num_graphs());
  info.cuda_graph_bytes = s->session->graph_bytes();
  info.num_steps_in_flight = s->session->num_steps_in_flight();
  return WriteStruct("info", info, to);
}

// A tenon_sequence is serial << 20 | slot: a session has at most 2^20
// sequences. Serials are the process's, so that one of another session is
// recognised.
constexpr int kSlotBits = 20;

// Gives a new sequence its handle.
tenon_sequence NameSequence(SessionObject* s, SequenceId id) {
  const tenon_sequence handle = NextSerial() << kSlotBits | id.slot;
  s->sequences[id.slot] = {handle, id};
  return handle;
}

Status CreateSequence(tenon_session session, tenon_sequence* handle) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  TENON_RETURN_IF_ERROR(CheckPresent("sequence", handle));
  const StatusOr<SequenceId> id = s->session->CreateSequence();
  TENON_RETURN_IF_ERROR(id.status());
  *handle = NameSequence(&*s, *id);
  return Status();
}

Status ForkSequence(tenon_session session, tenon_sequence sequence,
                    tenon_sequence* fork) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  const SessionObject::Sequence* parent = FindSequence(&*s, sequence);
  if (parent == nullptr) return NoSequenceError("", sequence);
  TENON_RETURN_IF_ERROR(CheckPresent("fork", fork));
  const StatusOr<SequenceId> id = s->session->ForkSequence(parent->id);
  TENON_RETURN_IF_ERROR(id.status());
  *fork = NameSequence(&*s, *id);
  return Status();
}

Status TruncateSequence(tenon_session session, tenon_sequence sequence,
                        int32_t num_tokens) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  const SessionObject::Sequence* found = FindSequence(&*s, sequence);
  if (found == nullptr) return NoSequenceError("", sequence);
  const StatusOr<int32_t> length = s->session->SequenceLength(found->id);
  TENON_RETURN_IF_ERROR(length.status());
  if (num_tokens < 0 || num_tokens > *length) {
    return InvalidArgumentError("num_tokens is ", num_tokens,
                                ", expected 0 to ", *length,
                                ", the sequence's length");
  }
  return s->session->TruncateSequence(found->id, num_tokens);
}

Status SequenceLength(tenon_session session, tenon_sequence sequence,
                      int32_t* num_tokens) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  const SessionObject::Sequence* found = FindSequence(&*s, sequence);
  if (found == nullptr) return NoSequenceError("", sequence);
  TENON_RETURN_IF_ERROR(CheckPresent("num_tokens", num_tokens));
  const StatusOr<int32_t> length = s->session->SequenceLength(found->id);
  TENON_RETURN_IF_ERROR(length.status());
  *num_tokens = *length;
  return Status();
}

Status ReleaseSequence(tenon_session session, tenon_sequence sequence) {
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  SessionObject::Sequence* found = FindSequence(&*s, sequence);
  if (found == nullptr) return NoSequenceError("", sequence);
  TENON_RETURN_IF_ERROR(s->session->ReleaseSequence(found->id));
  found->handle = 0;
  return Status();
}

}  // namespace

Status Turn::Begin(tenon_session session) {
  TENON_RETURN_IF_ERROR(PinHandle("session", session, &pin_));
  lock_ = std::unique_lock<std::mutex>(pin_->mutex);
  if (!pin_->session->is_broken()) return Status();
  return UnavailableError("session is ", session,
                          ", which an error of the device has left unable to "
                          "go on; destroy it");
}

SessionObject::Sequence* FindSequence(SessionObject* s,
                                      tenon_sequence sequence) {
  const uint64_t slot = sequence & ((uint64_t{1} << kSlotBits) - 1);
  if (sequence == 0 || slot >= s->sequences.size()) return nullptr;
  SessionObject::Sequence& found = s->sequences[slot];
  return found.handle == sequence ? &found : nullptr;
}

Status NoSequenceError(const char* row, tenon_sequence sequence) {
  return NotFoundError(row, "sequence is ", sequence,
                       ", which names no sequence of this session (any more)");
}

}  // namespace tenon::abi

using tenon::abi::Call;

int32_t tenon_session_create(tenon_model model,
                             const tenon_session_options* options,
                             tenon_session* session, tenon_error* error) {
  return Call(__func__, error, [&] {
    return tenon::abi::CreateSession(model, options, session);
  });
}

int32_t tenon_session_query(tenon_session session, tenon_session_info* info,
                            tenon_error* error) {
  return Call(__func__, error,
              [&] { return tenon::abi::QuerySession(session, info); });
}

int32_t tenon_session_destroy(tenon_session session, tenon_error* error) {
  return Call(__func__, error, [&] {
    return tenon::abi::DestroyHandle("session",
                                     tenon::abi::HandleKind::kSession, session);
  });
}

int32_t tenon_sequence_create(tenon_session session, tenon_sequence* sequence,
                              tenon_error* error) {
  return Call(__func__, error,
              [&] { return tenon::abi::CreateSequence(session, sequence); });
}

int32_t tenon_sequence_fork(tenon_session session, tenon_sequence sequence,
                            tenon_sequence* fork, tenon_error* error) {
  return Call(__func__, error, [&] {
    return tenon::abi::ForkSequence(session, sequence, fork);
  });
}

int32_t tenon_sequence_truncate(tenon_session session, tenon_sequence sequence,
                                int32_t num_tokens, tenon_error* error) {
  return Call(__func__, error, [&] {
    return tenon::abi::TruncateSequence(session, sequence, num_tokens);
  });
}

int32_t tenon_sequence_length(tenon_session session, tenon_sequence sequence,
                              int32_t* num_tokens, tenon_error* error) {
  return Call(__func__, error, [&] {
    return tenon::abi::SequenceLength(session, sequence, num_tokens);
  });
}

int32_t tenon_sequence_release(tenon_session session, tenon_sequence sequence,
                               tenon_error* error) {
  return Call(__func__, error,
              [&] { return tenon::abi::ReleaseSequence(session, sequence); });
}
