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

Status FillParts(const std::vector<WeightPart>& parts, uint64_t seed,
                 void* base, Device device, Stream stream) {
  for (const WeightPart& part : parts) {
    RandomPart random;
    random.data = static_cast<char*>(base) + part.offset;
    random.dtype = part.dtype;
    random.device = device;
    random.rows = part.rows;
    random.cols = part.cols;
    random.first_element = part.first_row * part.full_cols + part.first_col;
    random.full_cols = part.full_cols;
    random.key = TensorKey(seed, part.name);
    random.is_norm = part.is_vector;
    TENON_RETURN_IF_ERROR(FillRandom(random, stream));
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
  for (WeightPart& part : parts) part.dtype = dtype;

  StatusOr<Weights> weights = AllocateWeights(config, device, &parts);
  if (!weights.ok()) return weights;
  weights->dtype = dtype;
  StatusOr<OwnedStream> stream = OwnedStream::Create(device);
  if (!stream.ok()) return stream.status();
  TENON_RETURN_IF_ERROR(
      FillParts(parts, seed, weights->buffer.data(), device, stream->get()));
  return weights;
}

}  // namespace tenon
