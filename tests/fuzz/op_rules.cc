#include <set>

#include "tests/fuzz/op_case.h"

// The rules that tenon.h states for all ops, as an oracle.

namespace tenon::fuzz {
namespace {

bool ArgsMustFail(const OpCase& c) {
  const uint32_t size = c.struct_size();
  if (size < 8 || size > 4096 || size % 8 != 0) return true;
  for (size_t i = c.op.args_size; i < size && i < c.args->size(); ++i) {
    if (c.args->data()[i] != 0) return true;
  }
  for (const Field& field : c.op.fields) {
    switch (field.kind) {
      case FieldKind::kReserved:
        if (c.Get<uint32_t>(field) != 0) return true;
        break;
      case FieldKind::kFlags:
        if ((c.Get<uint32_t>(field) & ~TENON_FLAG_BATCH_INVARIANT) != 0) {
          return true;
        }
        break;
      case FieldKind::kIn:
      case FieldKind::kOut:
        if (c.Get<const DLTensor*>(field) == nullptr) return true;
        break;
      default:
        break;
    }
  }
  return false;
}

bool HasSharedElements(const Extent& extent) {
  std::set<uint64_t> seen;
  bool shared = false;
  ForEachElement(extent, [&](uint64_t address) {
    shared = shared || !seen.insert(address).second;
  });
  return shared;
}

bool Overlap(const Extent& a, const Extent& b) {
  if (a.is_empty || b.is_empty) return false;
  if (a.begin >= b.begin + b.bytes || b.begin >= a.begin + a.bytes) {
    return false;
  }
  std::set<uint64_t> bytes;
  ForEachElement(a, [&](uint64_t address) {
    for (uint64_t i = 0; i < a.element; ++i) bytes.insert(address + i);
  });
  bool overlap = false;
  ForEachElement(b, [&](uint64_t address) {
    for (uint64_t i = 0; i < b.element; ++i) {
      overlap = overlap || bytes.count(address + i) != 0;
    }
  });
  return overlap;
}

bool MayAlias(const Op& op, const OpCase::Given& a, const OpCase::Given& b) {
  if (op.alias_out == nullptr) return false;
  const auto is = [](const OpCase::Given& given, const char* name) {
    return std::strcmp(given.field->name, name) == 0;
  };
  return (is(a, op.alias_out) && is(b, op.alias_in)) ||
         (is(a, op.alias_in) && is(b, op.alias_out));
}

bool AliasingMustFail(const Op& op, const std::vector<OpCase::Given>& given,
                      const std::vector<Extent>& extents) {
  for (size_t i = 0; i < given.size(); ++i) {
    const Extent& out = extents[i];
    if (!given[i].field->is_out()) continue;
    if (out.elements > static_cast<int64_t>(out.bytes)) return true;
    if (!IsSmall(out)) continue;
    if (HasSharedElements(out)) return true;
    if (!given[i].field->is_used_whole) continue;
    for (size_t j = 0; j < given.size(); ++j) {
      const Extent& other = extents[j];
      if (j == i || !given[j].field->is_used_whole || !IsSmall(other) ||
          !Overlap(out, other)) {
        continue;
      }
      const bool is_same =
          out.begin == other.begin && out.element == other.element &&
          out.shape == other.shape && out.strides == other.strides;
      if (!MayAlias(op, given[i], given[j]) || !is_same) return true;
    }
  }
  return false;
}

}  // namespace

bool MustFail(OpCase& c, bool context_is_valid) {
  if (!c.has_args || !context_is_valid || ArgsMustFail(c)) return true;
  const std::vector<OpCase::Given> given = c.GivenTensors();
  std::vector<Extent> extents;
  for (const OpCase::Given& g : given) {
    extents.push_back(Describe(*g.tensor->dl));
    if (!extents.back().is_valid) return true;
    if (extents.back().on_cpu != extents[0].on_cpu) return true;
  }
  if (given.empty() || !extents[0].on_cpu) return c.context != 0;
  if (c.stream != nullptr) return true;
  return AliasingMustFail(c.op, given, extents);
}

}  // namespace tenon::fuzz
