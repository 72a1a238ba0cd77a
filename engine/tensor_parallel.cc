#include "engine/tensor_parallel.h"

namespace tenon {
namespace {

Status SplitEvenly(const char* field, int32_t size, const Shard& shard,
                   int32_t* first, int32_t* count) {
  if (size % shard.world_size != 0) {
    return InvalidArgumentError("tensor parallelism: ", field, " is ", size,
                                ", expected a multiple of world_size (",
                                shard.world_size, ")");
  }
  *count = size / shard.world_size;
  *first = shard.rank * *count;
  return Status();
}

Status SplitKvHeads(const ModelConfig& config, const Shard& shard,
                    LocalShape* local) {
  if (config.num_kv_heads >= shard.world_size) {
    return SplitEvenly("num_key_value_heads", config.num_kv_heads, shard,
                       &local->first_kv_head, &local->num_kv_heads);
  }
  if (shard.world_size % config.num_kv_heads != 0) {
    return InvalidArgumentError(
        "tensor parallelism: num_key_value_heads is ", config.num_kv_heads,
        ", expected a divisor of world_size (", shard.world_size, ")");
  }
  // num_heads and num_kv_heads both divide evenly, so that all query heads of a
  // rank read one KV head.
  local->num_kv_heads = 1;
  local->first_kv_head = shard.rank / (shard.world_size / config.num_kv_heads);
  return Status();
}

}  // namespace

StatusOr<LocalShape> MakeLocalShape(const ModelConfig& config,
                                    const Shard& shard) {
  if (shard.world_size < 1 || shard.rank < 0 ||
      shard.rank >= shard.world_size) {
    return InvalidArgumentError("tensor parallelism: rank is ", shard.rank,
                                " of world_size ", shard.world_size,
                                ", expected 0 to world_size - 1");
  }
  LocalShape local;
  TENON_RETURN_IF_ERROR(SplitEvenly("num_attention_heads", config.num_heads,
                                    shard, &local.first_head,
                                    &local.num_heads));
  TENON_RETURN_IF_ERROR(SplitKvHeads(config, shard, &local));
  if (config.HasMoeLayers()) {
    TENON_RETURN_IF_ERROR(SplitEvenly(
        "moe_intermediate_size", config.moe_intermediate_size, shard,
        &local.first_moe_intermediate, &local.moe_intermediate_size));
  }
  if (config.HasDenseLayers()) {
    TENON_RETURN_IF_ERROR(
        SplitEvenly("intermediate_size", config.intermediate_size, shard,
                    &local.first_intermediate, &local.intermediate_size));
  }
  return local;
}

}  // namespace tenon
