#include "engine/weight_scales.h"

#include <cmath>
#include <cstring>

#include "engine/safetensors.h"

namespace tenon {
namespace {

std::string ScalesName(const WeightPart& part, const ModelConfig& config) {
  return part.name + config.fp8_scale_suffix;
}

float ReadScale(const TensorView& scales, int64_t row, int64_t col) {
  const int64_t at = row * scales.stride[0] + col;
  return scales.dtype == DType::kFloat32
             ? scales.As<const float>()[at]
             : ToFloat(scales.As<const BFloat16>()[at]);
}

// Where the scale of the rank's row or column block `block` is in the whole.
int64_t WholeBlock(const Share& share, int64_t block) {
  return share.WholeIndex(block * kFp8BlockSize) / kFp8BlockSize;
}

Status PackPart(const WeightPart& part, const std::string& tensor, float* to) {
  const bool blocks = part.scaling == Fp8Scaling::kBlocks;
  for (int64_t r = 0; r < part.scale_rows(); ++r) {
    const int64_t row =
        blocks ? WholeBlock(part.rows, r) : part.rows.WholeIndex(r);
    for (int64_t c = 0; c < part.scale_cols(); ++c) {
      const int64_t col = blocks ? WholeBlock(part.cols, c) : 0;
      const float scale = ReadScale(part.source_scales, row, col);
      if (!std::isfinite(scale)) {
        return InvalidArgumentError(tensor, " has a scale of ", scale,
                                    " at row ", row, ", column ", col,
                                    ", expected a finite one");
      }
      to[r * part.scale_stride() + c] = scale;
    }
  }
  return Status();
}

}  // namespace

Status FindScales(const Checkpoint& checkpoint, const ModelConfig& config,
                  WeightPart* part) {
  const std::string name = ScalesName(*part, config);
  StatusOr<TensorView> found = checkpoint.Find(name);
  if (found.status().code() == StatusCode::kNotFound) {
    return NotFoundError(found.status().message(),
                         ", the scales that float8_e4m3 weights need");
  }
  TENON_RETURN_IF_ERROR(found.status());
  TensorView scales = *found;
  part->scaling = config.fp8_scaling;
  const bool blocks = part->scaling == Fp8Scaling::kBlocks;
  const TensorView expected = MakeTensor(
      nullptr, scales.dtype, Device(),
      {blocks ? (part->full_rows + kFp8BlockSize - 1) / kFp8BlockSize
              : part->full_rows,
       blocks ? (part->full_cols + kFp8BlockSize - 1) / kFp8BlockSize : 1});
  const auto fail = [&](const auto&... what) {
    return InvalidArgumentError(checkpoint.FileOf(name), ": tensor \"", name,
                                "\" has ", what...);
  };
  const std::string shape = ShapeToString(scales);
  if (!blocks && scales.rank == 1) {  // a column, or just as many numbers
    scales =
        MakeTensor(scales.data, scales.dtype, Device(), {scales.shape[0], 1});
  }
  if (ShapeToString(scales) != ShapeToString(expected)) {
    return fail("shape ", shape, ", expected ", ShapeToString(expected),
                " for weights of [", part->full_rows, ", ", part->full_cols,
                "]");
  }
  if (scales.dtype != DType::kFloat32 && scales.dtype != DType::kBFloat16) {
    return fail("dtype ", DTypeName(scales.dtype),
                ", expected float32 or bfloat16");
  }
  part->source_scales = scales;
  return Status();
}

Status PackScales(const Checkpoint& checkpoint, const ModelConfig& config,
                  const std::vector<WeightPart>& parts,
                  const PackedLayout& layout, void* base) {
  std::memset(base, 0,
              static_cast<size_t>(layout.scales_end - layout.scales_begin));
  for (const WeightPart& part : parts) {
    if (!part.source_scales.present()) continue;
    const std::string name = ScalesName(part, config);
    char* to =
        static_cast<char*>(base) + (part.scales_offset - layout.scales_begin);
    TENON_RETURN_IF_ERROR(PackPart(
        part, StrCat(checkpoint.FileOf(name), ": tensor \"", name, "\""),
        reinterpret_cast<float*>(to)));
  }
  return Status();
}

}  // namespace tenon
