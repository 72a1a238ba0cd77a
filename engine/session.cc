#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "engine/moe_kernel_file.h"
#include "engine/step_buffers.h"
#include "ops/core/memory.h"
#include "ops/core/validate.h"
#include "ops/linear/cublas_lt.h"

namespace tenon {
namespace {

constexpr char kCreate[] = "Session";
constexpr char kStep[] = "Step";

// Fills in what the options leave to the session, and checks the rest.
Status ResolveOptions(const ModelConfig& config, SessionOptions* o) {
  constexpr int64_t kMax = 1 << 20;
  TENON_RETURN_IF_ERROR(
      CheckRange(kCreate, "max_sequences", o->max_sequences, 1, kMax));
  TENON_RETURN_IF_ERROR(
      CheckRange(kCreate, "max_tokens", o->max_tokens, 1, kMax));
  TENON_RETURN_IF_ERROR(CheckRange(kCreate, "max_context", o->max_context, 1,
                                   config.max_position_embeddings));
  TENON_RETURN_IF_ERROR(
      CheckRange(kCreate, "page_size", o->page_size, 1, 65536));
  TENON_RETURN_IF_ERROR(
      CheckRange(kCreate, "num_threads", o->num_threads, 0, 4096));
  if (o->max_logit_rows == 0) o->max_logit_rows = o->max_sequences;
  return CheckRange(kCreate, "max_logit_rows", o->max_logit_rows, 1, kMax);
}

// The pages of a cache that is as `cache` says otherwise.
Status ResolvePages(const KvCacheOptions& cache, SessionOptions* o) {
  constexpr int64_t kMax = int64_t{1} << 30;
  const int64_t pages_per_sequence =
      (int64_t{o->max_context} + o->page_size - 1) / o->page_size;
  if (o->kv_cache_bytes != 0) {
    if (o->num_pages != 0) {
      return InvalidArgumentError(kCreate, ": num_pages is ", o->num_pages,
                                  " and kv_cache_bytes is ", o->kv_cache_bytes,
                                  ", expected one of them");
    }
    o->num_pages = std::min(KvCache::PagesIn(cache, o->kv_cache_bytes), kMax);
    if (o->num_pages > 0) return Status();
    return InvalidArgumentError(kCreate, ": kv_cache_bytes is ",
                                o->kv_cache_bytes, ", too few for a page of ",
                                o->page_size, " tokens");
  }
  if (o->num_pages == 0) o->num_pages = o->max_sequences * pages_per_sequence;
  return CheckRange(kCreate, "num_pages", o->num_pages, 1, kMax);
}

// Logit rows of one step: those that are sampled come first, so that they form
// one matrix for the sampler.
struct LogitPlan {
  int32_t num_sampled = 0;
  int32_t num_rows = 0;
};

int32_t NumLogitRows(const StepRow& row) {
  if (row.logits_mode == LogitsMode::kAll) return row.num_tokens;
  return row.sample || row.logits_mode == LogitsMode::kLast ? 1 : 0;
}

double Microseconds() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

struct Session::Impl {
  std::shared_ptr<const Model> model;
  SessionOptions options;
  StepLimits limits;
  OwnedStream stream;
  std::unique_ptr<CublasLt> cublas_lt;
  MoeKernelFile moe_kernel_file;
  MoeKernelTable moe_kernels;  // of that file; empty without one
  KvCache cache;
  Activations activations;
  StepBuffers buffers;
  bool is_broken = false;

  // Of the step under way; they keep their memory.
  std::vector<AppendRow> append;
  std::vector<int32_t> expert_ids;        // host copy, with count_experts
  std::vector<char> expert_is_used;       // of one layer
  std::vector<int32_t> distinct_experts;  // of each sparse layer

  Status CheckUsable(const char* what) const;
  Status CheckTokens(const std::vector<StepRow>& rows) const;
  Status CheckRows(const std::vector<StepRow>& rows) const;
  Status CheckTotals(const std::vector<StepRow>& rows) const;
  void FillInputs(const std::vector<StepRow>& rows);
  LogitPlan PlanLogits(const std::vector<StepRow>& rows);
  Status Execute(const std::vector<StepRow>& rows, const LogitPlan& plan);
  Status CopyLogits(const std::vector<StepRow>& rows, const LogitPlan& plan);
  Status CountExperts(int64_t tokens);
  void Recover() noexcept;
};

// Undoes an append that did not get to its end, and finds out whether the
// session can go on.
void Session::Impl::Recover() noexcept {
  cache.RollbackAppend();
  try {
    // Work that was enqueued may still write to the callers' logits.
    is_broken = !Synchronize(model->device, stream.get()).ok();
  } catch (...) {
    is_broken = true;  // it had no memory to say so
  }
}

Status Session::Impl::CheckUsable(const char* what) const {
  if (!is_broken) return Status();
  return UnavailableError(what,
                          ": an error of the device has left the session "
                          "unable to go on; destroy it");
}

Status Session::Impl::CheckTokens(const std::vector<StepRow>& rows) const {
  const int64_t vocab = model->config.vocab_size;
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    for (int32_t j = 0; j < row.num_tokens; ++j) {
      if (row.tokens[j] >= 0 && row.tokens[j] < vocab) continue;
      return InvalidArgumentError(kStep, ": rows[", i, "].tokens[", j, "] is ",
                                  row.tokens[j], ", expected 0 to ", vocab - 1);
    }
  }
  return Status();
}

// Checks what needs neither the cache, which checks sequences and pages, nor a
// look at the tokens, of which there may be too many.
Status Session::Impl::CheckRows(const std::vector<StepRow>& rows) const {
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    if (row.tokens == nullptr || row.num_tokens <= 0) {
      return InvalidArgumentError(kStep, ": rows[", i, "] has no tokens");
    }
    if (row.logits_mode != LogitsMode::kNone && row.logits == nullptr) {
      return InvalidArgumentError(kStep, ": rows[", i,
                                  "].logits is null, with a logits_mode");
    }
    if (!row.sample) continue;
    const Status sampling = ValidateSamplingParams(row.sampling);
    if (!sampling.ok()) {
      return InvalidArgumentError(kStep, ": rows[", i,
                                  "].sampling: ", sampling.message());
    }
  }
  return Status();
}

Status Session::Impl::CheckTotals(const std::vector<StepRow>& rows) const {
  int64_t tokens = 0;
  int64_t logit_rows = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    tokens += rows[i].num_tokens;
    logit_rows += NumLogitRows(rows[i]);
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
  return Status();
}

// Fills the host side of all inputs but the logit rows, for an append that is
// committed.
void Session::Impl::FillInputs(const std::vector<StepRow>& rows) {
  int32_t tokens = 0;
  buffers.query_start()[0] = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const StepRow& row = rows[i];
    const StatusOr<int32_t> length = cache.Length(row.sequence);
    const int32_t first = *length - row.num_tokens;
    for (int32_t j = 0; j < row.num_tokens; ++j) {
      buffers.token_ids()[tokens + j] = row.tokens[j];
      buffers.positions()[tokens + j] = first + j;
    }
    tokens += row.num_tokens;
    buffers.query_start()[i + 1] = tokens;
    buffers.kv_len()[i] = *length;
  }
  cache.FillSlotMapping(buffers.slot_mapping());
  cache.FillBlockTable(buffers.block_table(), limits.max_pages_per_row);
}

// Fills the tokens whose logits to compute, the sampled ones first, and the
// parameters of those.
LogitPlan Session::Impl::PlanLogits(const std::vector<StepRow>& rows) {
  LogitPlan plan;
  const int32_t* query_start = buffers.query_start();
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].sample) continue;
    SamplingParams* sampling = &buffers.sampling()[plan.num_sampled];
    *sampling = rows[i].sampling;
    sampling->position = static_cast<uint64_t>(buffers.kv_len()[i]);
    buffers.logit_rows()[plan.num_sampled++] = query_start[i + 1] - 1;
  }
  plan.num_rows = plan.num_sampled;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int32_t wanted = NumLogitRows(rows[i]);
    const int32_t end = query_start[i + 1] - (rows[i].sample ? 1 : 0);
    for (int32_t j = query_start[i + 1] - wanted; j < end; ++j) {
      buffers.logit_rows()[plan.num_rows++] = j;
    }
  }
  return plan;
}

Status Session::Impl::Execute(const std::vector<StepRow>& rows,
                              const LogitPlan& plan) {
  const int32_t num_rows = static_cast<int32_t>(rows.size());
  const StepInputs inputs = buffers.Inputs(num_rows, plan.num_rows);
  TENON_RETURN_IF_ERROR(cache.CopyPages(stream.get()));
  TENON_RETURN_IF_ERROR(buffers.Upload(num_rows, stream.get()));
  const StepContext context{model->config,
                            model->weights,
                            cache,
                            activations,
                            inputs,
                            cublas_lt.get(),
                            options.batch_invariant,
                            stream.get(),
                            &moe_kernels};
  TENON_RETURN_IF_ERROR(DecodeStep(context));
  if (plan.num_sampled > 0) {
    TENON_RETURN_IF_ERROR(
        Sampler(buffers.Sampling(activations, plan.num_sampled), stream.get()));
  }
  TENON_RETURN_IF_ERROR(CopyLogits(rows, plan));
  TENON_RETURN_IF_ERROR(buffers.Download(stream.get()));
  return Synchronize(model->device, stream.get());
}

// Copies logits to the callers that asked, in the order of PlanLogits.
Status Session::Impl::CopyLogits(const std::vector<StepRow>& rows,
                                 const LogitPlan& plan) {
  const int64_t vocab = model->config.vocab_size;
  const auto copy = [&](int32_t from_row, int32_t count, float* to) {
    return CopyMemory(
        to, Device(), activations.logits.As<float>() + from_row * vocab,
        model->device, static_cast<size_t>(count * vocab) * sizeof(float),
        stream.get());
  };
  int32_t sampled = 0;
  int32_t other = plan.num_sampled;
  for (const StepRow& row : rows) {
    const int32_t wanted = NumLogitRows(row);
    const int32_t others = wanted - (row.sample ? 1 : 0);
    if (row.logits_mode != LogitsMode::kNone) {
      TENON_RETURN_IF_ERROR(copy(other, others, row.logits));
      if (row.sample) {
        TENON_RETURN_IF_ERROR(copy(sampled, 1, row.logits + others * vocab));
      }
    }
    sampled += row.sample;
    other += others;
  }
  return Status();
}

// Fills distinct_experts.
Status Session::Impl::CountExperts(int64_t tokens) {
  distinct_experts.clear();
  const TensorView& ids = activations.topk_ids;
  if (!options.count_experts || !ids.present()) return Status();
  expert_ids.resize(static_cast<size_t>(tokens * ids.shape[2]));
  for (int32_t layer = 0; layer < model->config.num_layers; ++layer) {
    if (!model->config.IsMoeLayer(layer)) continue;
    TENON_RETURN_IF_ERROR(CopyMemory(
        expert_ids.data(), Device(), activations.TopkIds(layer).data,
        model->device, expert_ids.size() * sizeof(int32_t), stream.get()));
    TENON_RETURN_IF_ERROR(Synchronize(model->device, stream.get()));
    std::fill(expert_is_used.begin(), expert_is_used.end(), 0);
    for (int32_t id : expert_ids) expert_is_used[static_cast<size_t>(id)] = 1;
    distinct_experts.push_back(static_cast<int32_t>(
        std::count(expert_is_used.begin(), expert_is_used.end(), 1)));
  }
  return Status();
}

StatusOr<std::unique_ptr<Session>> Session::Create(
    std::shared_ptr<const Model> model, const SessionOptions& options) {
  if (model == nullptr) return InvalidArgumentError("Session: model is null");
  auto impl = std::make_unique<Impl>();
  impl->model = std::move(model);
  impl->options = options;
  const Model& m = *impl->model;
  SessionOptions& o = impl->options;
  TENON_RETURN_IF_ERROR(ResolveOptions(m.config, &o));
  if (!o.moe_kernels_path.empty()) {
    StatusOr<MoeKernelFile> file = ReadMoeKernelFile(o.moe_kernels_path);
    TENON_RETURN_IF_ERROR(file.status());
    impl->moe_kernel_file = *std::move(file);
    impl->moe_kernels = impl->moe_kernel_file.table();
  }
  StatusOr<LocalShape> local = MakeLocalShape(m.config, m.shard);
  TENON_RETURN_IF_ERROR(local.status());

  KvCacheOptions c;
  c.num_layers = m.config.num_layers;
  c.num_kv_heads = local->num_kv_heads;
  c.head_dim = m.config.head_dim;
  c.dtype = m.weights.dtype;
  c.device = m.device;
  c.page_size = o.page_size;
  c.max_sequences = o.max_sequences;
  c.max_context = o.max_context;
  TENON_RETURN_IF_ERROR(ResolvePages(c, &o));
  c.num_pages = o.num_pages;
  StatusOr<KvCache> cache = KvCache::Create(c);
  TENON_RETURN_IF_ERROR(cache.status());
  impl->cache = *std::move(cache);

  if (m.device.type == DeviceType::kCuda && !o.batch_invariant) {
    StatusOr<std::unique_ptr<CublasLt>> lt = CublasLt::Create(m.device);
    TENON_RETURN_IF_ERROR(lt.status());
    impl->cublas_lt = *std::move(lt);
  }
  impl->limits = {o.max_tokens,     o.max_sequences,
                  o.max_logit_rows, o.max_context,
                  o.page_size,      impl->cache.max_pages_per_sequence()};
  StatusOr<Activations> activations =
      Activations::Create(m.config, m.weights, impl->limits, o.count_experts,
                          impl->cublas_lt.get(), o.batch_invariant);
  TENON_RETURN_IF_ERROR(activations.status());
  impl->activations = *std::move(activations);
  StatusOr<StepBuffers> buffers = StepBuffers::Create(m.device, impl->limits);
  TENON_RETURN_IF_ERROR(buffers.status());
  impl->buffers = *std::move(buffers);
  StatusOr<OwnedStream> stream = OwnedStream::Create(m.device, o.num_threads);
  TENON_RETURN_IF_ERROR(stream.status());
  impl->stream = *std::move(stream);
  impl->append.reserve(static_cast<size_t>(o.max_sequences));
  if (o.count_experts && m.config.num_experts > 0) {
    impl->expert_ids.reserve(static_cast<size_t>(int64_t{o.max_tokens} *
                                                 m.config.num_experts_per_tok));
    impl->expert_is_used.resize(static_cast<size_t>(m.config.num_experts));
    impl->distinct_experts.reserve(static_cast<size_t>(m.config.num_layers));
  }
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

StatusOr<SequenceId> Session::CreateSequence() {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("CreateSequence"));
  return impl_->cache.CreateSequence();
}

StatusOr<SequenceId> Session::ForkSequence(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("ForkSequence"));
  return impl_->cache.Fork(sequence);
}

Status Session::TruncateSequence(SequenceId sequence, int32_t length) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("TruncateSequence"));
  return impl_->cache.Truncate(sequence, length);
}

Status Session::ReleaseSequence(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("ReleaseSequence"));
  return impl_->cache.Release(sequence);
}

StatusOr<int32_t> Session::SequenceLength(SequenceId sequence) const {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("SequenceLength"));
  return impl_->cache.Length(sequence);
}

Status Session::Step(const std::vector<StepRow>& rows,
                     std::vector<StepRowResult>* results, StepStats* stats) {
  const double begin = Microseconds();
  Impl& s = *impl_;
  TENON_RETURN_IF_ERROR(s.CheckUsable(kStep));
  TENON_RETURN_IF_ERROR(s.CheckRows(rows));
  TENON_RETURN_IF_ERROR(s.CheckTotals(rows));
  TENON_RETURN_IF_ERROR(s.CheckTokens(rows));
  // What could fail at the end, when there is no way back.
  results->reserve(rows.size());
  if (stats != nullptr) {
    stats->distinct_experts.reserve(s.distinct_experts.capacity());
  }
  s.append.clear();
  for (const StepRow& row : rows) {
    s.append.push_back({row.sequence, row.num_tokens});
  }
  TENON_RETURN_IF_ERROR(s.cache.PlanAppend(s.append));
  int32_t tokens;
  try {
    s.cache.CommitAppend();
    s.FillInputs(rows);
    tokens = s.buffers.query_start()[rows.size()];
    Status status;
    if (!rows.empty()) status = s.Execute(rows, s.PlanLogits(rows));
    if (status.ok() && stats != nullptr) status = s.CountExperts(tokens);
    if (!status.ok()) {
      s.Recover();
      return status;
    }
  } catch (...) {  // no memory for the message of an error
    s.Recover();
    throw;
  }
  s.cache.FinishAppend();

  // Only now: a row's tokens may point into the results of the last step.
  results->assign(rows.size(), StepRowResult());
  int32_t sampled = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].sample) continue;
    (*results)[i] = {s.buffers.tokens()[sampled], s.buffers.logprobs()[sampled],
                     static_cast<SampleStatus>(s.buffers.statuses()[sampled])};
    ++sampled;
  }
  if (stats != nullptr) {
    stats->rows = static_cast<int32_t>(rows.size());
    stats->tokens = tokens;
    stats->distinct_experts.assign(s.distinct_experts.begin(),
                                   s.distinct_experts.end());
    stats->microseconds = Microseconds() - begin;
  }
  return Status();
}

const Model& Session::model() const { return *impl_->model; }
const SessionOptions& Session::options() const { return impl_->options; }
int32_t Session::num_sequences() const { return impl_->cache.num_sequences(); }
bool Session::is_broken() const { return impl_->is_broken; }
int64_t Session::num_free_pages() const {
  return impl_->cache.num_free_pages();
}
int64_t Session::kv_cache_bytes() const { return impl_->cache.bytes(); }

}  // namespace tenon
