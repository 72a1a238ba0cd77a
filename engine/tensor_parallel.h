#ifndef TENON_ENGINE_TENSOR_PARALLEL_H_
#define TENON_ENGINE_TENSOR_PARALLEL_H_

#include <cstdint>

#include "engine/model_config.h"
#include "ops/core/status.h"

namespace tenon {

// Which part of a tensor-parallel model this process holds.
struct Shard {
  int32_t rank = 0;
  int32_t world_size = 1;
};

// The sizes of one rank, and where in the model's they begin. Query heads and
// the intermediate sizes of experts and dense layers are split evenly. KV heads
// are too, unless there are fewer of them than ranks: then each rank has the
// one that its query heads read, and several ranks have the same. All else
// (embedding, norms, router, LM head) is whole on every rank.
struct LocalShape {
  int32_t num_heads = 0;
  int32_t first_head = 0;
  int32_t num_kv_heads = 0;
  int32_t first_kv_head = 0;
  int32_t moe_intermediate_size = 0;  // 0 in a model without experts
  int32_t first_moe_intermediate = 0;
  int32_t intermediate_size = 0;  // 0 in a model without dense layers
  int32_t first_intermediate = 0;
};

// InvalidArgument naming the field that world_size does not divide, or a shard
// that is none. `config` must be valid.
StatusOr<LocalShape> MakeLocalShape(const ModelConfig& config,
                                    const Shard& shard);

}  // namespace tenon

#endif  // TENON_ENGINE_TENSOR_PARALLEL_H_
