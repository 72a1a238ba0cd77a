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

// A rank's share of a dimension: `count` entries of the whole, from `first` on.
// They lie in order, but that the first `wrapped` of them come last:
//   first + wrapped ... first + count - 1, padding, first ... first + wrapped -
//   1
// Padding, so that the last ones begin at a multiple of 128, stands for
// nothing: rows and columns of zeros.
struct Share {
  int64_t first = 0;
  int64_t count = 0;
  int64_t wrapped = 0;
  int64_t size = 0;  // padding included

  // Which entry of the whole the rank's entry `local` is; -1: padding.
  constexpr int64_t WholeIndex(int64_t local) const {
    if (local < count - wrapped) return first + wrapped + local;
    const int64_t last = local - (size - wrapped);
    return last >= 0 ? first + last : -1;
  }
};

constexpr Share MakeShare(int64_t first, int64_t count) {
  return {first, count, 0, count};
}

// The sizes of one rank, and where in the model's they begin. Query heads and
// the intermediate sizes of experts and dense layers are split evenly. KV heads
// are too, unless there are fewer of them than ranks: then each rank has the
// one that its query heads read, and several ranks have the same. All else
// (embedding, norms, router, LM head) is whole on every rank.
//
// float8_e4m3 with blocks of 128 x 128 (ModelConfig::fp8_scaling): a rank whose
// part begins within a block, such as columns 192 to 383 of 768, still has the
// published elements and scales, exactly. The order of intermediate channels is
// free as long as gate, up and down have the same, so what is left of that
// block (192 to 255) goes behind the rest and every block starts at a multiple
// of 128. Only where the end of the part is within a block as well (96 to 191)
// it costs padding. The order of heads is not free: where a rank's heads begin
// within a block and end in another one, which takes heads of 64, the split is
// refused.
struct LocalShape {
  int32_t num_heads = 0;
  int32_t first_head = 0;
  int32_t num_kv_heads = 0;
  int32_t first_kv_head = 0;
  Share moe_intermediate;  // of size 0 in a model without experts
  Share intermediate;      // of size 0 in a model without dense layers
};

// InvalidArgument naming the field that world_size does not divide, or a shard
// that is none; Unimplemented for heads that do not fit blocks. `config` must
// be valid.
StatusOr<LocalShape> MakeLocalShape(const ModelConfig& config,
                                    const Shard& shard);

}  // namespace tenon

#endif  // TENON_ENGINE_TENSOR_PARALLEL_H_
