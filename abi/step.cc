#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "abi/call.h"
#include "abi/op_call.h"
#include "abi/session.h"

namespace tenon::abi {
namespace {

Status CheckDistinctExperts(const int32_t* to, const SessionOptions& options) {
  if (to == nullptr || options.count_experts) return Status();
  return InvalidArgumentError(
      "distinct_experts is given, but the session was created without "
      "TENON_SESSION_COUNT_EXPERTS");
}

Status CheckRows(const tenon_step_args& args, const SessionOptions& options) {
  if (args.num_rows < 0) {
    return InvalidArgumentError("num_rows is ", args.num_rows,
                                ", expected >= 0");
  }
  if (args.num_rows > options.max_sequences) {
    return ResourceExhaustedError("num_rows is ", args.num_rows,
                                  ", more than max_sequences ",
                                  options.max_sequences);
  }
  return args.num_rows > 0 ? CheckPresent("rows", args.rows) : Status();
}

// Of a step that is enqueued: its results come later.
Status CheckNoOutput(const char* name, const void* pointer) {
  if (pointer == nullptr) return Status();
  return InvalidArgumentError(
      name, " is given, but tenon_session_wait_step has the results");
}

Status CheckNoOutputs(const tenon_step_args& args) {
  TENON_RETURN_IF_ERROR(CheckNoOutput("tokens", args.tokens));
  TENON_RETURN_IF_ERROR(CheckNoOutput("logprobs", args.logprobs));
  TENON_RETURN_IF_ERROR(CheckNoOutput("statuses", args.statuses));
  TENON_RETURN_IF_ERROR(
      CheckNoOutput("distinct_experts", args.distinct_experts));
  TENON_RETURN_IF_ERROR(CheckNoOutput("microseconds", args.microseconds));
  return CheckNoOutput("mirostat_mu", args.mirostat_mu);
}

// What comes of the rows' best tokens.
enum class TopOutputs { kOfRows, kLater };

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

Status CheckTopOutputs(const tenon_step_row& row, TopOutputs outputs) {
  if (outputs == TopOutputs::kLater) {
    TENON_RETURN_IF_ERROR(CheckNoOutput(".top_tokens", row.top_tokens));
    return CheckNoOutput(".top_logprobs", row.top_logprobs);
  }
  if (row.sampling == nullptr || row.sampling->num_top_logprobs <= 0) {
    return Status();
  }
  TENON_RETURN_IF_ERROR(CheckPresent(".top_tokens", row.top_tokens));
  return CheckPresent(".top_logprobs", row.top_logprobs);
}

// What a row has since ABI 1.3. Values are checked by the session.
Status ReadEdits(const tenon_step_row& row, StepRow* to) {
  TENON_RETURN_IF_ERROR(CheckReserved(".reserved1", row.reserved1));
  if (reinterpret_cast<uintptr_t>(row.edits) % alignof(LogitEdit) != 0) {
    return InvalidArgumentError(".edits is not aligned to ", alignof(LogitEdit),
                                " bytes");
  }
  // One layout; see sampler.cc.
  to->edits = reinterpret_cast<const LogitEdit*>(row.edits);
  to->num_edits = row.num_edits;
  to->bitmask = row.bitmask;
  return Status();
}

// Errors begin with what follows the row's name.
Status ReadRow(const void* from, uint32_t struct_size, TopOutputs outputs,
               SessionObject* s, StepRow* to) {
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
  TENON_RETURN_IF_ERROR(CheckFlags(".flags", row.flags, TENON_ROW_CONTINUES));
  TENON_RETURN_IF_ERROR(CheckTopOutputs(row, outputs));
  TENON_RETURN_IF_ERROR(ReadLogitsMode(row.logits_mode, &to->logits_mode));
  const SessionObject::Sequence* sequence = FindSequence(s, row.sequence);
  if (sequence == nullptr) return NoSequenceError(".", row.sequence);
  to->sequence = sequence->id;
  to->tokens = row.tokens;
  to->num_tokens = row.num_tokens;
  to->continues = (row.flags & TENON_ROW_CONTINUES) != 0;
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

Status ReadRows(const tenon_step_args& args, TopOutputs outputs,
                SessionObject* s) {
  s->rows.clear();
  // As the caller's rows are, which need not be as long as ours.
  uint32_t struct_size = 0;
  if (args.num_rows > 0) {
    std::memcpy(&struct_size, args.rows, sizeof(struct_size));
  }
  const char* from = reinterpret_cast<const char*>(args.rows);
  for (int32_t i = 0; i < args.num_rows; ++i, from += struct_size) {
    const Status status =
        ReadRow(from, struct_size, outputs, s, &s->rows.emplace_back());
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

// Either may be null.
void WriteTop(const StepRowResult& result, int32_t count, int32_t* tokens,
              float* logprobs) {
  for (int32_t i = 0; i < count; ++i) {
    const bool is_there = i < result.num_top;
    if (tokens != nullptr) tokens[i] = is_there ? result.top_tokens[i] : -1;
    if (logprobs == nullptr) continue;
    logprobs[i] = is_there ? result.top_logprobs[i]
                           : std::numeric_limits<float>::quiet_NaN();
  }
}

// What tenon_step_args and tenon_step_results have in common.
template <class Outputs>
void WriteResults(const SessionObject& s, const Outputs& to) {
  for (size_t i = 0; i < s.results.size(); ++i) {
    const StepRowResult& result = s.results[i];
    to.tokens[i] = result.token;
    if (to.logprobs != nullptr) to.logprobs[i] = result.logprob;
    if (to.statuses != nullptr) {
      to.statuses[i] = static_cast<int32_t>(result.status);
    }
    if (to.mirostat_mu != nullptr) to.mirostat_mu[i] = result.mirostat_mu;
  }
  if (to.distinct_experts != nullptr) {
    WriteDistinctExperts(s, to.distinct_experts);
  }
}

void WriteTopOfRows(const SessionObject& s, const tenon_step_args& args) {
  const char* rows = reinterpret_cast<const char*>(args.rows);
  for (size_t i = 0; i < s.results.size(); ++i) {
    const int32_t num_top =
        s.rows[i].sample ? s.rows[i].sampling.num_top_logprobs : 0;
    if (num_top == 0) continue;
    tenon_step_row row;  // its size has been checked
    uint32_t row_size;
    std::memcpy(&row_size, rows, sizeof(row_size));
    std::memcpy(&row, rows + i * row_size,
                std::min<size_t>(row_size, sizeof(row)));
    WriteTop(s.results[i], num_top, row.top_tokens, row.top_logprobs);
  }
}

Status Step(tenon_session session, const tenon_step_args* from) {
  tenon_step_args args;
  TENON_RETURN_IF_ERROR(ReadStruct("args", from, &args));
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  const auto begin = std::chrono::steady_clock::now();
  const SessionOptions& options = s->session->options();
  TENON_RETURN_IF_ERROR(CheckRows(args, options));
  if (args.num_rows > 0) {
    TENON_RETURN_IF_ERROR(CheckPresent("tokens", args.tokens));
  }
  TENON_RETURN_IF_ERROR(CheckDistinctExperts(args.distinct_experts, options));
  if (s->session->num_steps_in_flight() > 0) {
    return FailedPreconditionError(
        "num_steps_in_flight is ", s->session->num_steps_in_flight(),
        ", expected 0: tenon_session_wait_step must end them first");
  }
  TENON_RETURN_IF_ERROR(ReadRows(args, TopOutputs::kOfRows, &*s));
  StepStats* stats = args.distinct_experts != nullptr ? &s->stats : nullptr;
  TENON_RETURN_IF_ERROR(s->session->Step(s->rows, &s->results, stats));
  ++s->num_steps;
  for (const StepRow& row : s->rows) s->num_tokens += row.num_tokens;
  WriteResults(*s, args);
  WriteTopOfRows(*s, args);
  if (args.microseconds != nullptr) {
    *args.microseconds = std::chrono::duration<double, std::micro>(
                             std::chrono::steady_clock::now() - begin)
                             .count();
  }
  return Status();
}

Status EnqueueStep(tenon_session session, const tenon_step_args* from) {
  tenon_step_args args;
  TENON_RETURN_IF_ERROR(ReadStruct("args", from, &args));
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  TENON_RETURN_IF_ERROR(CheckRows(args, s->session->options()));
  TENON_RETURN_IF_ERROR(CheckNoOutputs(args));
  const int32_t in_flight = s->session->num_steps_in_flight();
  if (in_flight == TENON_MAX_STEPS_IN_FLIGHT) {
    return FailedPreconditionError(
        "num_steps_in_flight is ", in_flight,
        ", the most there can be: tenon_session_wait_step ends the first");
  }
  TENON_RETURN_IF_ERROR(ReadRows(args, TopOutputs::kLater, &*s));
  TENON_RETURN_IF_ERROR(s->session->EnqueueStep(s->rows));
  s->rows_in_flight[in_flight] = args.num_rows;
  return Status();
}

Status CheckResults(const tenon_step_results& to, const SessionObject& s) {
  if (s.session->num_steps_in_flight() == 0) {
    return FailedPreconditionError(
        "num_steps_in_flight is 0: there is none to wait for");
  }
  TENON_RETURN_IF_ERROR(CheckReserved("results.reserved", to.reserved));
  if (to.num_rows != s.rows_in_flight[0]) {
    return InvalidArgumentError("results.num_rows is ", to.num_rows,
                                ", expected ", s.rows_in_flight[0],
                                ", the rows of the step");
  }
  if (to.num_rows > 0) {
    TENON_RETURN_IF_ERROR(CheckPresent("results.tokens", to.tokens));
  }
  const bool wants_top = to.top_tokens != nullptr || to.top_logprobs != nullptr;
  if (wants_top ? to.top_columns < 1 || to.top_columns > TENON_MAX_TOP_LOGPROBS
                : to.top_columns != 0) {
    return InvalidArgumentError("results.top_columns is ", to.top_columns,
                                ", expected ",
                                wants_top ? "1 to 20" : "0 without top_tokens");
  }
  return CheckDistinctExperts(to.distinct_experts, s.session->options());
}

Status WaitStep(tenon_session session, const tenon_step_results* from) {
  tenon_step_results to;
  TENON_RETURN_IF_ERROR(ReadStruct("results", from, &to));
  Turn s;
  TENON_RETURN_IF_ERROR(s.Begin(session));
  TENON_RETURN_IF_ERROR(CheckResults(to, *s));
  TENON_RETURN_IF_ERROR(s->session->WaitStep(&s->results, &s->stats));
  s->rows_in_flight[0] = s->rows_in_flight[1];
  ++s->num_steps;
  s->num_tokens += static_cast<uint64_t>(s->stats.tokens);
  WriteResults(*s, to);
  for (size_t i = 0; to.top_columns > 0 && i < s->results.size(); ++i) {
    const size_t at = i * static_cast<size_t>(to.top_columns);
    WriteTop(s->results[i], to.top_columns,
             to.top_tokens != nullptr ? to.top_tokens + at : nullptr,
             to.top_logprobs != nullptr ? to.top_logprobs + at : nullptr);
  }
  if (to.microseconds != nullptr) *to.microseconds = s->stats.microseconds;
  return Status();
}

static_assert(TENON_MAX_STEPS_IN_FLIGHT == kMaxStepsInFlight);

}  // namespace
}  // namespace tenon::abi

int32_t tenon_session_step(tenon_session session, const tenon_step_args* args,
                           tenon_error* error) {
  return tenon::abi::Call(__func__, error,
                          [&] { return tenon::abi::Step(session, args); });
}

int32_t tenon_session_enqueue_step(tenon_session session,
                                   const tenon_step_args* args,
                                   tenon_error* error) {
  return tenon::abi::Call(
      __func__, error, [&] { return tenon::abi::EnqueueStep(session, args); });
}

int32_t tenon_session_wait_step(tenon_session session,
                                const tenon_step_results* results,
                                tenon_error* error) {
  return tenon::abi::Call(
      __func__, error, [&] { return tenon::abi::WaitStep(session, results); });
}
