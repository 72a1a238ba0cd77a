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

// Every block of scales at a multiple of 128.
Share AlignToBlocks(Share share) {
  const int64_t before = share.first % kFp8BlockSize;
  const int64_t left = kFp8BlockSize - before;  // of the first block
  if (before == 0 || left >= share.count) return share;
  const int64_t blocks =
      (share.count - left + kFp8BlockSize - 1) / kFp8BlockSize;
  share.wrapped = left;
  share.size = blocks * kFp8BlockSize + left;
  return share;
}

Status SplitIntermediate(const char* field, const ModelConfig& config,
                         int32_t size, const Shard& shard, Share* share) {
  int32_t first = 0;
  int32_t count = 0;
  TENON_RETURN_IF_ERROR(SplitEvenly(field, size, shard, &first, &count));
  *share = MakeShare(first, count);
  if (config.fp8_scaling == Fp8Scaling::kBlocks) *share = AlignToBlocks(*share);
  return Status();
}

// Heads keep their order, so a rank's rows or columns must begin at a block or
// lie in one.
Status CheckHeads(const char* field, const ModelConfig& config,
                  const Shard& shard, int32_t first, int32_t count) {
  const int64_t begin = int64_t{first} * config.head_dim;
  const int64_t last = begin + int64_t{count} * config.head_dim - 1;
  if (config.fp8_scaling != Fp8Scaling::kBlocks || begin % kFp8BlockSize == 0 ||
      begin / kFp8BlockSize == last / kFp8BlockSize) {
    return Status();
  }
  return UnimplementedError(
      "tensor parallelism: with world_size ", shard.world_size, ", rank ",
      shard.rank, " has ", count, " of ", field, " from ", first,
      " on, which begin within a block of 128 x 128 fp8 weights (head_dim ",
      config.head_dim, ")");
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
  TENON_RETURN_IF_ERROR(CheckHeads("num_attention_heads", config, shard,
                                   local.first_head, local.num_heads));
  TENON_RETURN_IF_ERROR(CheckHeads("num_key_value_heads", config, shard,
                                   local.first_kv_head, local.num_kv_heads));
  if (config.HasMoeLayers()) {
    TENON_RETURN_IF_ERROR(SplitIntermediate("moe_intermediate_size", config,
                                            config.moe_intermediate_size, shard,
                                            &local.moe_intermediate));
  }
  if (config.HasDenseLayers()) {
    TENON_RETURN_IF_ERROR(SplitIntermediate("intermediate_size", config,
                                            config.intermediate_size, shard,
                                            &local.intermediate));
  }
  return local;
}

}  // namespace tenon
