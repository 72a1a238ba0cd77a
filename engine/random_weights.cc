#include <string_view>

#include "engine/random_weights_backend.h"
#include "engine/weight_plan.h"
#include "engine/weights.h"
#include "ops/core/build_config.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

uint64_t TensorKey(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return MixBits(hash ^ MixBits(seed));
}

Status FillRandom(const RandomPart& part, Stream stream) {
  switch (part.device.type) {
    case DeviceType::kCpu:
      return FillRandomCpu(part, stream);
    case DeviceType::kCuda:
      if constexpr (kCudaBuilt) return FillRandomCuda(part, stream);
      break;
  }
  return NoBackendError("RandomWeights", part.device);
}

RandomPart Describe(const WeightPart& part, uint64_t seed, char* base,
                    Device device) {
  RandomPart random;
  random.data = base + part.offset;
  random.dtype = part.dtype;
  random.device = device;
  random.rows = part.rows;
  random.cols = part.cols;
  random.full_cols = part.full_cols;
  random.key = TensorKey(seed, part.name);
  random.is_norm = part.is_vector;
  if (part.scaling == Fp8Scaling::kNone) return random;
  const bool blocks = part.scaling == Fp8Scaling::kBlocks;
  random.scales = reinterpret_cast<float*>(base + part.scales_offset);
  random.scale_rows = part.scale_rows();
  random.scale_cols = part.scale_cols();
  random.scale_stride = part.scale_stride();
  random.block_rows = blocks ? kFp8BlockSize : 1;
  random.block_cols = blocks ? kFp8BlockSize : part.full_cols;
  return random;
}

Status FillParts(const std::vector<WeightPart>& parts, uint64_t seed,
                 void* base, Device device, Stream stream) {
  for (const WeightPart& part : parts) {
    TENON_RETURN_IF_ERROR(FillRandom(
        Describe(part, seed, static_cast<char*>(base), device), stream));
  }
  return Synchronize(device, stream);
}

}  // namespace

StatusOr<Weights> RandomWeights(const ModelConfig& config, DType dtype,
                                Device device, const Shard& shard,
                                uint64_t seed) {
  TENON_RETURN_IF_ERROR(config.Validate());
  StatusOr<LocalShape> local = MakeLocalShape(config, shard);
  if (!local.ok()) return local.status();
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 &&
      dtype != DType::kBFloat16) {
    return InvalidArgumentError("RandomWeights: dtype is ", DTypeName(dtype),
                                ", expected float32, float16 or bfloat16");
  }
  std::vector<WeightPart> parts;
  PlanHead(config, &parts);
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    PlanLayer(config, *local, layer, &parts);
  }
  PlanTail(config, &parts);
  for (WeightPart& part : parts) {
    if (MayBeFp8(part.role)) part.scaling = config.fp8_scaling;
    part.dtype = part.scaling == Fp8Scaling::kNone ? dtype : DType::kFloat8E4M3;
  }
  PackedLayout layout;
  StatusOr<Weights> weights = AllocateWeights(config, device, &parts, &layout);
  if (!weights.ok()) return weights;
  weights->dtype = dtype;
  StatusOr<OwnedStream> stream = OwnedStream::Create(device);
  if (!stream.ok()) return stream.status();
  TENON_RETURN_IF_ERROR(
      FillParts(parts, seed, weights->buffer.data(), device, stream->get()));
  return weights;
}

}  // namespace tenon
