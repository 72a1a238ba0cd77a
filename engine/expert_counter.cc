#include "engine/expert_counter.h"

#include <algorithm>

namespace tenon {

StatusOr<ExpertCounter> ExpertCounter::Create(const ModelConfig& config,
                                              const Activations& activations) {
  ExpertCounter counter;
  counter.config_ = &config;
  counter.activations_ = &activations;
  const TensorView& ids = activations.topk_ids;
  StatusOr<Buffer> buffer = Buffer::Allocate(
      ids.device, static_cast<size_t>(NumElements(ids)) * sizeof(int32_t),
      HostMemoryKind(ids.device));
  TENON_RETURN_IF_ERROR(buffer.status());
  counter.ids_ = *std::move(buffer);
  counter.is_used_.resize(static_cast<size_t>(config.num_experts));
  return counter;
}

int32_t ExpertCounter::num_layers() const {
  int32_t count = 0;
  for (int32_t layer = 0; config_ != nullptr && layer < config_->num_layers;
       ++layer) {
    count += config_->IsMoeLayer(layer);
  }
  return count;
}

Status ExpertCounter::Enqueue(int64_t tokens, Stream stream) {
  if (config_ == nullptr) return Status();
  ids_per_layer_ = tokens * config_->num_experts_per_tok;
  const TensorView first = activations_->TopkIds(0, tokens);
  return CopyPinned(ids_.data(), first.data, first.device,
                    static_cast<size_t>(config_->num_layers * ids_per_layer_) *
                        sizeof(int32_t),
                    stream);
}

void ExpertCounter::Count(std::vector<int32_t>* counts) {
  counts->clear();
  if (config_ == nullptr) return;
  for (int32_t layer = 0; layer < config_->num_layers; ++layer) {
    if (!config_->IsMoeLayer(layer)) continue;
    const auto* ids =
        static_cast<const int32_t*>(ids_.data()) + layer * ids_per_layer_;
    std::fill(is_used_.begin(), is_used_.end(), 0);
    for (int64_t i = 0; i < ids_per_layer_; ++i) {
      if (ids[i] >= 0) is_used_[static_cast<size_t>(ids[i])] = 1;
    }
    counts->push_back(
        static_cast<int32_t>(std::count(is_used_.begin(), is_used_.end(), 1)));
  }
}

}  // namespace tenon
