#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "abi/call.h"
#include "abi/session.h"

namespace tenon::abi {
namespace {

Status CheckArgs(const tenon_step_args& args, const SessionOptions& options) {
  if (args.num_rows < 0) {
    return InvalidArgumentError("num_rows is ", args.num_rows,
                                ", expected >= 0");
  }
  if (args.num_rows > options.max_sequences) {
    return ResourceExhaustedError("num_rows is ", args.num_rows,
                                  ", more than max_sequences ",
                                  options.max_sequences);
  }
  if (args.num_rows > 0) {
    TENON_RETURN_IF_ERROR(CheckPresent("rows", args.rows));
    TENON_RETURN_IF_ERROR(CheckPresent("tokens", args.tokens));
  }
  if (args.distinct_experts != nullptr && !options.count_experts) {
    return InvalidArgumentError(
        "distinct_experts is given, but the session was created without "
        "TENON_SESSION_COUNT_EXPERTS");
  }
  return Status();
}

Status ReadLogitsMode(int32_t code, LogitsMode* mode) {
  switch (code) {
    case TENON_LOGITS_NONE:
      *mode = LogitsMode::kNone;
      return Status();
    case TENON_LOGITS_LAST:
      *mode = LogitsMode::kLast;
      return Status();
    case TENON_LOGITS_ALL:
      *mode = LogitsMode::kAll;
      return Status();
    default:
      return InvalidArgumentError(".logits_mode is ", code,
                                  ", expected 0 to 2");
  }
}

// What a row has since ABI 1.3. Values are checked by the session.
Status ReadEdits(const tenon_step_row& row, StepRow* to) {
  TENON_RETURN_IF_ERROR(CheckReserved(".reserved1", row.reserved1));
  if (reinterpret_cast<uintptr_t>(row.edits) % alignof(LogitEdit) != 0) {
    return InvalidArgumentError(".edits is not aligned to ", alignof(LogitEdit),
                                " bytes");
  }
  if (row.sampling->num_top_logprobs > 0) {
    TENON_RETURN_IF_ERROR(CheckPresent(".top_tokens", row.top_tokens));
    TENON_RETURN_IF_ERROR(CheckPresent(".top_logprobs", row.top_logprobs));
  }
  // One layout; see sampler.cc.
  to->edits = reinterpret_cast<const LogitEdit*>(row.edits);
  to->num_edits = row.num_edits;
  to->bitmask = row.bitmask;
  return Status();
}

// Errors begin with what follows the row's name.
Status ReadRow(const void* from, uint32_t struct_size, SessionObject* s,
               StepRow* to) {
  // Before the row is read: a longer one would reach past the array.
  uint32_t own_size;
  std::memcpy(&own_size, from, sizeof(own_size));
  if (own_size != struct_size) {
    return InvalidArgumentError(".struct_size is ", own_size, ", expected ",
                                struct_size, " as in rows[0]");
  }
  tenon_step_row row;
  TENON_RETURN_IF_ERROR(
      ReadStruct("", static_cast<const tenon_step_row*>(from), &row));
  TENON_RETURN_IF_ERROR(CheckReserved(".reserved", row.reserved));
  TENON_RETURN_IF_ERROR(ReadLogitsMode(row.logits_mode, &to->logits_mode));
  const SessionObject::Sequence* sequence = FindSequence(s, row.sequence);
  if (sequence == nullptr) return NoSequenceError(".", row.sequence);
  to->sequence = sequence->id;
  to->tokens = row.tokens;
  to->num_tokens = row.num_tokens;
  to->logits = row.logits;
  to->sample = row.sampling != nullptr;
  if (to->sample) {
    TENON_RETURN_IF_ERROR(ReadEdits(row, to));
    // One layout; see sampler.cc. Values are checked by the session.
    static_assert(sizeof(to->sampling) == sizeof(*row.sampling));
    std::memcpy(static_cast<void*>(&to->sampling), row.sampling,
                sizeof(to->sampling));
  }
  return Status();
}

Status ReadRows(const tenon_step_args& args, SessionObject* s) {
  s->rows.clear();
  // As the caller's rows are, which need not be as long as ours.
  uint32_t struct_size = 0;
  if (args.num_rows > 0) {
    std::memcpy(&struct_size, args.rows, sizeof(struct_size));
  }
  const char* from = reinterpret_cast<const char*>(args.rows);
  for (int32_t i = 0; i < args.num_rows; ++i, from += struct_size) {
    const Status status =
        ReadRow(from, struct_size, s, &s->rows.emplace_back());
    if (!status.ok()) {
      return Status(status.code(), StrCat("rows[", i, "]", status.message()));
    }
  }
  return Status();
}

void WriteDistinctExperts(const SessionObject& s, int32_t* to) {
  const ModelConfig& config = s.session->model().config;
  const int32_t* count = s.stats.distinct_experts.data();
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    to[layer] = config.IsMoeLayer(layer) ? *count++ : 0;
  }
}

void WriteTop(const StepRowResult& result, int32_t count, int32_t* tokens,
              float* logprobs) {
  for (int32_t i = 0; i < count; ++i) {
    const bool is_there = i < result.num_top;
    tokens[i] = is_there ? result.top_tokens[i] : -1;
    logprobs[i] = is_there ? result.top_logprobs[i]
                           : std::numeric_limits<float>::quiet_NaN();
  }
}

void WriteResults(const SessionObject& s, const tenon_step_args& args) {
  const char* rows = reinterpret_cast<const char*>(args.rows);
  for (size_t i = 0; i < s.results.size(); ++i) {
    const StepRowResult& result = s.results[i];
    args.tokens[i] = result.token;
    if (args.logprobs != nullptr) args.logprobs[i] = result.logprob;
    if (args.statuses != nullptr) {
      args.statuses[i] = static_cast<int32_t>(result.status);
    }
    const int32_t num_top =
        s.rows[i].sample ? s.rows[i].sampling.num_top_logprobs : 0;
    if (num_top == 0) continue;
    tenon_step_row row;  // its size has been checked
    uint32_t row_size;
    std::memcpy(&row_size, rows, sizeof(row_size));
    std::memcpy(&row, rows + i * row_size,
                std::min<size_t>(row_size, sizeof(row)));
    WriteTop(result, num_top, row.top_tokens, row.top_logprobs);
  }
  if (args.distinct_experts != nullptr) {
    WriteDistinctExperts(s, args.distinct_experts);
  }
}

Status Step(tenon_session session, const tenon_step_args* from) {
  tenon_step_args args;
  TENON_RETURN_IF_ERROR(ReadStruct("args", from, &args));
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  const auto begin = std::chrono::steady_clock::now();
  TENON_RETURN_IF_ERROR(CheckArgs(args, s->session->options()));
  TENON_RETURN_IF_ERROR(ReadRows(args, &*s));
  StepStats* stats = args.distinct_experts != nullptr ? &s->stats : nullptr;
  TENON_RETURN_IF_ERROR(s->session->Step(s->rows, &s->results, stats));
  ++s->num_steps;
  for (const StepRow& row : s->rows) s->num_tokens += row.num_tokens;
  WriteResults(*s, args);
  if (args.microseconds != nullptr) {
    *args.microseconds = std::chrono::duration<double, std::micro>(
                             std::chrono::steady_clock::now() - begin)
                             .count();
  }
  return Status();
}

}  // namespace
}  // namespace tenon::abi

int32_t tenon_session_step(tenon_session session, const tenon_step_args* args,
                           tenon_error* error) {
  return tenon::abi::Call(__func__, error,
                          [&] { return tenon::abi::Step(session, args); });
}
