#include "service/session_table.h"

#include <cstring>

#include "service/random.h"

namespace tenon::service {
namespace {

// FNV-1a over 64-bit words, with a rotation so that high bits count as well.
// It tells a mistaken client from a repeated call; it need not resist an
// attacker, who could only fool himself.
class Hash {
 public:
  void Add(uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3;
    state_ = state_ << 27 | state_ >> 37;
  }
  void Add(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    Add(uint64_t{bits});
  }
  uint64_t state() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325;
};

}  // namespace

uint64_t Digest(const v1::StepRequest& request) {
  Hash hash;
  hash.Add(static_cast<uint64_t>(request.seq_size()));
  for (uint64_t seq : request.seq()) hash.Add(seq);
  hash.Add(static_cast<uint64_t>(request.input_token_size()));
  for (uint32_t token : request.input_token()) hash.Add(uint64_t{token});
  hash.Add(uint64_t{request.want()});
  hash.Add(uint64_t{request.top_n()});
  const v1::Sampling& s = request.overrides();  // which have no rules
  const uint64_t present =
      (request.has_overrides() ? 1 : 0) | (s.has_temperature() ? 2 : 0) |
      (s.has_top_k() ? 4 : 0) | (s.has_top_p() ? 8 : 0) |
      (s.has_min_p() ? 16 : 0) | (s.has_seed() ? 32 : 0) |
      (s.has_typical_p() ? 64 : 0) | (s.has_top_n_sigma() ? 128 : 0) |
      (s.has_xtc_probability() ? 256 : 0) | (s.has_xtc_threshold() ? 512 : 0) |
      (s.has_repetition_penalty() ? 1 << 10 : 0) |
      (s.has_frequency_penalty() ? 1 << 11 : 0) |
      (s.has_presence_penalty() ? 1 << 12 : 0) |
      (s.has_dry_multiplier() ? 1 << 13 : 0) |
      (s.has_dry_base() ? 1 << 14 : 0) |
      (s.has_dry_allowed_length() ? 1 << 15 : 0) |
      (s.has_dry_range() ? 1 << 16 : 0) | (s.has_mirostat_tau() ? 1 << 17 : 0) |
      (s.has_mirostat_eta() ? 1 << 18 : 0);
  hash.Add(present);
  hash.Add(s.temperature());
  hash.Add(static_cast<uint64_t>(s.top_k()));
  hash.Add(s.top_p());
  hash.Add(s.min_p());
  hash.Add(s.seed());
  hash.Add(static_cast<uint64_t>(s.filter_order()));
  hash.Add(s.typical_p());
  hash.Add(s.top_n_sigma());
  hash.Add(s.xtc_probability());
  hash.Add(s.xtc_threshold());
  hash.Add(s.repetition_penalty());
  hash.Add(s.frequency_penalty());
  hash.Add(s.presence_penalty());
  hash.Add(s.dry_multiplier());
  hash.Add(s.dry_base());
  hash.Add(static_cast<uint64_t>(s.dry_allowed_length()));
  hash.Add(static_cast<uint64_t>(s.dry_range()));
  hash.Add(s.mirostat_tau());
  hash.Add(s.mirostat_eta());
  return hash.state();
}

Failure ClientSession::Look(uint64_t step_id, uint64_t digest,
                            const v1::StepResponse** reply) const {
  *reply = nullptr;
  if (step_id == last_step + 1) return Failure();
  const std::string name = "step_id " + std::to_string(step_id);
  if (step_id > last_step) {
    return {StatusCode::kFailedPrecondition,
            name + " follows step " + std::to_string(last_step) + ", a gap",
            "STEP_ID_GAP", name, 0};
  }
  for (const Reply& known : replies) {
    if (known.step_id != step_id) continue;
    if (known.digest == digest) {
      *reply = &known.response;
      return Failure();
    }
    return {StatusCode::kAborted,
            name + " was used already, for a step with another content",
            "STEP_REPLAY_MISMATCH", name, 0};
  }
  return {StatusCode::kFailedPrecondition,
          name + " is too old to be replayed; the last was " +
              std::to_string(last_step),
          "STEP_ID_EXPIRED", name, 0};
}

void ClientSession::Remember(uint64_t step_id, uint64_t digest,
                             const v1::StepResponse& response,
                             int32_t capacity) {
  last_step = step_id;
  if (replies.size() >= static_cast<size_t>(capacity)) {
    replies.push_back(std::move(replies.front()));  // keeps its memory
    replies.pop_front();
  } else {
    replies.emplace_back();
  }
  replies.back().step_id = step_id;
  replies.back().digest = digest;
  replies.back().response = response;
}

ClientSession* SessionTable::Add() {
  if (size() >= capacity_) return nullptr;
  auto session = std::make_unique<ClientSession>();
  do {
    session->id = WithEpoch(epoch_, RandomBits());
  } while (sessions_.count(session->id) != 0);
  ClientSession* added = session.get();
  sessions_[added->id] = std::move(session);
  return added;
}

ClientSession* SessionTable::Find(uint64_t id) {
  const auto found = sessions_.find(id);
  return found == sessions_.end() ? nullptr : found->second.get();
}

std::vector<uint64_t> SessionTable::Ids() const {
  std::vector<uint64_t> ids;
  for (const auto& entry : sessions_) ids.push_back(entry.first);
  return ids;
}

}  // namespace tenon::service
