#include <algorithm>
#include <cmath>

#include "ops/core/cpu_thread_pool.h"
#include "ops/core/workspace.h"
#include "ops/sampler/sampler_backend.h"
#include "ops/sampler/sampler_cpu_draw.h"
#include "ops/sampler/sampler_cpu_filters.h"

namespace tenon {
namespace {

// Rows that are decided at once, each with scratch for its candidates.
constexpr int64_t kMaxSlots = 16;

bool WantsRaw(const SamplerParams& p) {
  return p.raw_logprobs.present() ||
         (p.top_tokens.present() && p.top_logprobs_kind == LogprobKind::kRaw);
}

// The parts of the workspace.
struct Workspace {
  explicit Workspace(const SamplerParams& p)
      : rows(p.logits.shape[0]),
        tiles(NumSubTiles(p.vocab())),
        slots(std::min(rows, kMaxSlots)),
        capacity(CandidateCapacity(p.vocab())) {
    WorkspaceCutter workspace(p.workspace);
    summaries = workspace.Take<SubTile>(rows * tiles);
    raw_summaries = workspace.Take<SubTile>(WantsRaw(p) ? rows * tiles : 0);
    floats = workspace.Take<float>(slots * 2 * capacity);
    places = workspace.Take<int32_t>(slots * capacity);
    bytes = workspace.size();
  }

  Candidates SlotOf(int64_t slot) const {
    return {floats + 2 * slot * capacity, places + slot * capacity,
            floats + (2 * slot + 1) * capacity};
  }

  int64_t rows;
  int64_t tiles;
  int64_t slots;
  int64_t capacity;
  SubTile* summaries;
  SubTile* raw_summaries;
  float* floats;
  int32_t* places;
  size_t bytes;
};

RowPlan PlanOf(const SamplerParams& p, int64_t row) {
  RowPlan plan = MakeRowPlan(p.params[row], p.vocab());
  if (!p.bitmask.present()) plan.use_bitmask = false;
  if (!p.mirostat_mu.present()) plan.mirostat_tau = 0.0f;
  return plan;
}

LogitsRow RawLogitsOf(const SamplerParams& p, int64_t row) {
  LogitsRow logits;
  logits.data = p.logits.As<const char>() +
                row * p.logits.stride[0] *
                    static_cast<int64_t>(DTypeSize(p.logits.dtype));
  logits.dtype = p.logits.dtype;
  logits.vocab = p.vocab();
  logits.num_tiles = NumSubTiles(p.vocab());
  return logits;
}

// The logits that count; refers to `plan`.
LogitsRow LogitsOf(const SamplerParams& p, int64_t row, const RowPlan& plan) {
  LogitsRow logits = RawLogitsOf(p, row);
  if (plan.use_bitmask) {
    logits.bitmask = p.bitmask.As<const uint32_t>() + row * p.bitmask.stride[0];
  }
  const EditRange edits = EditsOfRow(p, row);
  logits.edits = p.edits + edits.begin;
  logits.num_edits = edits.end - edits.begin;
  logits.plan = &plan;
  return logits;
}

// Whether anything needs the sums of the logits that count.
bool NeedsSums(const SamplerParams& p, const RowPlan& plan) {
  return !plan.greedy || p.logprobs.present() ||
         (p.top_tokens.present() &&
          p.top_logprobs_kind == LogprobKind::kUnfiltered);
}

// One row's outputs.
class RowDecision {
 public:
  RowDecision(const SamplerParams& p, int64_t index, CpuRow* row, CpuRow* raw,
              Candidates candidates)
      : p_(p), index_(index), row_(*row), raw_(*raw), c_(candidates) {}

  void Run();

 private:
  bool is_kept() const { return !row_.plan.greedy && row_.plan.filtered(); }
  bool is_one_hot() const { return std::isinf(row_.best); }

  void Draw();
  void WriteLogprobs();
  void WriteTop();
  void WriteProbabilities();
  float LogprobIn(const CpuRow& row, int64_t token) const;
  float ProcessedLogprob(float x) const;

  const SamplerParams& p_;
  const int64_t index_;
  CpuRow& row_;
  CpuRow& raw_;
  Candidates c_;
  KeptTokens kept_;
  SampleStatus status_ = SampleStatus::kOk;
  int64_t token_ = -1;
  float logit_ = NAN;  // of the token
};

void RowDecision::Draw() {
  const SamplingParams& params = p_.params[index_];
  const bool with_mirostat = row_.plan.mirostat_tau > 0.0f;
  const MirostatState mirostat = MirostatStateOf(p_);
  float mu = with_mirostat ? mirostat.MuOf(index_, params) : 0.0f;
  row_.best = BestOf(row_.tiles, row_.num_tiles());
  if (std::isnan(row_.best)) {
    status_ = SampleStatus::kNonFinite;
  } else if (row_.best == -INFINITY) {
    status_ = SampleStatus::kNoSupport;
  } else if (is_one_hot()) {
    token_ = FirstBestToken(row_);
  } else {
    if (NeedsSums(p_, row_.plan)) row_.total = TotalOf(row_);
    const uint64_t bits =
        p_.random_bits.present()
            ? static_cast<uint64_t>(p_.random_bits.As<const int64_t>()[index_])
            : RandomBitsAt(params.seed, params.position, p_.stream);
    const uint64_t numerator = UniformNumerator(bits);
    if (row_.plan.greedy) {
      token_ = FirstBestToken(row_);
    } else if (!row_.plan.filtered()) {
      token_ = DrawPlain(row_, numerator);
    } else {
      kept_ = FilterRow(row_, params, mu, &c_);
      token_ = DrawKept(row_, c_, kept_, numerator);
    }
    if (with_mirostat && !row_.plan.greedy) {
      mu = NextMirostatMu(row_.plan, kept_.best, kept_.mass, mu,
                          LogitAt(row_, token_));
    }
  }
  if (with_mirostat) mirostat.Leave(index_, mu);
  if (token_ >= 0) logit_ = LogitAt(row_, token_);
}

// log-softmax of the row's logits as they are summarised.
float RowDecision::LogprobIn(const CpuRow& row, int64_t token) const {
  if (token < 0 || std::isnan(row.best)) return NAN;
  const float x = LogitAt(row, token);
  if (std::isinf(row.best) || std::isinf(x)) {
    return x == row.best && x > 0.0f ? 0.0f : -INFINITY;
  }
  return LogprobOf(x, row.best, row.plan.temperature, row.total, kMassBits);
}

float RowDecision::ProcessedLogprob(float x) const {
  if (is_one_hot() || row_.plan.greedy) return 0.0f;
  return is_kept() ? LogprobOf(x, kept_.best, row_.plan.draw_temperature,
                               kept_.mass, kMassBits)
                   : LogprobOf(x, row_.best, row_.plan.temperature, row_.total,
                               kMassBits);
}

void RowDecision::WriteLogprobs() {
  if (p_.logprobs.present()) {
    p_.logprobs.As<float>()[index_] = LogprobIn(row_, token_);
  }
  if (p_.raw_logprobs.present()) {
    p_.raw_logprobs.As<float>()[index_] = LogprobIn(raw_, token_);
  }
  if (p_.processed_logprobs.present()) {
    p_.processed_logprobs.As<float>()[index_] =
        token_ < 0 ? NAN : ProcessedLogprob(logit_);
  }
}

// Uses up the candidates.
void RowDecision::WriteTop() {
  const bool processed = p_.top_logprobs_kind == LogprobKind::kProcessed;
  const CpuRow& row = p_.top_logprobs_kind == LogprobKind::kRaw ? raw_ : row_;
  const int64_t columns = p_.top_tokens.shape[1];
  int32_t* const tokens =
      p_.top_tokens.As<int32_t>() + index_ * p_.top_tokens.stride[0];
  float* const logprobs =
      p_.top_logprobs.As<float>() + index_ * p_.top_logprobs.stride[0];
  std::fill(tokens, tokens + columns, -1);
  std::fill(logprobs, logprobs + columns, NAN);
  const int64_t wanted = std::min<int64_t>(columns, row_.plan.num_top_logprobs);
  if (wanted == 0 || std::isnan(row.best) || row.best == -INFINITY) return;
  if ((processed && row.plan.greedy) || std::isinf(row.best)) {
    tokens[0] = static_cast<int32_t>(FirstBestToken(row));
    logprobs[0] = 0.0f;
    return;
  }
  if (!processed || !is_kept()) {
    CollectFrom(row, KthBestTile(row, wanted, &c_), &c_);
  }
  // The best of them by insertion, (logit descending, id ascending).
  struct Entry {
    float x;
    int64_t id;
  } best[kMaxTopLogprobs];
  int64_t count = 0;
  for (int64_t i = 0; i < c_.count; ++i) {
    if (count == wanted && c_.x[i] < best[count - 1].x) continue;
    const Entry entry = {c_.x[i], IdOfPlace(row, c_.places[i])};
    const auto ranks_before = [](const Entry& a, const Entry& b) {
      return a.x > b.x || (a.x == b.x && a.id < b.id);
    };
    if (count == wanted && !ranks_before(entry, best[count - 1])) continue;
    int64_t at = count < wanted ? count++ : count - 1;
    for (; at > 0 && ranks_before(entry, best[at - 1]); --at) {
      best[at] = best[at - 1];
    }
    best[at] = entry;
  }
  for (int64_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<int32_t>(best[i].id);
    logprobs[i] = processed
                      ? ProcessedLogprob(best[i].x)
                      : LogprobOf(best[i].x, row.best, row.plan.temperature,
                                  row.total, kMassBits);
  }
}

// Call while the candidates are what is kept.
void RowDecision::WriteProbabilities() {
  float* const out =
      p_.probabilities.As<float>() + index_ * p_.probabilities.stride[0];
  const bool plain = token_ >= 0 && !row_.plan.greedy && !is_one_hot();
  if (!plain || is_kept()) std::fill(out, out + row_.logits.vocab, 0.0f);
  if (token_ < 0) return;
  if (!plain) {
    out[token_] = 1.0f;
    return;
  }
  if (is_kept()) {
    row_.kernels.weights(c_.x, c_.count, kept_.best, row_.plan.draw_scale,
                         c_.spare);
    for (int64_t i = 0; i < c_.count; ++i) {
      out[IdOfPlace(row_, c_.places[i])] =
          ProbabilityOf(c_.spare[i], kept_.mass);
    }
    return;
  }
  float x[kSubTile];
  for (int64_t tile = 0; tile < row_.num_tiles(); ++tile) {
    row_.kernels.load(row_.logits, tile, x);
    row_.kernels.weights(x, kSubTile, row_.best, row_.plan.scale, x);
    for (int place = 0; place < kSubTile; ++place) {
      const int64_t id = IdAt(tile, place, row_.num_tiles());
      if (id < row_.logits.vocab) {
        out[id] = ProbabilityOf(x[place], row_.total);
      }
    }
  }
}

void RowDecision::Run() {
  Draw();
  if (WantsRaw(p_)) {
    raw_.best = BestOf(raw_.tiles, raw_.num_tiles());
    if (std::isfinite(raw_.best)) raw_.total = TotalOf(raw_);
  }
  p_.tokens.As<int32_t>()[index_] = static_cast<int32_t>(token_);
  p_.statuses.As<int32_t>()[index_] = static_cast<int32_t>(status_);
  WriteLogprobs();
  if (p_.probabilities.present()) WriteProbabilities();
  if (p_.top_tokens.present()) WriteTop();
}

RowPlan RawPlan() {
  RowPlan plan;
  plan.scale = kRawScale;
  return plan;
}

void SummarizeRows(const SamplerParams& p, const Workspace& workspace,
                   const SamplerCpuKernels& kernels, Stream stream) {
  // Rows in pieces, so that threads help where there are few rows.
  constexpr int64_t kPiece = 64;
  const int64_t tiles = workspace.tiles;
  const int64_t pieces = (tiles + kPiece - 1) / kPiece;
  const int64_t grain = kPiece / tiles + 1;
  const int64_t count = workspace.rows * pieces;
  ParallelFor(stream, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces;
      const int64_t first = i % pieces * kPiece;
      const int64_t last = std::min(first + kPiece, tiles);
      const RowPlan plan = PlanOf(p, row);
      kernels.summarize(LogitsOf(p, row, plan), first, last, plan.scale,
                        NeedsSums(p, plan),
                        workspace.summaries + row * tiles + first);
      if (WantsRaw(p)) {
        kernels.summarize(RawLogitsOf(p, row), first, last, kRawScale, true,
                          workspace.raw_summaries + row * tiles + first);
      }
    }
  });
}

}  // namespace

size_t SamplerCpuWorkspaceBytes(const SamplerParams& params) {
  return Workspace(params).bytes;
}

Status SamplerCpu(const SamplerParams& p, Stream stream) {
  const Workspace workspace(p);
  const SamplerCpuKernels& kernels = GetSamplerCpuKernels(DetectCpuIsa());
  SummarizeRows(p, workspace, kernels, stream);
  const int64_t tiles = workspace.tiles;
  const int64_t grain =
      (workspace.rows + workspace.slots - 1) / workspace.slots;
  ParallelFor(stream, workspace.rows, grain, [&](int64_t begin, int64_t end) {
    // Pieces begin at multiples of the grain, and each has a slot of its own.
    const Candidates candidates = workspace.SlotOf(begin / grain);
    for (int64_t i = begin; i < end; ++i) {
      CpuRow row = {kernels, {}, PlanOf(p, i), workspace.summaries + i * tiles};
      row.logits = LogitsOf(p, i, row.plan);
      CpuRow raw = {kernels, RawLogitsOf(p, i), RawPlan(),
                    workspace.raw_summaries + i * tiles};
      RowDecision(p, i, &row, &raw, candidates).Run();
    }
  });
  return Status();
}

}  // namespace tenon
