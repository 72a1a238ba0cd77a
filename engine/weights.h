#ifndef TENON_ENGINE_WEIGHTS_H_
#define TENON_ENGINE_WEIGHTS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/model_config.h"
#include "engine/tensor_parallel.h"
#include "ops/core/memory.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"
#include "ops/moe/expert_matrices.h"

namespace tenon {

// The weights of one decoder layer, of this rank. H is hidden_size, D head_dim,
// I the rank's intermediate size; matrices are [out, in], as published.
//
// Attention projections, experts and dense MLPs may be float8_e4m3. Then there
// are float32 scales (see ModelConfig::fp8_scaling) of the shape that
// QuantizeFp8 writes: [ceil(out / 128), ceil(in / 128)], whose rows begin at
// multiples of 16 bytes, or [out]. All experts
// of a layer are alike; the other matrices may each be what they are.
struct LayerWeights {
  TensorView input_norm;  // [H]
  TensorView q;           // [heads * D, H]
  TensorView k;           // [kv_heads * D, H]
  TensorView v;           // [kv_heads * D, H]
  TensorView qkv;         // the three in one; CUDA only, and in fp8
                          // only if they fill whole blocks
  TensorView q_norm;      // [D]
  TensorView k_norm;      // [D]
  TensorView o;           // [H, heads * D]
  TensorView q_scales, k_scales, v_scales, qkv_scales, o_scales;
  TensorView post_attention_norm;  // [H]

  // Of a layer with experts (ModelConfig::IsMoeLayer).
  TensorView router;    // [E, H]
  ExpertMatrices gate;  // E x [I, H]
  ExpertMatrices up;    // E x [I, H]
  ExpertMatrices down;  // E x [H, I]

  // Of a dense layer.
  TensorView mlp_gate;  // [I, H]
  TensorView mlp_up;    // [I, H]
  TensorView mlp_down;  // [H, I]
  TensorView mlp_gate_scales, mlp_up_scales, mlp_down_scales;
};

// A rank's weights and the memory they are in. Move-only; views stay valid when
// it is moved.
//
// From a checkpoint on the CPU they are views into the mapped files, where
// nothing is copied: a rank's columns of o and down are strided, and experts
// are tables of pointers. Everywhere else they are packed into one allocation:
// q, k and v one after the other; the experts of a layer as w13 [E, 2 * I, H]
// (rows of gate, then of up) and w2 [E, H, I]. So are, also on the CPU, scales
// (in the same order), what is quantised while it is loaded, and the parts that
// are no range of the published tensor (see LocalShape).
struct Weights {
  TensorView embedding;   // [vocab, H]
  TensorView final_norm;  // [H]
  TensorView lm_head;     // [vocab, H]; the embedding, where they are tied
  std::vector<LayerWeights> layers;

  DType dtype = DType::kInvalid;  // of the embedding, and of all matrices that
                                  // are not float8_e4m3
  Device device;
  int64_t bytes = 0;  // of this rank's weights

  Buffer buffer;                                 // what was packed
  std::shared_ptr<const Checkpoint> checkpoint;  // what is mapped
  std::vector<const void*> expert_tables;
};

// Told now and then how much of the weights is in place; from the thread that
// loads. Returns whether to go on; otherwise the load ends as Cancelled.
using LoadProgress =
    std::function<bool(int64_t bytes_done, int64_t bytes_total)>;

// Tells `progress`, if there is one.
Status ReportProgress(const LoadProgress& progress, int64_t bytes_done,
                      int64_t bytes_total);

struct LoadOptions {
  Shard shard;
  // Attention projections, experts and dense MLPs that the checkpoint has in
  // float32, float16 or bfloat16 become float8_e4m3 with blocks of 128 x 128,
  // as QuantizeFp8 makes them. At world size 1 that is what fp8 checkpoints are
  // made by; otherwise blocks begin at the rank's first row and column.
  bool quantize_fp8 = false;
  LoadProgress progress;
};

// Finds a rank's weights in a checkpoint by their published names
// ("model.layers.0.self_attn.q_proj.weight", ...) and puts them on the device.
// Device memory is allocated once, at its exact size; only this rank's part is
// uploaded, through two small pinned buffers.
//
// All matrices have one dtype, float32, float16 or bfloat16; norms the same or
// float32. With ModelConfig::fp8_scaling, attention projections, experts and
// dense MLPs may be float8_e4m3 instead, and have float32 or bfloat16 scales
// under the name with fp8_scale_suffix. Elements and scales keep their values.
// NotFound for a missing tensor, InvalidArgument naming tensor, found and
// expected shape or dtype, ResourceExhausted naming the bytes needed.
StatusOr<Weights> LoadWeights(std::shared_ptr<const Checkpoint> checkpoint,
                              const ModelConfig& config, Device device,
                              const LoadOptions& options = {});

// Weights for benchmarks and tests, made where they live: bell-shaped with
// standard deviation 0.02, norms around 1. A value depends on seed, tensor name
// and position in the whole tensor alone: every device makes the same bits, and
// the ranks' parts are those of one model. `dtype` is that of what is not
// float8_e4m3; with ModelConfig::fp8_scaling attention projections, experts and
// dense MLPs are that, with scales that differ from block to block.
StatusOr<Weights> RandomWeights(const ModelConfig& config, DType dtype,
                                Device device, const Shard& shard,
                                uint64_t seed);

}  // namespace tenon

#endif  // TENON_ENGINE_WEIGHTS_H_
