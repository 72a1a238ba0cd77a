#include <array>
#include <cmath>
#include <limits>

#include "tests/fuzz/op_case.h"

// What a hostile or confused caller may pass.

namespace tenon::fuzz {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();
constexpr int64_t kInt64Min = std::numeric_limits<int64_t>::min();

DLDataType AnyDType(Input& in) {
  return in.Pick<DLDataType>({{TENON_DL_FLOAT, 32, 1},
                              {TENON_DL_FLOAT, 16, 1},
                              {TENON_DL_BFLOAT, 16, 1},
                              {TENON_DL_FLOAT8_E4M3FN, 8, 1},
                              {TENON_DL_INT, 32, 1},
                              {TENON_DL_INT, 64, 1},
                              {TENON_DL_UINT, 8, 1}});
}

int64_t AnySize(Input& in, int64_t now) {
  return in.Pick<int64_t>({0, 1, 2, 3, now + 1, now - 1, now * 2, -1, -now,
                           1 << 16, 1 << 20, kInt32Max, kInt32Max + 1,
                           int64_t{1} << 40, int64_t{1} << 62, kInt64Max,
                           kInt64Min, static_cast<int64_t>(in.Bits())});
}

float AnyFloat(Input& in) {
  using Limits = std::numeric_limits<float>;
  const uint32_t bits = static_cast<uint32_t>(in.Bits());
  float random;
  std::memcpy(&random, &bits, sizeof(random));
  return in.Pick<float>({0.0f, -0.0f, 1.0f, -1.0f, 0.5f, Limits::infinity(),
                         -Limits::infinity(), Limits::quiet_NaN(),
                         Limits::denorm_min(), Limits::min(), Limits::max(),
                         Limits::lowest(), 1e-6f, random});
}

// Random int64 values, mostly near what is valid.
int64_t AnyIndex(Input& in) {
  return in.Pick<int64_t>({-1, 0, 1, 5, 64, 4095, kInt32Max, -kInt32Max - 1,
                           kInt64Max, kInt64Min,
                           static_cast<int64_t>(in.Bits())});
}

void MutateArgument(OpCase& c, Input& in, Mutation* mutation) {
  const Field& field = in.PickFrom(c.op.fields);
  switch (field.kind) {
    case FieldKind::kIn:
    case FieldKind::kOptionalIn:
    case FieldKind::kOut:
    case FieldKind::kOptionalOut:
      // None, or the tensor of another field.
      c.Set<const DLTensor*>(
          field, in.OneIn(3) ? nullptr : in.PickFrom(c.tensors).dl.get());
      return;
    case FieldKind::kInt32: {
      const int64_t now = c.Get<int32_t>(field);
      mutation->value = static_cast<int32_t>(AnySize(in, now));
      c.Set(field, static_cast<int32_t>(mutation->value));
      break;
    }
    case FieldKind::kInt64:
      mutation->value = AnySize(in, c.Get<int64_t>(field) & 0xffff);
      c.Set(field, mutation->value);
      break;
    case FieldKind::kFlags:
    case FieldKind::kReserved: {
      const uint32_t bits = static_cast<uint32_t>(
          in.OneIn(2) ? uint64_t{1} << in.Below(32) : in.Bits());
      mutation->value = bits;
      c.Set(field, bits);
      break;
    }
    case FieldKind::kFloat:
      c.Set(field, AnyFloat(in));
      return;
    case FieldKind::kWorkspace:
    case FieldKind::kWorkspaceSize:
      return;  // see MutateWorkspace
  }
  mutation->field = &field;
}

void MutateRank(Tensor& tensor, Input& in) {
  DLTensor& dl = *tensor.dl;
  const int32_t now = dl.ndim;
  dl.ndim = static_cast<int32_t>(
      in.Pick<int64_t>({0, 1, 2, 3, 4, 5, -1, 64, kInt32Max, -kInt32Max - 1}));
  if (dl.ndim < 1 || dl.ndim > 4 || dl.shape == nullptr) return;
  // Arrays of that length: anything else cannot be seen by the library.
  std::vector<int64_t> shape(dl.ndim, 1);
  std::vector<int64_t> strides(dl.ndim, 1);
  for (int32_t i = 0; i < dl.ndim; ++i) {
    shape[i] = i < now && now <= 4 ? dl.shape[i] : in.Between(0, 3);
    strides[i] = in.Between(0, 9);
  }
  tensor.SetShape(shape);
  if (dl.strides != nullptr) tensor.SetStrides(strides);
}

void MutateStrides(Tensor& tensor, Input& in) {
  DLTensor& dl = *tensor.dl;
  if (dl.strides != nullptr && in.OneIn(4)) {
    dl.strides = nullptr;
    return;
  }
  if (dl.ndim < 1 || dl.ndim > 4 || dl.shape == nullptr) return;
  if (dl.strides == nullptr) {
    std::vector<int64_t> compact(dl.ndim);
    uint64_t stride = 1;
    for (int32_t i = dl.ndim; i-- > 0; stride *= dl.shape[i]) {
      compact[i] = static_cast<int64_t>(stride);
    }
    tensor.SetStrides(compact);
  }
  int64_t& stride = dl.strides[in.Below(dl.ndim)];
  stride = AnySize(in, stride & 0xffff);
}

void MutateData(OpCase& c, Tensor& tensor, Input& in) {
  DLTensor& dl = *tensor.dl;
  const uintptr_t address = reinterpret_cast<uintptr_t>(dl.data);
  switch (in.Below(8)) {
    case 0:
      dl.data = nullptr;
      break;
    case 1:  // misaligned
      dl.data = reinterpret_cast<void*>(address + in.Between(1, 7));
      break;
    case 2:
      dl.data = reinterpret_cast<void*>(in.Pick<uintptr_t>(
          {1, 8, 4096, ~uintptr_t{0}, ~uintptr_t{0} - 63, uintptr_t{1} << 63}));
      break;
    case 3:
      dl.byte_offset = in.Pick<uint64_t>(
          {1, 2, 3, 8, uint64_t{1} << 32, uint64_t{1} << 63, ~uint64_t{0},
           ~uint64_t{0} - address, 0 - static_cast<uint64_t>(address)});
      break;
    default: {  // memory of another tensor
      const DLTensor& other = *in.PickFrom(c.tensors).dl;
      dl.data = other.data;
      dl.byte_offset = other.byte_offset;
      if (in.OneIn(2)) dl.byte_offset += in.Below(4) * (dl.dtype.bits / 8);
    }
  }
}

void MutateTensor(OpCase& c, Input& in) {
  if (c.tensors.empty()) return;
  Tensor& tensor = in.PickFrom(c.tensors);
  DLTensor& dl = *tensor.dl;
  switch (in.Below(8)) {
    case 0:
      return MutateRank(tensor, in);
    case 1:
      if (dl.ndim < 1 || dl.ndim > 4 || dl.shape == nullptr) return;
      if (in.OneIn(16)) {
        dl.shape = nullptr;
      } else {
        int64_t& size = dl.shape[in.Below(dl.ndim)];
        size = AnySize(in, size & 0xffff);
      }
      return;
    case 2:
      return MutateStrides(tensor, in);
    case 3:
    case 4:
      return MutateData(c, tensor, in);
    case 5:
      dl.dtype = AnyDType(in);
      return;
    case 6:
      switch (in.Below(3)) {
        case 0:
          dl.dtype.code = static_cast<uint8_t>(in.Below(256));
          return;
        case 1:
          dl.dtype.bits =
              static_cast<uint8_t>(in.Pick<uint64_t>({0, 1, 4, 7, 33, 128}));
          return;
        default:
          dl.dtype.lanes =
              static_cast<uint16_t>(in.Pick<uint64_t>({0, 2, 4, 65535}));
          return;
      }
    default:
      if (in.OneIn(2)) {
        dl.device.device_type = static_cast<int32_t>(in.Pick<int64_t>(
            {0, 1, 2, 3, 4, 7, 13, -1, kInt32Max, -kInt32Max - 1}));
      } else {
        dl.device.device_id = static_cast<int32_t>(
            in.Pick<int64_t>({1, -1, 7, kInt32Max, -kInt32Max - 1}));
      }
  }
}

// A size and all that equal it, in shapes and numbers: another valid call,
// perhaps, of no tokens or of too many.
void ResizeTogether(OpCase& c, Input& in) {
  if (c.tensors.empty()) return;
  const Tensor& chosen = in.PickFrom(c.tensors);
  if (chosen.dl->ndim < 1 || chosen.dl->ndim > 4 ||
      chosen.dl->shape == nullptr) {
    return;
  }
  const int64_t from = chosen.dl->shape[in.Below(chosen.dl->ndim)];
  const int64_t to =
      in.Pick<int64_t>({0, 1, 2, (from & 0xff) + 1, 2 * (from & 0xff), 1000,
                        1 << 20, kInt32Max / 64, kInt32Max, int64_t{1} << 30,
                        int64_t{1} << 40, int64_t{1} << 61});
  for (Tensor& tensor : c.tensors) {
    DLTensor& dl = *tensor.dl;
    if (dl.ndim < 1 || dl.ndim > 4 || dl.shape == nullptr) continue;
    for (int32_t i = 0; i < dl.ndim; ++i) {
      if (dl.shape[i] != from) continue;
      dl.shape[i] = to;
      if (dl.strides != nullptr && in.OneIn(4)) continue;
      dl.strides = nullptr;
    }
  }
}

void MutateContent(OpCase& c, Input& in) {
  if (c.tensors.empty()) return;
  const Tensor& tensor = in.PickFrom(c.tensors);
  const Extent extent = Describe(*tensor.dl);
  if (!extent.is_valid || extent.is_empty || !IsSmall(extent)) {
    return;
  }
  bool is_ours = false;
  for (const auto& buffer : c.buffers) {
    is_ours = is_ours || buffer->Contains(extent.begin, extent.bytes);
  }
  if (!is_ours) return;
  const bool is_int = tensor.dl->dtype.code == TENON_DL_INT;
  const uint64_t one_in = in.Pick<uint64_t>({1, 2, 8});
  ForEachElement(extent, [&](uint64_t address) {
    if (!in.OneIn(one_in)) return;
    const int64_t value =
        is_int ? AnyIndex(in) : static_cast<int64_t>(in.Bits());
    std::memcpy(reinterpret_cast<void*>(address), &value, extent.element);
  });
}

void MutateStructSize(OpCase& c, Input& in) {
  const size_t known = c.op.args_size;
  if (c.struct_size() != known) return;  // a second cut would halve pointers
  const size_t size = in.Pick<uint64_t>(
      {0, 1, 4, 7, 8, known - 8, known - 4, known - 1, known + 1, known + 8,
       known + 64, 4096, 4097, uint64_t{1} << 20, 0xffffffffu});
  // The library looks at four bytes at least and at 4096 at most.
  c.ResizeArgs(size > 4096 ? known : std::max<size_t>(size, 4));
  c.set_struct_size(static_cast<uint32_t>(size));
  if (size > known && size <= 4096 && in.OneIn(2)) {
    c.args->data()[known + in.Below(size - known)] = 1;
  }
}

}  // namespace

Mutation Mutate(OpCase& c, Input& in) {
  Mutation mutation;
  switch (in.Below(16)) {
    case 0:
      MutateStructSize(c, in);
      break;
    case 1:
      if (in.OneIn(4)) {
        c.has_args = false;
      } else {
        c.stream = reinterpret_cast<void*>(in.Pick<uintptr_t>({1, 4096}));
      }
      break;
    case 2:
    case 3:
    case 4:
      MutateArgument(c, in, &mutation);
      break;
    case 5:
    case 6:
      ResizeTogether(c, in);
      break;
    case 7:
    case 8:
      MutateContent(c, in);
      mutation.may_fail = false;
      break;
    default:
      MutateTensor(c, in);
  }
  return mutation;
}

void MutateWorkspace(OpCase& c, Input& in) {
  const Field* field = c.Find(FieldKind::kWorkspace);
  if (field == nullptr || c.workspace == nullptr) return;
  const Field& size_field = *c.Find(FieldKind::kWorkspaceSize);
  uint8_t* const data = c.workspace->data();
  const uint64_t size = c.workspace->size();
  switch (in.Below(5)) {
    case 0:
      c.Set<void*>(*field, nullptr);
      break;
    case 1:
      if (size == 0) return;
      c.Set(size_field, in.Pick<uint64_t>({0, size - 1, size / 2}));
      break;
    case 2:  // more than needed, as far as the library is concerned
      c.Set(size_field, ~uint64_t{0});
      break;
    case 3: {  // misaligned
      const uint64_t shift = in.Pick<uint64_t>({1, 8, 32});
      if (shift >= size) return;
      c.Set(*field, data + shift);
      c.Set(size_field, size - shift);
      break;
    }
    default: {  // inside a tensor
      const Memory& buffer = *in.PickFrom(c.buffers);
      c.Set(*field, buffer.data());
      c.Set(size_field, uint64_t{buffer.size()});
    }
  }
}

}  // namespace tenon::fuzz
