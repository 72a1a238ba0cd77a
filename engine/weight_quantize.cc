#include "engine/weight_quantize.h"

#include <algorithm>

#include "engine/weight_upload.h"
#include "ops/quantize/quantize.h"

namespace tenon {
namespace {

int64_t SourceRowBytes(const WeightPart& part) {
  return part.cols.size * static_cast<int64_t>(DTypeSize(part.source.dtype));
}

int64_t SourceBytes(const WeightPart& part) {
  return part.rows.size * SourceRowBytes(part);
}

// Whole blocks, at least one.
int64_t StripRows(const WeightPart& part, int64_t strip_bytes) {
  const int64_t blocks = strip_bytes / (SourceRowBytes(part) * kFp8BlockSize);
  return std::min(std::max(blocks, int64_t{1}) * kFp8BlockSize, part.rows.size);
}

// One of two: a strip as it is in the file, on the host and on the device.
struct Strip {
  Staging staging;
  Buffer on_device;  // not needed on the CPU
};

class Quantizer {
 public:
  Quantizer(void* base, Device device, int64_t strip_bytes)
      : base_(static_cast<char*>(base)),
        device_(device),
        strip_bytes_(strip_bytes) {}

  Status Create(const std::vector<WeightPart>& parts) {
    StatusOr<OwnedStream> cpu = LoaderThreads();
    TENON_RETURN_IF_ERROR(cpu.status());
    cpu_ = *std::move(cpu);
    int64_t bytes = 0;
    for (const WeightPart& part : parts) {
      bytes =
          std::max(bytes, StripRows(part, strip_bytes_) * SourceRowBytes(part));
    }
    for (Strip& strip : strips_) {
      TENON_RETURN_IF_ERROR(strip.staging.Create(device_, bytes));
      if (device_.type == DeviceType::kCpu) continue;
      StatusOr<Buffer> memory =
          Buffer::Allocate(device_, static_cast<size_t>(bytes));
      TENON_RETURN_IF_ERROR(memory.status());
      strip.on_device = *std::move(memory);
    }
    return Status();
  }

  Status Run(const WeightPart& part) {
    const int64_t rows = StripRows(part, strip_bytes_);
    for (int64_t row = 0; row < part.rows.size; row += rows) {
      TENON_RETURN_IF_ERROR(
          RunStrip(part, row, std::min(rows, part.rows.size - row)));
    }
    return Status();
  }

  // Also to be called after an error: strips may still be on their way.
  Status Finish() {
    Status status;
    for (Strip& strip : strips_) {
      const Status done = Synchronize(device_, strip.staging.stream.get());
      if (status.ok()) status = done;
    }
    return status;
  }

 private:
  Status RunStrip(const WeightPart& part, int64_t row, int64_t rows) {
    Strip& strip = strips_[turn_];
    turn_ = 1 - turn_;
    const bool on_cpu = device_.type == DeviceType::kCpu;
    Stream stream = on_cpu ? cpu_.get() : strip.staging.stream.get();
    TENON_RETURN_IF_ERROR(Synchronize(device_, stream));
    const int64_t row_bytes = SourceRowBytes(part);
    char* x = static_cast<char*>(strip.staging.buffer.data());
    CopyPart(part, row * row_bytes, (row + rows) * row_bytes, x, cpu_.get());
    if (!on_cpu) {
      char* on_device = static_cast<char*>(strip.on_device.data());
      TENON_RETURN_IF_ERROR(CopyMemory(on_device, device_, x, Device(),
                                       static_cast<size_t>(rows * row_bytes),
                                       stream));
      x = on_device;
    }
    QuantizeFp8Params p;
    p.x = MakeTensor(x, part.source.dtype, device_, {rows, part.cols.size});
    p.out = MakeTensor(base_ + part.offset + row * part.row_bytes(),
                       DType::kFloat8E4M3, device_, {rows, part.cols.size});
    const int64_t block_row = row / kFp8BlockSize;
    const int64_t scales_row_bytes =
        part.scale_stride() * static_cast<int64_t>(sizeof(float));
    p.scales = MakeMatrix(
        base_ + part.scales_offset + block_row * scales_row_bytes,
        DType::kFloat32, device_, (rows + kFp8BlockSize - 1) / kFp8BlockSize,
        part.scale_cols(), part.scale_stride());
    p.block_rows = p.block_cols = kFp8BlockSize;
    return QuantizeFp8(p, stream);
  }

  char* base_;
  Device device_;
  int64_t strip_bytes_;
  OwnedStream cpu_;
  Strip strips_[2];
  int turn_ = 0;
};

}  // namespace

Status QuantizeParts(const std::vector<WeightPart>& parts, void* base,
                     Device device, int64_t strip_bytes, int64_t total_bytes,
                     const LoadProgress& progress) {
  std::vector<WeightPart> chosen;
  for (const WeightPart& part : parts) {
    if (part.placement == Placement::kQuantized) chosen.push_back(part);
  }
  if (chosen.empty()) return Status();
  Quantizer quantizer(base, device, strip_bytes);
  TENON_RETURN_IF_ERROR(quantizer.Create(chosen));
  Status status;
  int64_t done = 0;
  int64_t ahead_bytes = 0;  // asked for, and not yet quantised
  auto ahead = chosen.begin();
  for (const WeightPart& part : chosen) {
    for (; ahead != chosen.end() && ahead_bytes < 2 * strip_bytes; ++ahead) {
      PrefetchPart(*ahead, 0, SourceBytes(*ahead));
      ahead_bytes += SourceBytes(*ahead);
    }
    status = quantizer.Run(part);
    ahead_bytes -= SourceBytes(part);
    done += part.bytes() + part.scale_bytes();
    if (status.ok()) status = ReportProgress(progress, done, total_bytes);
    if (!status.ok()) break;
  }
  const Status finished = quantizer.Finish();
  return status.ok() ? finished : status;
}

}  // namespace tenon
