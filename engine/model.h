#ifndef TENON_ENGINE_MODEL_H_
#define TENON_ENGINE_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>

#include "engine/model_config.h"
#include "engine/tensor_parallel.h"
#include "engine/weights.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// A model's shapes and weights on one device. Immutable: any number of sessions
// may share it.
struct Model {
  ModelConfig config;
  Weights weights;
  Device device;
  Shard shard;

  // Reads a Hugging Face checkpoint directory as published. On the CPU the
  // weights stay mapped, uncopied; on CUDA they are uploaded.
  static StatusOr<std::shared_ptr<const Model>> Load(
      const std::string& directory, Device device,
      const LoadOptions& options = {});

  // A model with seeded random weights, made where they live: for benchmarks.
  // With config.fp8_scaling, fp8 ones (see RandomWeights).
  static StatusOr<std::shared_ptr<const Model>> Random(
      const ModelConfig& config, DType dtype, Device device, uint64_t seed,
      const Shard& shard = {});
};

}  // namespace tenon

#endif  // TENON_ENGINE_MODEL_H_
