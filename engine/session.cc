#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "engine/step_buffers.h"
#include "engine/step_graphs.h"
#include "engine/step_rows.h"
#include "ops/core/memory.h"
#include "ops/core/validate.h"
#include "ops/linear/cublas_lt.h"

namespace tenon {
namespace {

constexpr char kCreate[] = "Session";

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
  MoeKernelTable moe_kernels;  // of the options; empty without one
  KvCache cache;
  Activations activations;
  StepBuffers buffers;
  DecodeBuckets buckets;  // none on the CPU
  StepGraphs graphs;      // one for each bucket, or none
  bool is_broken = false;

  // Of the step under way; they keep their memory.
  std::vector<AppendRow> append;
  std::vector<LogitPlace> logit_places;  // of each row
  Buffer expert_ids;  // [layers, tokens, top_k] int32, with count_experts
  std::vector<char> expert_is_used;       // of one layer
  std::vector<int32_t> distinct_experts;  // of each sparse layer

  Status CheckUsable(const char* what) const;
  Status CaptureGraphs();
  Status EnqueueModel();
  Status Execute(const std::vector<StepRow>& rows);
  Status CopyLogits(const std::vector<StepRow>& rows);
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

// Enqueues the model and the sampler over what the buffers' arrays on the
// device will hold by then.
Status Session::Impl::EnqueueModel() {
  const StepInputs inputs = buffers.Inputs();
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
  if (buffers.shape().sampled_rows == 0) return Status();
  return Sampler(buffers.Sampling(activations), stream.get());
}

// A first run, of padding alone, loads the kernels, and has cuBLASLt choose its
// algorithms.
Status Session::Impl::CaptureGraphs() {
  const auto enqueue = [this] { return EnqueueModel(); };
  for (const int32_t bucket : buckets.sizes()) {
    buffers.SetShape(DecodeShape(bucket));
    buffers.FillPadding(0);
    TENON_RETURN_IF_ERROR(buffers.Upload(stream.get()));
    TENON_RETURN_IF_ERROR(EnqueueModel());
    TENON_RETURN_IF_ERROR(Synchronize(model->device, stream.get()));
    TENON_RETURN_IF_ERROR(
        graphs.Capture(bucket, model->device, stream.get(), enqueue));
  }
  return Synchronize(model->device, stream.get());
}

Status Session::Impl::Execute(const std::vector<StepRow>& rows) {
  TENON_RETURN_IF_ERROR(cache.CopyPages(stream.get()));
  TENON_RETURN_IF_ERROR(buffers.Upload(stream.get()));
  const StepShape& shape = buffers.shape();
  const Graph* graph = shape.is_decode ? graphs.Find(shape.rows) : nullptr;
  TENON_RETURN_IF_ERROR(graph != nullptr ? graph->Launch(stream.get())
                                         : EnqueueModel());
  TENON_RETURN_IF_ERROR(CopyLogits(rows));
  TENON_RETURN_IF_ERROR(buffers.Download(stream.get()));
  return Synchronize(model->device, stream.get());
}

// Copies logits to the callers that asked.
Status Session::Impl::CopyLogits(const std::vector<StepRow>& rows) {
  const int64_t vocab = model->config.vocab_size;
  const auto copy = [&](int32_t from_row, int32_t count, float* to) {
    return CopyMemory(
        to, Device(), activations.logits.As<float>() + from_row * vocab,
        model->device, static_cast<size_t>(count * vocab) * sizeof(float),
        stream.get());
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].logits_mode == LogitsMode::kNone) continue;
    const LogitPlace& place = logit_places[i];
    const int32_t others = NumLogitRows(rows[i]) - 1;
    TENON_RETURN_IF_ERROR(copy(place.others, others, rows[i].logits));
    TENON_RETURN_IF_ERROR(copy(place.last, 1, rows[i].logits + others * vocab));
  }
  return Status();
}

// Fills distinct_experts. Padding comes after the tokens, and is left out.
Status Session::Impl::CountExperts(int64_t tokens) {
  distinct_experts.clear();
  const int64_t ids_per_layer = tokens * model->config.num_experts_per_tok;
  auto* ids = static_cast<int32_t*>(expert_ids.data());
  if (ids == nullptr) return Status();
  for (int32_t layer = 0; layer < model->config.num_layers; ++layer) {
    if (!model->config.IsMoeLayer(layer)) continue;
    TENON_RETURN_IF_ERROR(CopyMemory(
        ids + layer * ids_per_layer, Device(), activations.TopkIds(layer).data,
        model->device, static_cast<size_t>(ids_per_layer) * sizeof(int32_t),
        stream.get()));
  }
  TENON_RETURN_IF_ERROR(Synchronize(model->device, stream.get()));
  for (int32_t layer = 0; layer < model->config.num_layers; ++layer) {
    if (!model->config.IsMoeLayer(layer)) continue;
    std::fill(expert_is_used.begin(), expert_is_used.end(), 0);
    for (int64_t i = 0; i < ids_per_layer; ++i) {
      expert_is_used[static_cast<size_t>(ids[layer * ids_per_layer + i])] = 1;
    }
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
  if (o.moe_kernels != nullptr) {
    impl->moe_kernels = o.moe_kernels->table();
    TENON_RETURN_IF_ERROR(
        CheckMoeKernelTable("Session: moe_kernels", impl->moe_kernels));
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
  impl->logit_places.reserve(static_cast<size_t>(o.max_sequences));
  if (o.count_experts && m.config.num_experts > 0) {
    const bool cuda = m.device.type == DeviceType::kCuda;
    StatusOr<Buffer> ids = Buffer::Allocate(
        m.device,
        static_cast<size_t>(NumElements(impl->activations.topk_ids)) *
            sizeof(int32_t),
        cuda ? MemoryKind::kPinned : MemoryKind::kDevice);
    TENON_RETURN_IF_ERROR(ids.status());
    impl->expert_ids = *std::move(ids);
    impl->expert_is_used.resize(static_cast<size_t>(m.config.num_experts));
    impl->distinct_experts.reserve(static_cast<size_t>(m.config.num_layers));
  }
  if (m.device.type == DeviceType::kCuda) {
    impl->buckets = DecodeBuckets(
        std::min({o.max_sequences, o.max_tokens, o.max_logit_rows}));
    if (o.cuda_graphs) TENON_RETURN_IF_ERROR(impl->CaptureGraphs());
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
  TENON_RETURN_IF_ERROR(s.CheckUsable("Step"));
  TENON_RETURN_IF_ERROR(
      CheckStepRows(rows, s.options, s.model->config.vocab_size));
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
  int32_t tokens = 0;
  for (const StepRow& row : rows) tokens += row.num_tokens;
  try {
    s.cache.CommitAppend();
    Status status;
    if (!rows.empty()) {
      s.buffers.SetShape(ShapeOf(rows, s.buckets));
      FillStep(rows, s.cache, &s.buffers, &s.logit_places);
      status = s.Execute(rows);
    }
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
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!rows[i].sample) continue;
    const int32_t at = s.logit_places[i].last;
    (*results)[i] = {s.buffers.tokens()[at], s.buffers.logprobs()[at],
                     static_cast<SampleStatus>(s.buffers.statuses()[at])};
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
int64_t Session::num_graphs() const { return impl_->graphs.num_graphs(); }
int64_t Session::graph_bytes() const { return impl_->graphs.device_bytes(); }

}  // namespace tenon
