#include "engine/weights.h"

#include <utility>

#include "engine/safetensors.h"
#include "engine/weight_plan.h"
#include "engine/weight_quantize.h"
#include "engine/weight_scales.h"
#include "engine/weight_upload.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

// Large enough for full bandwidth to the device, small beside any model.
constexpr int64_t kChunkBytes = int64_t{64} << 20;

// Finds the model's tensors in a checkpoint and decides how each part comes to
// its place.
class Finder {
 public:
  Finder(const Checkpoint& checkpoint, const ModelConfig& config, Device device,
         bool quantize_fp8)
      : checkpoint_(checkpoint),
        config_(config),
        device_(device),
        quantize_fp8_(quantize_fp8) {}

  // Layer by layer, so that a config of absurd size fails at the first tensor
  // that is not there.
  Status FindAll(const LocalShape& local) {
    PlanHead(config_, &parts_);
    TENON_RETURN_IF_ERROR(FindNew());
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      PlanLayer(config_, local, layer, &parts_);
      TENON_RETURN_IF_ERROR(FindNew());
    }
    PlanTail(config_, &parts_);
    return FindNew();
  }

  std::vector<WeightPart>& parts() { return parts_; }
  DType dtype() const { return dtype_; }

 private:
  Status FindNew() {
    for (; found_ < parts_.size(); ++found_) {
      TENON_RETURN_IF_ERROR(Find(&parts_[found_]));
    }
    return Status();
  }

  Status Find(WeightPart* part) {
    StatusOr<TensorView> found = checkpoint_.Find(part->name);
    if (!found.ok()) return found.status();
    part->source = *found;
    part->dtype = found->dtype;
    TENON_RETURN_IF_ERROR(CheckShape(*part));
    if (part->dtype == DType::kFloat8E4M3) {
      TENON_RETURN_IF_ERROR(FindFp8(part));
    } else {
      TENON_RETURN_IF_ERROR(CheckDType(*part));
    }
    TENON_RETURN_IF_ERROR(CheckExpert(*part));
    Place(part);
    return Status();
  }

  template <class... What>
  Status Fail(const WeightPart& part, const What&... what) const {
    return InvalidArgumentError(checkpoint_.FileOf(part.name), ": tensor \"",
                                part.name, "\" has ", what...);
  }

  Status CheckShape(const WeightPart& part) const {
    const TensorView expected =
        part.is_vector
            ? MakeTensor(nullptr, part.dtype, Device(), {part.full_cols})
            : MakeTensor(nullptr, part.dtype, Device(),
                         {part.full_rows, part.full_cols});
    if (ShapeToString(part.source) == ShapeToString(expected)) return Status();
    return Fail(part, "shape ", ShapeToString(part.source), ", expected ",
                ShapeToString(expected), " from config.json");
  }

  Status FindFp8(WeightPart* part) const {
    if (!MayBeFp8(part->role)) {
      return Fail(*part,
                  "dtype float8_e4m3, expected float32, float16 or bfloat16");
    }
    if (config_.fp8_scaling == Fp8Scaling::kNone) {
      return Fail(*part, "dtype float8_e4m3, but config.json has no ",
                  "quantization_config that says how it is scaled");
    }
    return FindScales(checkpoint_, config_, part);
  }

  // The first tensor's dtype is that of all that are not float8_e4m3.
  Status CheckDType(const WeightPart& part) {
    if ((kFloatDTypes >> static_cast<int>(part.dtype) & 1u) == 0) {
      return Fail(part, "dtype ", DTypeName(part.dtype),
                  ", expected float32, float16 or bfloat16");
    }
    if (dtype_ == DType::kInvalid) dtype_ = part.dtype;
    const bool float32_norm = part.is_vector && part.dtype == DType::kFloat32;
    if (part.dtype != dtype_ && !float32_norm) {
      return Fail(part, "dtype ", DTypeName(part.dtype), ", expected ",
                  DTypeName(dtype_), " as the embedding has");
    }
    if (config_.fp8_scaling != Fp8Scaling::kNone && MayBeFp8(part.role) &&
        checkpoint_.Has(part.name + config_.fp8_scale_suffix)) {
      return Fail(part, "dtype ", DTypeName(part.dtype),
                  ", expected float8_e4m3, as there is ", part.name,
                  config_.fp8_scale_suffix);
    }
    return Status();
  }

  // One kernel works on all experts of a layer.
  Status CheckExpert(const WeightPart& part) {
    if (!IsExpert(part.role)) return Status();
    if (part.role == WeightRole::kExpertGate && part.expert == 0) {
      expert_dtype_ = part.dtype;
    }
    if (part.dtype == expert_dtype_) return Status();
    return Fail(part, "dtype ", DTypeName(part.dtype), ", expected ",
                DTypeName(expert_dtype_),
                " as gate_proj of the layer's first expert has");
  }

  void Place(WeightPart* part) const {
    const bool is_range = part->rows.wrapped == 0 && part->cols.wrapped == 0;
    if (quantize_fp8_ && MayBeFp8(part->role) &&
        part->dtype != DType::kFloat8E4M3) {
      part->dtype = DType::kFloat8E4M3;
      part->scaling = Fp8Scaling::kBlocks;
      part->placement = Placement::kQuantized;
    } else if (device_.type == DeviceType::kCpu && is_range) {
      part->placement = Placement::kMapped;
    }
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  Device device_;
  bool quantize_fp8_;
  std::vector<WeightPart> parts_;
  size_t found_ = 0;  // of parts_
  DType dtype_ = DType::kInvalid;
  DType expert_dtype_ = DType::kInvalid;
};

// Published scales, to packed memory.
Status UploadScales(const Checkpoint& checkpoint, const ModelConfig& config,
                    const std::vector<WeightPart>& parts,
                    const PackedLayout& layout, Weights* weights) {
  const size_t bytes =
      static_cast<size_t>(layout.scales_end - layout.scales_begin);
  if (bytes == 0) return Status();
  char* to = static_cast<char*>(weights->buffer.data()) + layout.scales_begin;
  if (weights->device.type == DeviceType::kCpu) {
    return PackScales(checkpoint, config, parts, layout, to);
  }
  StatusOr<Buffer> host = Buffer::Allocate(Device(), bytes);
  TENON_RETURN_IF_ERROR(host.status());
  TENON_RETURN_IF_ERROR(
      PackScales(checkpoint, config, parts, layout, host->data()));
  TENON_RETURN_IF_ERROR(
      CopyMemory(to, weights->device, host->data(), Device(), bytes, Stream()));
  return Synchronize(weights->device, Stream());
}

// Puts every part where it belongs. What is mapped is there already.
Status FillWeights(const Checkpoint& checkpoint, const ModelConfig& config,
                   const std::vector<WeightPart>& parts,
                   const PackedLayout& layout, const LoadProgress& progress,
                   Weights* weights) {
  std::vector<WeightPart> packed;
  for (const WeightPart& part : parts) {
    if (part.placement == Placement::kPacked) packed.push_back(part);
    if (part.placement == Placement::kMapped) {
      PrefetchPart(part, 0, part.bytes());
    }
  }
  int64_t done = weights->bytes - layout.end;  // mapped
  int64_t told = 0;
  const LoadProgress tell = [&](int64_t more, int64_t) {
    told = done + more;
    return !progress || progress(told, weights->bytes);
  };
  void* base = weights->buffer.data();
  if (layout.packed_end > 0) {
    TENON_RETURN_IF_ERROR(UploadParts(packed, layout.packed_end, base,
                                      weights->device, kChunkBytes, tell));
  }
  TENON_RETURN_IF_ERROR(
      UploadScales(checkpoint, config, parts, layout, weights));
  done += layout.scales_end;
  if (layout.end > layout.quantized_end) {  // also what lies between rows
    TENON_RETURN_IF_ERROR(FillMemory(
        static_cast<char*>(base) + layout.quantized_end, weights->device, 0,
        static_cast<size_t>(layout.end - layout.quantized_end), Stream()));
    TENON_RETURN_IF_ERROR(Synchronize(weights->device, Stream()));
  }
  TENON_RETURN_IF_ERROR(QuantizeParts(parts, base, weights->device, kChunkBytes,
                                      weights->bytes, tell));
  if (told == weights->bytes) return Status();
  return ReportProgress(progress, weights->bytes, weights->bytes);
}

}  // namespace

Status ReportProgress(const LoadProgress& progress, int64_t bytes_done,
                      int64_t bytes_total) {
  if (!progress || progress(bytes_done, bytes_total)) return Status();
  return CancelledError("load: stopped by progress after ", bytes_done, " of ",
                        bytes_total, " bytes");
}

StatusOr<Weights> LoadWeights(std::shared_ptr<const Checkpoint> checkpoint,
                              const ModelConfig& config, Device device,
                              const LoadOptions& options) {
  TENON_RETURN_IF_ERROR(config.Validate());
  const StatusOr<LocalShape> local = MakeLocalShape(config, options.shard);
  if (!local.ok()) return local.status();
  Finder finder(*checkpoint, config, device, options.quantize_fp8);
  TENON_RETURN_IF_ERROR(finder.FindAll(*local));

  PackedLayout layout;
  StatusOr<Weights> weights =
      AllocateWeights(config, device, &finder.parts(), &layout);
  if (!weights.ok()) return weights;
  weights->dtype = finder.dtype();
  TENON_RETURN_IF_ERROR(FillWeights(*checkpoint, config, finder.parts(), layout,
                                    options.progress, &*weights));
  if (device.type == DeviceType::kCpu) {
    weights->checkpoint = std::move(checkpoint);
  }
  return weights;
}

}  // namespace tenon
