#include "engine/weights.h"

#include <utility>

#include "engine/file.h"
#include "engine/weight_plan.h"
#include "engine/weight_upload.h"
#include "ops/core/validate.h"

namespace tenon {
namespace {

// Large enough for full bandwidth to the device, small beside any model.
constexpr int64_t kChunkBytes = int64_t{64} << 20;

// This rank's part of a tensor in the checkpoint.
TensorView SourceOf(const WeightPart& part, const TensorView& whole) {
  if (part.is_vector) return whole;
  return Columns(Rows(whole, part.first_row, part.rows), part.first_col,
                 part.cols);
}

// Looks a part up and checks it. `dtype` is that of all matrices, set by the
// first one.
Status FindPart(const Checkpoint& checkpoint, DType* dtype, WeightPart* part) {
  StatusOr<TensorView> found = checkpoint.Find(part->name);
  if (!found.ok()) return found.status();
  const TensorView& whole = *found;
  const auto fail = [&](const auto&... what) {
    return InvalidArgumentError(checkpoint.FileOf(part->name), ": tensor \"",
                                part->name, "\" has ", what...);
  };
  const TensorView expected =
      part->is_vector
          ? MakeTensor(nullptr, whole.dtype, Device(), {part->full_cols})
          : MakeTensor(nullptr, whole.dtype, Device(),
                       {part->full_rows, part->full_cols});
  if (ShapeToString(whole) != ShapeToString(expected)) {
    return fail("shape ", ShapeToString(whole), ", expected ",
                ShapeToString(expected), " from config.json");
  }
  if ((kFloatDTypes >> static_cast<int>(whole.dtype) & 1u) == 0) {
    return fail("dtype ", DTypeName(whole.dtype),
                ", expected float32, float16 or bfloat16");
  }
  if (*dtype == DType::kInvalid) *dtype = whole.dtype;
  const bool float32_norm = part->is_vector && whole.dtype == DType::kFloat32;
  if (whole.dtype != *dtype && !float32_norm) {
    return fail("dtype ", DTypeName(whole.dtype), ", expected ",
                DTypeName(*dtype), " as the embedding has");
  }
  part->dtype = whole.dtype;
  part->source = SourceOf(*part, whole);
  return Status();
}

// All parts of the model, found. Layer by layer, so that a config of absurd
// size fails at the first tensor that is not there.
Status FindParts(const Checkpoint& checkpoint, const ModelConfig& config,
                 const LocalShape& local, DType* dtype,
                 std::vector<WeightPart>* parts) {
  size_t found = 0;
  const auto find_new = [&] {
    for (; found < parts->size(); ++found) {
      TENON_RETURN_IF_ERROR(FindPart(checkpoint, dtype, &(*parts)[found]));
    }
    return Status();
  };
  PlanHead(config, parts);
  TENON_RETURN_IF_ERROR(find_new());
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    PlanLayer(config, local, layer, parts);
    TENON_RETURN_IF_ERROR(find_new());
  }
  PlanTail(config, parts);
  return find_new();
}

Weights MapWeights(const ModelConfig& config, Device device,
                   const std::vector<WeightPart>& parts) {
  Weights weights;
  weights.device = device;
  weights.layers.resize(static_cast<size_t>(config.num_layers));
  for (const WeightPart& part : parts) {
    weights.bytes += part.bytes();
    const int64_t row_stride = part.is_vector ? 0 : part.source.stride[0];
    Prefetch(
        part.source.data,
        static_cast<size_t>((part.rows - 1) * row_stride *
                                static_cast<int64_t>(DTypeSize(part.dtype)) +
                            part.row_bytes()));
  }
  SetMappedViews(config, parts, &weights);
  return weights;
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
                              const Shard& shard,
                              const LoadProgress& progress) {
  TENON_RETURN_IF_ERROR(config.Validate());
  const StatusOr<LocalShape> local = MakeLocalShape(config, shard);
  if (!local.ok()) return local.status();
  DType dtype = DType::kInvalid;
  std::vector<WeightPart> parts;
  TENON_RETURN_IF_ERROR(FindParts(*checkpoint, config, *local, &dtype, &parts));

  if (device.type == DeviceType::kCpu) {
    Weights weights = MapWeights(config, device, parts);
    weights.dtype = dtype;
    weights.checkpoint = std::move(checkpoint);
    TENON_RETURN_IF_ERROR(
        ReportProgress(progress, weights.bytes, weights.bytes));
    return weights;
  }
  StatusOr<Weights> weights = AllocateWeights(config, device, &parts);
  if (!weights.ok()) return weights;
  weights->dtype = dtype;
  TENON_RETURN_IF_ERROR(UploadParts(parts, weights->bytes,
                                    weights->buffer.data(), device, kChunkBytes,
                                    progress));
  return weights;
}

}  // namespace tenon
