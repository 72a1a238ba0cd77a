#include "tests/bench/decode_profile.h"

#include <utility>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "engine/kv_cache.h"
#include "ops/core/graph.h"
#include "ops/embedding/embedding.h"
#include "ops/linear/cublas_lt.h"
#include "ops/rms_norm/rms_norm.h"
#include "ops/sampler/sampler.h"

namespace tenon::bench {
namespace {

constexpr int32_t kPageSize = 16;

// Everything that a decode step works on, with a cache of nothing in
// particular.
class StepWorld {
 public:
  StepWorld(const Model& model, Stream stream, int32_t batch, int32_t context)
      : model_(model), stream_(stream), batch_(batch), tensors_(model.device) {
    const int32_t pages = (context + kPageSize - 1) / kPageSize;
    KvCacheOptions options;
    options.num_layers = model.config.num_layers;
    options.num_kv_heads = model.config.num_kv_heads;
    options.head_dim = model.config.head_dim;
    options.dtype = model.weights.dtype;
    options.device = model.device;
    options.page_size = kPageSize;
    options.num_pages = int64_t{batch} * pages;
    options.max_sequences = batch;
    options.max_context = pages * kPageSize;
    cache_ = Take(KvCache::Create(options));
    cublas_lt_ = Take(CublasLt::Create(model.device));
    const StepLimits limits = {batch,     batch, batch, options.max_context,
                               kPageSize, pages};
    activations_ = Take(Activations::Create(model.config, model.weights, limits,
                                            false, cublas_lt_.get(), false));
    FillInputs(context, pages);
    split_ = tensors_.Zeros(
        model.weights.dtype,
        {batch_, int64_t{model.config.num_heads} * model.config.head_dim});
  }

  Status Run(uint32_t ops, bool fuse) { return DecodeStep(Step(ops, fuse)); }

  // The step, not fused, with a norm of Q and K as frameworks put it together:
  // both copied out of the packed rows, normed, and copied back. QkNorm behind
  // it, which norms once more, stands for rotary embedding and cache write.
  Status RunSplitQkNorm() {
    const StepContext c = Step(~0u, false);
    TENON_RETURN_IF_ERROR(EmbedTokens(c));
    for (int32_t layer = 0; layer < model_.config.num_layers; ++layer) {
      const LayerWeights& w = model_.weights.layers[layer];
      TENON_RETURN_IF_ERROR(layer == 0 ? FirstNorm(c, w.input_norm)
                                       : AddNorm(c, w.input_norm));
      const uint32_t qkv = Bit(StepOp::kQkv);
      TENON_RETURN_IF_ERROR(AttentionBlock(Step(qkv, false), layer));
      const int64_t q_width = w.q.shape[0];
      TENON_RETURN_IF_ERROR(SplitAndNorm(0, q_width, w.q_norm));
      TENON_RETURN_IF_ERROR(SplitAndNorm(q_width, w.k.shape[0], w.k_norm));
      TENON_RETURN_IF_ERROR(AttentionBlock(Step(~qkv, false), layer));
      TENON_RETURN_IF_ERROR(AddNorm(c, w.post_attention_norm));
      TENON_RETURN_IF_ERROR(MlpBlock(c, layer));
    }
    TENON_RETURN_IF_ERROR(AddNorm(c, model_.weights.final_norm));
    return ComputeLogits(c);
  }

  Status RunSampler() {
    SamplerParams p;
    p.logits = Rows(activations_.logits, 0, batch_);
    p.params = sampling_;
    p.tokens = tokens_;
    p.logprobs = logprobs_;
    p.statuses = statuses_;
    p.workspace = activations_.workspace;
    p.workspace_size = activations_.workspace_size;
    return Sampler(p, stream_);
  }

 private:
  template <class T>
  static T Take(StatusOr<T> value) {
    CheckOk(value.status());
    return *std::move(value);
  }

  StepContext Step(uint32_t ops, bool fuse) const {
    return {model_.config, model_.weights,
            cache_,        activations_,
            inputs_,       cublas_lt_.get(),
            false,         stream_,
            nullptr,       ops,
            fuse};
  }

  // The heads in `width` columns of qkv from `first` on, normed by way of
  // split_.
  Status SplitAndNorm(int64_t first, int64_t width, const TensorView& weight) {
    const int64_t head_dim = model_.config.head_dim;
    const TensorView packed =
        Columns(Rows(activations_.qkv, 0, batch_), first, width);
    EmbeddingParams copy;  // a gather of all rows
    copy.ids = inputs_.logit_rows;
    copy.table = packed;
    copy.out =
        MakeTensor(split_.data, split_.dtype, split_.device, {batch_, width});
    TENON_RETURN_IF_ERROR(Embedding(copy, stream_));
    RmsNormParams norm;
    norm.x = norm.out = MakeTensor(split_.data, split_.dtype, split_.device,
                                   {batch_ * (width / head_dim), head_dim});
    norm.weight = weight;
    norm.epsilon = model_.config.rms_norm_eps;
    TENON_RETURN_IF_ERROR(RmsNorm(norm, stream_));
    std::swap(copy.table, copy.out);
    return Embedding(copy, stream_);
  }

  void FillInputs(int32_t context, int32_t pages) {
    std::vector<int32_t> ids(batch_), positions(batch_, context - 1),
        lengths(batch_, context), starts(batch_ + 1), rows(batch_),
        table(int64_t{batch_} * pages);
    std::vector<int64_t> slots(batch_);
    for (int32_t i = 0; i < batch_; ++i) {
      ids[i] = static_cast<int32_t>((i + 1) * 7919 % model_.config.vocab_size);
      starts[i + 1] = i + 1;
      rows[i] = i;
      slots[i] = int64_t{i} * pages * kPageSize + context - 1;
      for (int32_t p = 0; p < pages; ++p) table[i * pages + p] = i * pages + p;
    }
    inputs_.token_ids = tensors_.Of(ids, {batch_});
    inputs_.positions = tensors_.Of(positions, {batch_});
    inputs_.slot_mapping = tensors_.Of(slots, {batch_});
    inputs_.block_table = tensors_.Of(table, {batch_, pages});
    inputs_.query_start = tensors_.Of(starts, {batch_ + 1});
    inputs_.kv_len = tensors_.Of(lengths, {batch_});
    inputs_.logit_rows = tensors_.Of(rows, {batch_});
    inputs_.all_logits = true;
    inputs_.max_kv_len = context;
    inputs_.max_query_len = 1;
    SamplingParams greedy;
    greedy.temperature = 0.0f;
    sampling_ = tensors_.CopyOf(std::vector<SamplingParams>(batch_, greedy));
    tokens_ = tensors_.Zeros(DType::kInt32, {batch_});
    logprobs_ = tensors_.Zeros(DType::kFloat32, {batch_});
    statuses_ = tensors_.Zeros(DType::kInt32, {batch_});
  }

  const Model& model_;
  Stream stream_;
  int64_t batch_;
  Tensors tensors_;
  KvCache cache_;
  std::unique_ptr<CublasLt> cublas_lt_;
  Activations activations_;
  StepInputs inputs_;
  const SamplingParams* sampling_ = nullptr;
  TensorView tokens_, logprobs_, statuses_;
  TensorView split_;  // Q or K of all rows
};

OpProfile Time(const char* name, Device device, Stream stream,
               const std::function<Status()>& enqueue) {
  constexpr int kLaunches = 10;
  constexpr int kRounds = 3;
  CheckOk(enqueue());
  CheckOk(Synchronize(device, stream));
  StatusOr<Graph> graph = Graph::Capture(device, stream, enqueue);
  CheckOk(graph.status());
  std::vector<double> seconds;
  for (int round = 0; round < kRounds + 1; ++round) {
    CheckOk(Synchronize(device, stream));
    const double begin = Seconds();
    for (int i = 0; i < kLaunches; ++i) CheckOk(graph->Launch(stream));
    CheckOk(Synchronize(device, stream));
    if (round > 0) seconds.push_back((Seconds() - begin) / kLaunches);
  }
  return {name, graph->info().num_nodes, Median(seconds) * 1e6};
}

}  // namespace

std::vector<OpProfile> ProfileDecode(const Model& model, Stream stream,
                                     int32_t batch, int32_t context,
                                     bool fuse) {
  StepWorld world(model, stream, batch, context);
  const auto whole = [&] {
    TENON_RETURN_IF_ERROR(world.Run(~0u, fuse));
    return world.RunSampler();
  };
  CheckOk(whole());  // experts and tokens are those of a real step
  std::vector<OpProfile> profile;
  for (const auto& [name, op] :
       {std::pair("embedding", StepOp::kEmbedding),
        std::pair("norm", StepOp::kNorm), std::pair("qkv", StepOp::kQkv),
        std::pair("qk_norm", StepOp::kQkNorm),
        std::pair("attention", StepOp::kAttention),
        std::pair("o", StepOp::kOutput), std::pair("router", StepOp::kRouter),
        std::pair("moe", StepOp::kMoe),
        std::pair("lm_head", StepOp::kLmHead)}) {
    const uint32_t ops = Bit(op);
    profile.push_back(
        Time(name, model.device, stream, [&] { return world.Run(ops, fuse); }));
  }
  profile.push_back(Time("sampler", model.device, stream,
                         [&] { return world.RunSampler(); }));
  profile.push_back(Time("step", model.device, stream, whole));
  return profile;
}

OpProfile ProfileSplitQkNorm(const Model& model, Stream stream, int32_t batch,
                             int32_t context) {
  StepWorld world(model, stream, batch, context);
  return Time("step, split qk_norm", model.device, stream, [&] {
    TENON_RETURN_IF_ERROR(world.RunSplitQkNorm());
    return world.RunSampler();
  });
}

}  // namespace tenon::bench
