#include "engine/step_rows.h"

namespace tenon {
namespace {

constexpr char kStep[] = "Step";

Status CheckTokens(const std::vector<StepRow>& rows, int64_t vocab_size) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    for (int32_t j = 0; j < row.num_tokens && !row.continues; ++j) {
      if (row.tokens[j] >= 0 && row.tokens[j] < vocab_size) continue;
      return InvalidArgumentError(kStep, ": rows[", i, "].tokens[", j, "] is ",
                                  row.tokens[j], ", expected 0 to ",
                                  vocab_size - 1);
    }
  }
  return Status();
}

Status CheckContinues(const StepRow& row, size_t i, const DrawnTokens& before) {
  if (row.tokens != nullptr || row.num_tokens != 1) {
    return InvalidArgumentError(kStep, ": rows[", i,
                                "] continues and has tokens, or num_tokens is ",
                                row.num_tokens, ", expected null and 1");
  }
  if (before.Find(row.sequence, i) >= 0) return Status();
  return InvalidArgumentError(kStep, ": rows[", i,
                              "] continues, but the last step drew no token "
                              "for its sequence");
}

bool ActsThroughEdits(const SamplingParams& s) {
  const bool repetition =
      s.repetition_penalty != 0.0f && s.repetition_penalty != 1.0f;
  return repetition || s.frequency_penalty != 0.0f ||
         s.presence_penalty != 0.0f || s.dry_multiplier > 0.0f ||
         (s.flags & kOnlyAllowed) != 0;
}

// What a row is sampled with, and whether the session has room for it.
Status CheckSampling(const StepRow& row, size_t i,
                     const SessionOptions& options) {
  const SamplingParams& s = row.sampling;
  const auto error = [&](const auto&... parts) {
    return InvalidArgumentError(kStep, ": rows[", i, "].", parts...);
  };
  const Status sampling = ValidateSamplingParams(s);
  if (!sampling.ok()) return error("sampling: ", sampling.message());
  if ((s.flags & kSetMirostatMu) != 0 && s.mirostat_tau == 0.0f) {
    return error("sampling: flags has kSetMirostatMu, but mirostat_tau is 0");
  }
  if (row.num_edits < 0 || (row.num_edits > 0 && row.edits == nullptr)) {
    return error("num_edits is ", row.num_edits, ", edits are ",
                 row.edits == nullptr ? "null" : "given");
  }
  if (ActsThroughEdits(s) && row.edits == nullptr) {
    return error("sampling: penalties, DRY and kOnlyAllowed need edits");
  }
  if ((s.flags & kUseBitmask) != 0 && row.bitmask == nullptr) {
    return error("bitmask is null, with kUseBitmask");
  }
  if (row.bitmask != nullptr && !options.logit_bitmasks) {
    return error("bitmask is given, but the session has no logit_bitmasks");
  }
  if (s.num_top_logprobs > options.max_top_logprobs) {
    return error("sampling: num_top_logprobs is ", s.num_top_logprobs,
                 ", more than max_top_logprobs ", options.max_top_logprobs);
  }
  return Status();
}

// Does not look at the tokens, of which there may be too many.
Status CheckRows(const std::vector<StepRow>& rows,
                 const SessionOptions& options, const DrawnTokens& before) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    if (row.continues) {
      TENON_RETURN_IF_ERROR(CheckContinues(row, i, before));
    } else if (row.tokens == nullptr || row.num_tokens <= 0) {
      return InvalidArgumentError(kStep, ": rows[", i, "] has no tokens");
    }
    if (row.logits_mode != LogitsMode::kNone && row.logits == nullptr) {
      return InvalidArgumentError(kStep, ": rows[", i,
                                  "].logits is null, with a logits_mode");
    }
    if (row.sample) TENON_RETURN_IF_ERROR(CheckSampling(row, i, options));
  }
  return Status();
}

Status CheckTotals(const std::vector<StepRow>& rows,
                   const SessionOptions& options) {
  int64_t tokens = 0;
  int64_t logit_rows = 0;
  int64_t edits = 0;
  for (const StepRow& row : rows) {
    if (row.sample) edits += row.num_edits;
    tokens += row.num_tokens;
    logit_rows += NumLogitRows(row);
  }
  if (rows.size() > static_cast<size_t>(options.max_sequences)) {
    return ResourceExhaustedError(kStep, ": ", rows.size(),
                                  " rows, more than max_sequences ",
                                  options.max_sequences);
  }
  if (tokens > options.max_tokens) {
    return ResourceExhaustedError(kStep, ": ", tokens,
                                  " tokens, more than max_tokens ",
                                  options.max_tokens);
  }
  if (logit_rows > options.max_logit_rows) {
    return ResourceExhaustedError(kStep, ": logits of ", logit_rows,
                                  " tokens, more than max_logit_rows ",
                                  options.max_logit_rows);
  }
  if (edits > options.max_logit_edits) {
    return ResourceExhaustedError(kStep, ": ", edits,
                                  " edits, more than max_logit_edits ",
                                  options.max_logit_edits);
  }
  return Status();
}

// Has the row's next token drawn from logit row `logit_row`.
void FillSampling(const StepRow& row, size_t i, int32_t logit_row,
                  const MirostatStates& mirostat, StepBuffers* buffers,
                  LogitPlace* place) {
  SamplingParams* sampling = &buffers->sampling()[logit_row];
  *sampling = row.sampling;
  sampling->position = static_cast<uint64_t>(buffers->kv_len()[i]);
  if (row.bitmask != nullptr) sampling->flags |= kUseBitmask;
  MirostatPlaces places;
  if (row.sampling.mirostat_tau > 0.0f) places = mirostat.Find(row.sequence);
  buffers->AddSampledRow(row.edits, row.num_edits, row.bitmask, places);
  place->last = logit_row;
  place->mirostat = places.to;
}

// Every row has its logits, wanted or not.
void FillDecodeLogits(const std::vector<StepRow>& rows,
                      const MirostatStates& mirostat, StepBuffers* buffers,
                      std::vector<LogitPlace>* places) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto row = static_cast<int32_t>(i);
    buffers->logit_rows()[i] = row;
    if (rows[i].sample) {
      FillSampling(rows[i], i, row, mirostat, buffers, &(*places)[i]);
    } else {
      (*places)[i].last = row;
      buffers->sampling()[i] = CheapestSampling();
      buffers->AddSampledRow(nullptr, 0, nullptr, {});
    }
  }
}

// The sampled rows come first, so that they form one matrix for the sampler.
void FillLogits(const std::vector<StepRow>& rows,
                const MirostatStates& mirostat, StepBuffers* buffers,
                std::vector<LogitPlace>* places) {
  const int32_t* query_start = buffers->query_start();
  int32_t next = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].sample) continue;
    FillSampling(rows[i], i, next, mirostat, buffers, &(*places)[i]);
    buffers->logit_rows()[next++] = query_start[i + 1] - 1;
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const int32_t wanted = NumLogitRows(rows[i]);
    const int32_t end = query_start[i + 1] - (rows[i].sample ? 1 : 0);
    (*places)[i].others = next;
    for (int32_t j = query_start[i + 1] - wanted; j < end; ++j) {
      buffers->logit_rows()[next++] = j;
    }
    if (wanted > 0 && !rows[i].sample) (*places)[i].last = next - 1;
  }
}

}  // namespace

int32_t DrawnTokens::Find(SequenceId sequence, size_t hint) const {
  if (hint < sequences.size() && sequences[hint] == sequence) {
    return places[hint];
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i] == sequence) return places[i];
  }
  return -1;
}

int32_t NumLogitRows(const StepRow& row) {
  if (row.logits_mode == LogitsMode::kAll) return row.num_tokens;
  return row.sample || row.logits_mode == LogitsMode::kLast ? 1 : 0;
}

Status CheckStepRows(const std::vector<StepRow>& rows,
                     const SessionOptions& options, int64_t vocab_size,
                     const DrawnTokens& before) {
  TENON_RETURN_IF_ERROR(CheckRows(rows, options, before));
  TENON_RETURN_IF_ERROR(CheckTotals(rows, options));
  return CheckTokens(rows, vocab_size);
}

StepShape DecodeShape(int32_t rows) { return {rows, rows, rows, rows, true}; }

StepShape ShapeOf(const std::vector<StepRow>& rows,
                  const DecodeBuckets& buckets) {
  StepShape shape;
  shape.rows = static_cast<int32_t>(rows.size());
  for (const StepRow& row : rows) {
    shape.tokens += row.num_tokens;
    shape.logit_rows += NumLogitRows(row);
    shape.sampled_rows += row.sample;
  }
  const int32_t bucket = buckets.Find(shape.rows);
  const bool one_each = shape.tokens == shape.rows;
  return one_each && bucket > 0 ? DecodeShape(bucket) : shape;
}

void FillStep(const std::vector<StepRow>& rows, const KvCache& cache,
              const DrawnTokens& before, const MirostatStates& mirostat,
              StepBuffers* buffers, std::vector<LogitPlace>* places) {
  int32_t tokens = 0;
  buffers->query_start()[0] = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    const StatusOr<int32_t> length = cache.Length(row.sequence);
    const int32_t first = *length - row.num_tokens;
    for (int32_t j = 0; j < row.num_tokens; ++j) {
      buffers->token_ids()[tokens + j] =
          row.continues ? -2 - before.Find(row.sequence, i) : row.tokens[j];
      buffers->positions()[tokens + j] = first + j;
    }
    tokens += row.num_tokens;
    buffers->query_start()[i + 1] = tokens;
    buffers->kv_len()[i] = *length;
  }
  cache.FillSlotMapping(buffers->slot_mapping());
  cache.FillBlockTable(buffers->block_table(), cache.max_pages_per_sequence());

  places->assign(rows.size(), LogitPlace());
  if (buffers->shape().is_decode) {
    buffers->FillPadding(static_cast<int32_t>(rows.size()));
    FillDecodeLogits(rows, mirostat, buffers, places);
  } else {
    FillLogits(rows, mirostat, buffers, places);
  }
  buffers->FinishSampledRows();
}

}  // namespace tenon
