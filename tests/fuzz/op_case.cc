#include "tests/fuzz/op_case.h"

#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <string>

#include "tests/fuzz/check.h"

// A view that is well-formed but larger than its memory is a lie that no
// library can see through. The fuzzer must not tell it, or it would find
// crashes that are its own fault; and must not avoid odd shapes either. So
// mutations change views as they like, and MakeViewsTrue() then gives each one
// that looks valid the memory that it claims:
//   up to 64 KiB        a buffer of exactly that size
//   inputs up to 1 TiB  an address range that reads as zeros, if their elements
//                       are few, since work grows with those
//   others              the view becomes what it was before the mutations
// Views that break a rule are left as they are, for the library to refuse.

namespace tenon::fuzz {
namespace {

constexpr uint64_t kMaxZeroBytes = uint64_t{1} << 40;

// Address space whose pages are all the kernel's page of zeros.
void* ZeroRange() {
  static void* const range =
      mmap(nullptr, kMaxZeroBytes, PROT_READ,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return range == MAP_FAILED ? nullptr : range;
}

bool IsKnownDType(DLDataType type) {
  if (type.lanes != 1) return false;
  switch (type.code) {
    case TENON_DL_INT:
      return type.bits == 32 || type.bits == 64;
    case TENON_DL_UINT:
    case TENON_DL_FLOAT8_E4M3FN:
      return type.bits == 8;
    case TENON_DL_FLOAT:
      return type.bits == 32 || type.bits == 16;
    case TENON_DL_BFLOAT:
      return type.bits == 16;
    default:
      return false;
  }
}

using Wide = __int128;
constexpr Wide kMaxInt64 = std::numeric_limits<int64_t>::max();

// Fills in shape, strides and bytes. False where a rule is broken.
bool DescribeLayout(const DLTensor& tensor, Extent* extent) {
  extent->shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  extent->strides.resize(tensor.ndim);
  for (int64_t size : extent->shape) {
    if (size < 0) return false;
    if (size == 0) extent->is_empty = true;
  }
  if (extent->is_empty) return true;
  Wide elements = 1;
  Wide last = 0;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = extent->shape[i];
    Wide stride = tensor.strides == nullptr ? elements : tensor.strides[i];
    if (size == 1) stride = 0;
    if (stride < 0) return false;
    extent->strides[i] = static_cast<int64_t>(std::min(stride, kMaxInt64));
    elements *= size;
    last += (size - 1) * stride;
    if (elements > kMaxInt64 || last > kMaxInt64) return false;
  }
  const Wide bytes = (last + 1) * extent->element;
  if (bytes > kMaxInt64) return false;
  extent->bytes = static_cast<uint64_t>(bytes);
  extent->elements = static_cast<int64_t>(elements);
  return true;
}

// Random bits of which floats are mostly small numbers, seldom anything at all.
void FillFloats(Input& in, DLDataType dtype, uint8_t* data, size_t size) {
  const uint64_t seed = in.Below(256);
  uint64_t bits = seed * 0x9e3779b97f4a7c15u + 1;
  const bool any = seed % 8 == 0;
  for (size_t i = 0; i < size; ++i) {
    bits = bits * 6364136223846793005u + 1442695040888963407u;
    data[i] = static_cast<uint8_t>(bits >> 56);
    // The highest byte has the sign and most of the exponent.
    const size_t element = dtype.bits / 8;
    if (!any && i % element == element - 1) {
      data[i] = static_cast<uint8_t>((data[i] & 0x81) | 0x3c);
    }
  }
}

}  // namespace

Extent Describe(const DLTensor& tensor) {
  Extent extent;
  extent.on_cpu = tensor.device.device_type == TENON_DL_CPU ||
                  tensor.device.device_type == TENON_DL_CUDA_HOST;
  const bool on_cuda = tensor.device.device_type == TENON_DL_CUDA;
  if (!extent.on_cpu && !on_cuda) return extent;
  if (tensor.device.device_type == TENON_DL_CPU &&
      tensor.device.device_id != 0) {
    return extent;
  }
  if (!IsKnownDType(tensor.dtype)) return extent;
  extent.element = tensor.dtype.bits / 8;
  if (tensor.ndim < 1 || tensor.ndim > 4 || tensor.shape == nullptr) {
    return extent;
  }
  if (!DescribeLayout(tensor, &extent)) return extent;
  if (extent.is_empty) {
    extent.is_valid = true;
    return extent;
  }
  const Wide begin =
      Wide{reinterpret_cast<uintptr_t>(tensor.data)} + tensor.byte_offset;
  if (tensor.data == nullptr || begin + extent.bytes > kMaxInt64) return extent;
  extent.begin = static_cast<uint64_t>(begin);
  extent.is_valid = extent.begin % extent.element == 0;
  return extent;
}

void ForEachElement(const Extent& extent,
                    const std::function<void(uint64_t)>& body) {
  if (extent.is_empty) return;
  std::vector<int64_t> index(extent.shape.size());
  while (true) {
    uint64_t address = extent.begin;
    for (size_t i = 0; i < index.size(); ++i) {
      address += static_cast<uint64_t>(index[i]) *
                 static_cast<uint64_t>(extent.strides[i]) * extent.element;
    }
    body(address);
    size_t i = index.size();
    while (i > 0 && ++index[i - 1] == extent.shape[i - 1]) index[--i] = 0;
    if (i == 0) return;
  }
}

bool Memory::Contains(uint64_t address, uint64_t bytes) const {
  const uint64_t first = reinterpret_cast<uintptr_t>(data_);
  return address >= first && bytes <= size_ && address - first <= size_ - bytes;
}

void Tensor::SetShape(const std::vector<int64_t>& values) {
  shape.reset(new int64_t[values.size()]);
  std::copy(values.begin(), values.end(), shape.get());
  dl->shape = shape.get();
}

void Tensor::SetStrides(const std::vector<int64_t>& values) {
  strides.reset(new int64_t[values.size()]);
  std::copy(values.begin(), values.end(), strides.get());
  dl->strides = strides.get();
}

void Tensor::Restore() {
  *dl = valid;
  SetShape(valid_shape);
  if (valid.strides != nullptr) SetStrides(valid_strides);
}

OpCase::OpCase(const Op& op, Input& in) : op(op), in_(in) {
  tensors.reserve(16);
  op.build(in, *this);
}

uint8_t* OpCase::NewBuffer(size_t size, DLDataType dtype, int64_t low,
                           int64_t high) {
  buffers.push_back(std::make_unique<Memory>(size));
  uint8_t* data = buffers.back()->data();
  if (dtype.code != TENON_DL_INT) {
    FillFloats(in_, dtype, data, size);
    return data;
  }
  const size_t element = dtype.bits / 8;
  for (size_t i = 0; i + element <= size; i += element) {
    const int64_t value = in_.Between(low, high);
    std::memcpy(data + i, &value, element);  // little-endian
  }
  return data;
}

const DLTensor* OpCase::AddTensor(DLDataType dtype,
                                  const std::vector<int64_t>& shape,
                                  Layout layout, int64_t low, int64_t high) {
  Tensor tensor;
  tensor.dl = std::make_unique<DLTensor>();
  DLTensor& dl = *tensor.dl;
  dl.device = {TENON_DEVICE_CPU, 0};
  dl.dtype = dtype;
  dl.ndim = static_cast<int32_t>(shape.size());
  tensor.SetShape(shape);
  tensor.valid_shape = shape;
  if (layout == Layout::kAny && in_.OneIn(2)) {
    std::vector<int64_t> strides(shape.size());
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= shape[i];
      if (in_.OneIn(3)) stride += in_.Between(1, 9);  // padded
    }
    tensor.SetStrides(strides);
    tensor.valid_strides = strides;
  }
  const size_t element = dtype.bits / 8;
  if (layout == Layout::kAny && in_.OneIn(4)) {
    dl.byte_offset = element * in_.Between(1, 5);
  }
  alignas(8) static char any_address;
  dl.data = &any_address;
  dl.data = NewBuffer(dl.byte_offset + Describe(dl).bytes, dtype, low, high);
  tensor.valid = dl;
  tensors.push_back(std::move(tensor));
  return tensors.back().dl.get();
}

const DLTensor* OpCase::Add(DLDataType dtype, const std::vector<int64_t>& shape,
                            Layout layout) {
  return AddTensor(dtype, shape, layout, 0, 0);
}

const DLTensor* OpCase::AddInts(DLDataType dtype,
                                const std::vector<int64_t>& shape, int64_t low,
                                int64_t high) {
  return AddTensor(dtype, shape, Layout::kAny, low, high);
}

void OpCase::SetInt(const DLTensor* tensor, int64_t index, int64_t value) {
  const size_t element = tensor->dtype.bits / 8;
  std::memcpy(static_cast<uint8_t*>(tensor->data) + tensor->byte_offset +
                  index * element,
              &value, element);
}

uint32_t OpCase::struct_size() const {
  uint32_t size;
  std::memcpy(&size, args->data(), sizeof(size));
  return size;
}

void OpCase::set_struct_size(uint32_t size) {
  std::memcpy(args->data(), &size, sizeof(size));
}

void OpCase::ResizeArgs(size_t size) {
  auto resized = std::make_unique<Memory>(size);
  std::memset(resized->data(), 0, size);
  std::memcpy(resized->data(), args->data(), std::min(size, args->size()));
  args = std::move(resized);
}

const Field* OpCase::Find(FieldKind kind) const {
  for (const Field& field : op.fields) {
    if (field.kind == kind) return &field;
  }
  return nullptr;
}

std::vector<OpCase::Given> OpCase::GivenTensors() {
  std::vector<Given> given;
  for (const Field& field : op.fields) {
    if (!field.is_tensor()) continue;
    const DLTensor* pointer = Get<const DLTensor*>(field);
    for (Tensor& tensor : tensors) {
      if (tensor.dl.get() == pointer) given.push_back({&field, &tensor});
    }
  }
  return given;
}

void OpCase::MakeTrue(Tensor* tensor, bool is_out) {
  DLTensor& dl = *tensor->dl;
  const Extent extent = Describe(dl);
  if (!extent.is_valid || extent.is_empty || !extent.on_cpu) return;
  for (const auto& buffer : buffers) {
    if (buffer->Contains(extent.begin, extent.bytes)) return;
  }
  if (extent.bytes <= kMaxSmallBytes) {
    dl.byte_offset = 0;
    dl.data = NewBuffer(extent.bytes, dl.dtype, -2, 9);
  } else if (!is_out && extent.elements <= kMaxSmallElements &&
             extent.bytes <= kMaxZeroBytes && ZeroRange() != nullptr) {
    dl.byte_offset = 0;
    dl.data = ZeroRange();
  } else {
    tensor->Restore();
  }
}

void OpCase::MakeViewsTrue() {
  const std::vector<Given> given = GivenTensors();
  for (Tensor& tensor : tensors) {
    const bool is_out =
        std::any_of(given.begin(), given.end(), [&](const Given& g) {
          return g.tensor == &tensor && g.field->is_out();
        });
    MakeTrue(&tensor, is_out);
  }
}

void OpCase::ProvideWorkspace(uint64_t bytes) {
  const Field* field = Find(FieldKind::kWorkspace);
  if (field == nullptr) return;
  if (bytes > kMaxSmallBytes * 16) bytes = 0;
  buffers.push_back(std::make_unique<Memory>(bytes));
  workspace = buffers.back().get();
  std::memset(workspace->data(), 0xff, bytes);  // NaN, -1: not to be relied on
  Set(*field, bytes == 0 ? nullptr : workspace->data());
  Set(*Find(FieldKind::kWorkspaceSize), bytes);
}

void OpCase::Snapshot() {
  for (const auto& buffer : buffers) buffer->Snapshot();
}

bool OpCase::IsUnchanged() const {
  return std::all_of(buffers.begin(), buffers.end(),
                     [](const auto& buffer) { return buffer->IsUnchanged(); });
}

bool OpCase::HasNoStrayWrites() {
  for (const Given& given : GivenTensors()) {
    const Extent extent = Describe(*given.tensor->dl);
    if (!given.field->is_out() || extent.is_empty) continue;
    for (const auto& buffer : buffers) {
      if (!buffer->Contains(extent.begin, extent.bytes)) continue;
      const uint64_t first = reinterpret_cast<uintptr_t>(buffer->data());
      ForEachElement(extent, [&](uint64_t address) {
        buffer->Forget(address - first, extent.element);
      });
    }
  }
  if (workspace != nullptr) workspace->Forget(0, workspace->size());
  return IsUnchanged();
}

}  // namespace tenon::fuzz
