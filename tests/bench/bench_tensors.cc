#include <algorithm>
#include <random>

#include "ops/core/build_config.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {
namespace {

// Values that all random tensors are cut from: drawing gigabytes would take
// longer than the benchmark. The odd length keeps rows from repeating.
const std::vector<float>& NormalBlock() {
  static const auto* block = [] {
    auto* values = new std::vector<float>((1 << 20) - 3);
    std::mt19937_64 rng(1);
    std::normal_distribution<float> normal;
    for (float& v : *values) v = normal(rng);
    return values;
  }();
  return *block;
}

template <class T>
void FillNormal(int64_t offset, float stddev, std::vector<char>* bytes) {
  const std::vector<float>& block = NormalBlock();
  T* out = reinterpret_cast<T*>(bytes->data());
  const size_t count = bytes->size() / sizeof(T);
  for (size_t i = 0; i < count; ++i) {
    out[i] = FromFloat<T>(stddev * block[(offset + i) % block.size()]);
  }
}

Buffer Allocate(Device device, size_t bytes) {
  StatusOr<Buffer> buffer = Buffer::Allocate(device, bytes);
  CheckOk(buffer.status());
  return *std::move(buffer);
}

}  // namespace

TensorView Tensors::Random(DType dtype, std::initializer_list<int64_t> shape,
                           float stddev) {
  const TensorView view = MakeTensor(nullptr, dtype, device_, shape);
  const size_t size = static_cast<size_t>(NumElements(view)) * DTypeSize(dtype);
  if constexpr (kCudaBuilt) {
    if (device_.type == DeviceType::kCuda) {
      void* data = Bytes(size);
      CheckOk(FillNormalCuda(data, dtype, NumElements(view), stddev,
                             num_random_++, device_, Stream()));
      CheckOk(Synchronize(device_, Stream()));
      return MakeTensor(data, dtype, device_, shape);
    }
  }
  std::vector<char> block(
      std::min(size, NormalBlock().size() * DTypeSize(dtype)));
  const int64_t offset = 7919 * num_random_++;
  switch (dtype) {
    case DType::kFloat32:
      FillNormal<float>(offset, stddev, &block);
      break;
    case DType::kFloat16:
      FillNormal<Float16>(offset, stddev, &block);
      break;
    case DType::kBFloat16:
      FillNormal<BFloat16>(offset, stddev, &block);
      break;
    case DType::kFloat8E4M3:
      FillNormal<Float8E4M3>(offset, stddev, &block);
      break;
    default:
      CheckOk(InvalidArgumentError("Random: dtype is ", DTypeName(dtype)));
  }
  char* data = static_cast<char*>(Bytes(size));
  CheckOk(CopyMemory(data, device_, block.data(), Device(), block.size(),
                     Stream()));
  // The rest repeats the block.
  for (size_t done = block.size(); done < size; done *= 2) {
    CheckOk(CopyMemory(data + done, device_, data, device_,
                       std::min(done, size - done), Stream()));
  }
  CheckOk(Synchronize(device_, Stream()));
  return MakeTensor(data, dtype, device_, shape);
}

TensorView Tensors::Zeros(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view = MakeTensor(nullptr, dtype, device_, shape);
  const size_t size = static_cast<size_t>(NumElements(view)) * DTypeSize(dtype);
  view.data = Bytes(size);
  CheckOk(FillMemory(view.data, device_, 0, size, Stream()));
  CheckOk(Synchronize(device_, Stream()));
  return view;
}

void* Tensors::Bytes(size_t bytes) {
  buffers_.push_back(Allocate(device_, bytes));
  return buffers_.back().data();
}

void* Tensors::Copy(const void* data, size_t bytes) {
  void* copy = Bytes(bytes);
  CheckOk(CopyMemory(copy, device_, data, Device(), bytes, Stream()));
  CheckOk(Synchronize(device_, Stream()));
  return copy;
}

std::vector<int32_t> ReadInt32(const TensorView& tensor) {
  std::vector<int32_t> values(static_cast<size_t>(NumElements(tensor)));
  CheckOk(CopyMemory(values.data(), Device(), tensor.data, tensor.device,
                     values.size() * sizeof(int32_t), Stream()));
  CheckOk(Synchronize(tensor.device, Stream()));
  return values;
}

}  // namespace tenon::bench
