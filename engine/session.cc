#include "engine/session.h"

#include <algorithm>
#include <utility>

#include "engine/session_impl.h"
#include "ops/core/validate.h"

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
  TENON_RETURN_IF_ERROR(
      CheckRange(kCreate, "max_logit_edits", o->max_logit_edits, 0, kMax << 6));
  TENON_RETURN_IF_ERROR(CheckRange(kCreate, "max_top_logprobs",
                                   o->max_top_logprobs, 0, kMaxTopLogprobs));
  if (o->max_logit_rows == 0) o->max_logit_rows = o->max_sequences;
  return CheckRange(kCreate, "max_logit_rows", o->max_logit_rows, 1, kMax);
}

Status CheckKvCacheDType(DType dtype, DType of_model) {
  if (dtype == DType::kInvalid || dtype == of_model ||
      dtype == DType::kFloat8E4M3) {
    return Status();
  }
  return InvalidArgumentError(kCreate, ": kv_cache_dtype is ", DTypeName(dtype),
                              ", expected ", DTypeName(of_model),
                              " or float8_e4m3");
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

// But for the number of pages.
KvCacheOptions KvCacheOptionsOf(const Model& model, const LocalShape& local,
                                const SessionOptions& o) {
  KvCacheOptions c;
  c.num_layers = model.config.num_layers;
  c.num_kv_heads = local.num_kv_heads;
  c.head_dim = model.config.head_dim;
  c.dtype = o.kv_cache_dtype == DType::kInvalid ? model.weights.dtype
                                                : o.kv_cache_dtype;
  c.k_scale = o.kv_cache_k_scale;
  c.v_scale = o.kv_cache_v_scale;
  c.device = model.device;
  c.page_size = o.page_size;
  c.max_sequences = o.max_sequences;
  c.max_context = o.max_context;
  return c;
}

}  // namespace

Status Session::Impl::CheckUsable(const char* what) const {
  if (!is_broken) return Status();
  return UnavailableError(what,
                          ": an error of the device has left the session "
                          "unable to go on; destroy it");
}

// What steps under way need, so that they allocate nothing.
Status Session::Impl::CreateFlights() {
  const auto rows = static_cast<size_t>(options.max_sequences);
  append.reserve(rows);
  logit_places.reserve(rows);
  last_drawn.Reserve(rows);
  mirostat.Reserve(options.max_sequences);
  for (Flight& flight : flights) {
    StatusOr<Event> done = Event::Create(model->device);
    TENON_RETURN_IF_ERROR(done.status());
    flight.done = *std::move(done);
    flight.drawn.Reserve(rows);
    flight.mirostat.reserve(rows);
    if (!options.count_experts || !model->config.HasMoeLayers()) continue;
    StatusOr<ExpertCounter> experts =
        ExpertCounter::Create(model->config, activations);
    TENON_RETURN_IF_ERROR(experts.status());
    flight.experts = *std::move(experts);
  }
  return Status();
}

// A first run, of padding alone, loads the kernels, and has cuBLASLt choose its
// algorithms.
Status Session::Impl::CaptureGraphs() {
  const auto enqueue = [this] { return EnqueueModel(); };
  for (const int32_t bucket : buckets.sizes()) {
    buffers.Begin(0, DecodeShape(bucket));
    buffers.FillPadding(0);
    buffers.FinishSampledRows();
    TENON_RETURN_IF_ERROR(buffers.Upload(stream.get()));
    TENON_RETURN_IF_ERROR(EnqueueModel());
    TENON_RETURN_IF_ERROR(Synchronize(model->device, stream.get()));
    TENON_RETURN_IF_ERROR(
        graphs.Capture(bucket, model->device, stream.get(), enqueue));
  }
  return Synchronize(model->device, stream.get());
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
  TENON_RETURN_IF_ERROR(CheckKvCacheDType(o.kv_cache_dtype, m.weights.dtype));
  if (o.moe_kernels != nullptr) {
    impl->moe_kernels = o.moe_kernels->table();
    TENON_RETURN_IF_ERROR(
        CheckMoeKernelTable("Session: moe_kernels", impl->moe_kernels));
  }
  if (m.shard.world_size != 1) {
    return UnimplementedError("Session: the model has rank ", m.shard.rank,
                              " of world_size ", m.shard.world_size,
                              ", and nothing adds up the ranks' parts");
  }
  StatusOr<LocalShape> local = MakeLocalShape(m.config, m.shard);
  TENON_RETURN_IF_ERROR(local.status());

  KvCacheOptions c = KvCacheOptionsOf(m, *local, o);
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
                  o.page_size,      impl->cache.max_pages_per_sequence(),
                  o.max_logit_edits};
  if (o.logit_bitmasks) {
    impl->limits.bitmask_words = (m.config.vocab_size + 31) / 32;
  }
  impl->limits.max_top_logprobs = o.max_top_logprobs;
  impl->limits.kv_cache_dtype = c.dtype;
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
  TENON_RETURN_IF_ERROR(impl->CreateFlights());
  if (m.device.type == DeviceType::kCuda) {
    impl->buckets = DecodeBuckets(
        std::min({o.max_sequences, o.max_tokens, o.max_logit_rows}));
    if (o.cuda_graphs) TENON_RETURN_IF_ERROR(impl->CaptureGraphs());
  }
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() {
  // What is under way may write to the callers' logits.
  if (impl_->num_in_flight > 0) impl_->Recover();
}

StatusOr<SequenceId> Session::CreateSequence() {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("CreateSequence"));
  const StatusOr<SequenceId> created = impl_->cache.CreateSequence();
  if (created.ok()) impl_->mirostat.Forget(*created);
  return created;
}

StatusOr<SequenceId> Session::ForkSequence(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("ForkSequence"));
  Impl& s = *impl_;
  const StatusOr<SequenceId> fork = s.cache.Fork(sequence);
  if (!fork.ok()) return fork;
  s.mirostat.Forget(*fork);
  const int32_t from = s.mirostat.Find(sequence).from;
  if (from < 0) return fork;
  const int32_t to = s.mirostat.Find(*fork).to;
  const Status copied = s.buffers.CopyMirostatMu(from, to, s.stream.get());
  if (copied.ok()) {
    s.mirostat.Moved(*fork, to);
    return fork;
  }
  TENON_RETURN_IF_ERROR(s.cache.Release(*fork));
  return copied;
}

Status Session::TruncateSequence(SequenceId sequence, int32_t length) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("TruncateSequence"));
  const Status truncated = impl_->cache.Truncate(sequence, length);
  if (truncated.ok() && length == 0) impl_->mirostat.Forget(sequence);
  return truncated;
}

Status Session::ReleaseSequence(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("ReleaseSequence"));
  return impl_->cache.Release(sequence);
}

StatusOr<int32_t> Session::SequenceLength(SequenceId sequence) const {
  TENON_RETURN_IF_ERROR(impl_->CheckUsable("SequenceLength"));
  return impl_->cache.Length(sequence);
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
