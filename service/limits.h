#ifndef TENON_SERVICE_LIMITS_H_
#define TENON_SERVICE_LIMITS_H_

#include <chrono>
#include <cstdint>

namespace tenon::service {

// What one client can ask of the server. GetCapabilities tells them.
struct Limits {
  int32_t rows_per_step = 256;  // of one request, and of one engine step
  int32_t sequences = 1024;
  int32_t sessions = 64;
  int32_t prompt_tokens = 131072;
  int32_t request_bytes = 4 << 20;
  int32_t stop_tokens = 64;
  int32_t metadata_bytes = 8 << 10;
  int32_t connections = 256;
  int32_t streams_per_connection = 64;
  // Room for the edits of all rows of an engine step. A row takes as many as
  // its sequence has tokens, if these are counted, and its rules.
  int32_t logit_edits = 1 << 18;
  int32_t logit_rules = 4096;    // tokens in the rules of a sequence
  int32_t replayable_steps = 4;  // replies kept of each session
  // Waiting to be looked at by the step loop; more are ResourceExhausted.
  int32_t queued_requests = 1024;
  int32_t queued_rows = 4096;
  // Prompt tokens that one engine step runs beside the decode rows.
  int32_t prefill_tokens_per_step = 512;
  std::chrono::milliseconds lease{30000};
  std::chrono::milliseconds max_lease{600000};
  std::chrono::milliseconds stream_idle{60000};
  std::chrono::milliseconds default_deadline{10000};
};

// No server has limits beyond these.
constexpr int32_t kMaxRowsPerStep = 1024;
constexpr int32_t kMaxSequences = 65535;  // a slot of a handle has 16 bits
constexpr int32_t kMaxRequestBytes = 16 << 20;

// Prompts that can end in an engine step whose rows_per_step are all in use: so
// neither waits for the other.
constexpr int32_t kPromptEndsPerStep = 32;

}  // namespace tenon::service

#endif  // TENON_SERVICE_LIMITS_H_
