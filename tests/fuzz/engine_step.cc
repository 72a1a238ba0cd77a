#include <cmath>

#include "tests/fuzz/engine_world.h"

namespace tenon::fuzz {

std::vector<Row> World::MakeRows(SessionOracle& s) {
  std::vector<Row> rows;
  for (size_t i = 0; i < s.sequences().size(); ++i) {
    if (in_.OneIn(3)) continue;
    Row row;
    row.index = i;
    row.row = Zeroed<tenon_step_row>();
    row.row.sequence = s.sequences()[i].handle;
    row.row.num_tokens = static_cast<int32_t>(in_.Between(1, 4));
    row.tokens = std::make_unique<Array<int32_t>>(row.row.num_tokens);
    for (int32_t j = 0; j < row.row.num_tokens; ++j) {
      (*row.tokens)[j] = static_cast<int32_t>(in_.Below(kVocab));
    }
    row.row.tokens = row.tokens->get();
    if (!in_.OneIn(3)) {
      row.sampling = std::make_unique<tenon_sampling_params>(Sampling(in_));
      row.row.sampling = row.sampling.get();
    }
    row.row.logits_mode =
        static_cast<int32_t>(in_.Pick<int64_t>({0, 0, 0, 1, 2}));
    if (row.row.logits_mode != TENON_LOGITS_NONE) {
      row.logits = std::make_unique<Array<float>>(
          row.row.logits_mode == TENON_LOGITS_ALL ? row.row.num_tokens * kVocab
                                                  : kVocab);
      row.row.logits = row.logits->get();
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

int32_t World::EnqueueAndWait(tenon_session session,
                              const tenon_step_args& args) {
  auto rows = Zeroed<tenon_step_args>();
  rows.num_rows = args.num_rows;
  rows.rows = args.rows;
  const int32_t code =
      Call("tenon_session_enqueue_step", false, [&](tenon_error* error) {
        return tenon_session_enqueue_step(session, &rows, error);
      });
  if (code != TENON_OK) return code;
  auto results = Zeroed<tenon_step_results>();
  results.num_rows = args.num_rows;
  results.tokens = args.tokens;
  results.logprobs = args.logprobs;
  results.statuses = args.statuses;
  results.distinct_experts = args.distinct_experts;
  return Call("tenon_session_wait_step", false, [&](tenon_error* error) {
    return tenon_session_wait_step(session, &results, error);
  });
}

int32_t World::RunStep(tenon_session session, std::vector<Row>& rows,
                       const tenon_step_args& given, bool is_hostile,
                       bool wants_experts, uint32_t stride) {
  Array<uint8_t> memory(rows.size() * stride);
  std::memset(memory.get(), 0, memory.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(memory.get() + i * stride, &rows[i].row,
                std::min<size_t>(stride, sizeof(tenon_step_row)));
  }
  Array<int32_t> tokens(rows.size());
  Array<float> logprobs(rows.size());
  Array<int32_t> statuses(rows.size());
  Array<int32_t> experts(kLayers);
  tenon_step_args args = given;
  if (null_array_ != 1) {
    args.rows = reinterpret_cast<const tenon_step_row*>(memory.get());
  }
  if (null_array_ != 2) args.tokens = tokens.get();
  if (in_.OneIn(2)) args.logprobs = logprobs.get();
  if (in_.OneIn(2)) args.statuses = statuses.get();
  if (wants_experts) args.distinct_experts = experts.get();
  // In one part, or in two.
  const bool in_two = !is_hostile && in_.OneIn(3);
  const int32_t code =
      in_two ? EnqueueAndWait(session, args)
             : Call("tenon_session_step", is_hostile, [&](tenon_error* error) {
                 return tenon_session_step(session, &args, error);
               });
  if (code != TENON_OK) {
    bool untouched = tokens.IsUntouched() && logprobs.IsUntouched() &&
                     statuses.IsUntouched() && experts.IsUntouched();
    for (const Row& row : rows) {
      untouched = untouched && (!row.logits || row.logits->IsUntouched());
    }
    if (!untouched) Fail("a failed step wrote results: " + last_message_);
    return code;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const bool drawn = rows[i].row.sampling != nullptr;
    if (drawn ? tokens[i] < 0 || tokens[i] >= kVocab : tokens[i] != -1) {
      Fail("a step drew token " + std::to_string(tokens[i]));
    }
    for (size_t j = 0; rows[i].logits && j < rows[i].logits->size(); ++j) {
      if (!std::isfinite((*rows[i].logits)[j])) Fail("a logit is not finite");
    }
  }
  return code;
}

void World::Step() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  std::vector<Row> rows = MakeRows(s);
  const uint32_t stride =
      sizeof(tenon_step_row) + (in_.OneIn(8) ? 16 : 0);  // of a later version
  std::vector<SessionOracle::Append> appends;
  int64_t num_tokens = 0;
  int64_t num_logit_rows = 0;
  for (Row& row : rows) {
    row.row.struct_size = stride;
    appends.push_back({row.index, row.row.num_tokens});
    num_tokens += row.row.num_tokens;
    num_logit_rows += row.NumLogitRows();
  }
  auto args = Zeroed<tenon_step_args>();
  args.num_rows = static_cast<int32_t>(rows.size());
  const bool wants_experts =
      (s.limits.flags & TENON_SESSION_COUNT_EXPERTS) != 0;
  const bool fits = num_tokens <= s.limits.max_tokens &&
                    num_logit_rows <= s.limits.max_logit_rows &&
                    s.TryAppend(appends);
  const int32_t code =
      RunStep(s.handle, rows, args, !fits, wants_experts, stride);
  if (code != (fits ? TENON_OK : TENON_RESOURCE_EXHAUSTED)) {
    Fail("a step returned " + std::to_string(code) + ": " + last_message_);
  }
  if (!fits) return;
  ++s.num_steps;
  s.num_tokens += static_cast<uint64_t>(num_tokens);
}

void World::HostileStep() {
  if (sessions_.empty()) return;
  SessionOracle& s = AnySession();
  std::vector<Row> rows = MakeRows(s);
  auto args = Zeroed<tenon_step_args>();
  args.num_rows = static_cast<int32_t>(rows.size());
  tenon_session session = s.handle;
  bool wants_experts = false;
  const uint64_t kind = in_.Below(4);
  if (kind == 0 || rows.empty()) {
    switch (in_.Below(4)) {
      case 0:
        args.struct_size = static_cast<uint32_t>(
            in_.Pick<uint64_t>({0, 1, 7, 4097, 0xffffffffu}));
        break;
      case 1:
        args.num_rows = in_.Pick<int32_t>({-1, kInt32Min, kInt32Max, 5});
        break;
      case 2:
        session = HostileHandle();
        break;
      default:
        if ((s.limits.flags & TENON_SESSION_COUNT_EXPERTS) != 0) return;
        wants_experts = true;
    }
  } else if (kind == 1 && in_.OneIn(4)) {
    null_array_ = static_cast<int>(in_.Between(1, 2));
  } else {
    MakeHostile(s, rows);
  }
  if (RunStep(session, rows, args, true, wants_experts,
              sizeof(tenon_step_row)) == TENON_OK) {
    Fail("a hostile step succeeded");
  }
  null_array_ = 0;
}

void World::MakeHostile(SessionOracle& s, std::vector<Row>& rows) {
  Row& hostile = in_.PickFrom(rows);
  tenon_step_row& row = hostile.row;
  switch (in_.Below(10)) {
    case 0:
      row.struct_size =
          static_cast<uint32_t>(in_.Pick<uint64_t>({0, 7, 4097, 0xffffffffu}));
      break;
    case 1:
      row.num_tokens = in_.Pick<int32_t>({0, -1, kInt32Min});
      break;
    case 2:  // more than the session takes, all of them real
      row.num_tokens = 1 << 16;
      hostile.tokens = std::make_unique<Array<int32_t>>(row.num_tokens);
      std::fill_n(hostile.tokens->get(), row.num_tokens, 0);
      row.tokens = hostile.tokens->get();
      break;
    case 3:
      row.sequence = HostileSequence(s);
      break;
    case 4:
      row.tokens = nullptr;
      break;
    case 5:
      (*hostile.tokens)[in_.Below(hostile.tokens->size())] =
          in_.Pick<int32_t>({-1, kVocab, kInt32Max, kInt32Min});
      break;
    case 6:
      hostile.sampling = std::make_unique<tenon_sampling_params>();
      hostile.sampling->temperature =
          in_.Pick<float>({-1.0f, std::numeric_limits<float>::quiet_NaN()});
      row.sampling = hostile.sampling.get();
      break;
    case 7:
      row.logits_mode = in_.Pick<int32_t>({3, -1, kInt32Max});
      break;
    case 8:
      row.logits_mode = 1;
      row.logits = nullptr;
      break;
    default:
      row.flags = in_.Pick<uint32_t>({2, 0x80000000u, TENON_ROW_CONTINUES});
  }
}

}  // namespace tenon::fuzz
