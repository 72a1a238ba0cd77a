#include "engine/model.h"

#include <utility>

#include "engine/checkpoint.h"

namespace tenon {

StatusOr<std::shared_ptr<const Model>> Model::Load(const std::string& directory,
                                                   Device device,
                                                   const LoadOptions& options) {
  StatusOr<ModelConfig> config = LoadModelConfig(directory);
  TENON_RETURN_IF_ERROR(config.status());
  StatusOr<std::shared_ptr<const Checkpoint>> checkpoint =
      Checkpoint::Open(directory);
  TENON_RETURN_IF_ERROR(checkpoint.status());
  StatusOr<Weights> weights =
      LoadWeights(*std::move(checkpoint), *config, device, options);
  TENON_RETURN_IF_ERROR(weights.status());
  auto model = std::make_shared<Model>();
  model->config = *std::move(config);
  model->weights = *std::move(weights);
  model->device = device;
  model->shard = options.shard;
  return std::shared_ptr<const Model>(std::move(model));
}

StatusOr<std::shared_ptr<const Model>> Model::Random(const ModelConfig& config,
                                                     DType dtype, Device device,
                                                     uint64_t seed,
                                                     const Shard& shard) {
  TENON_RETURN_IF_ERROR(config.Validate());
  StatusOr<Weights> weights = RandomWeights(config, dtype, device, shard, seed);
  TENON_RETURN_IF_ERROR(weights.status());
  auto model = std::make_shared<Model>();
  model->config = config;
  model->weights = *std::move(weights);
  model->device = device;
  model->shard = shard;
  return std::shared_ptr<const Model>(std::move(model));
}

}  // namespace tenon
