#include "engine/kv_cache.h"

#include <algorithm>
#include <limits>

#include "ops/core/validate.h"

namespace tenon {
namespace {

constexpr char kWhat[] = "KvCache";
constexpr int64_t kAlignment = 256;

Status Validate(const KvCacheOptions& o) {
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_layers", o.num_layers, 1, 1 << 16));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "num_kv_heads", o.num_kv_heads, 1, 1 << 16));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "head_dim", o.head_dim, 1, 1 << 16));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "page_size", o.page_size, 1, 1 << 16));
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "num_pages", o.num_pages, 1,
                                   std::numeric_limits<int32_t>::max()));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "max_sequences", o.max_sequences, 1, 1 << 20));
  TENON_RETURN_IF_ERROR(
      CheckRange(kWhat, "max_context", o.max_context, 1, 1 << 30));
  constexpr DTypeSet kDTypes = kFloatDTypes | DTypes({DType::kFloat8E4M3});
  if ((kDTypes >> static_cast<int>(o.dtype) & 1u) == 0) {
    return InvalidArgumentError(
        kWhat, ": dtype is ", DTypeName(o.dtype),
        ", expected float32, float16, bfloat16 or float8_e4m3");
  }
  constexpr double kMin = std::numeric_limits<float>::min();
  constexpr double kMax = std::numeric_limits<float>::max();
  TENON_RETURN_IF_ERROR(CheckFinite(kWhat, "k_scale", o.k_scale, kMin, kMax));
  TENON_RETURN_IF_ERROR(CheckFinite(kWhat, "v_scale", o.v_scale, kMin, kMax));
  if (o.dtype != DType::kFloat8E4M3 &&
      (o.k_scale != 1.0f || o.v_scale != 1.0f)) {
    return InvalidArgumentError(kWhat, ": k_scale is ", o.k_scale,
                                " and v_scale ", o.v_scale, ", expected 1 for ",
                                DTypeName(o.dtype));
  }
  return Status();
}

// Of one token's K (or V) in one layer.
int64_t TokenBytes(const KvCacheOptions& o) {
  return int64_t{o.num_kv_heads} * o.head_dim *
         static_cast<int64_t>(DTypeSize(o.dtype));
}

}  // namespace

int64_t KvCache::PagesIn(const KvCacheOptions& o, int64_t bytes) {
  const int64_t plane =
      std::max<int64_t>(bytes, 0) / 2 / o.num_layers / kAlignment * kAlignment;
  return plane / (TokenBytes(o) * o.page_size);
}

StatusOr<KvCache> KvCache::Create(const KvCacheOptions& options) {
  TENON_RETURN_IF_ERROR(Validate(options));
  KvCache cache;
  cache.options_ = options;
  const int64_t context_pages =
      (int64_t{options.max_context} + options.page_size - 1) /
      options.page_size;
  cache.max_pages_ =
      static_cast<int32_t>(std::min(context_pages, options.num_pages));
  cache.token_bytes_ = TokenBytes(options);
  int64_t bytes;
  if (__builtin_mul_overflow(cache.token_bytes_ * options.page_size,
                             options.num_pages, &bytes) ||
      __builtin_add_overflow(bytes, kAlignment - 1, &bytes) ||
      __builtin_mul_overflow(
          cache.plane_bytes_ = bytes / kAlignment * kAlignment,
          int64_t{2} * options.num_layers, &bytes)) {
    return InvalidArgumentError(kWhat, ": num_pages is ", options.num_pages,
                                ", which makes more than 2^63 bytes");
  }
  StatusOr<Buffer> storage =
      Buffer::Allocate(options.device, static_cast<size_t>(bytes));
  if (!storage.ok()) {
    return Status(storage.status().code(),
                  StrCat("KvCache: ", options.num_pages, " pages need ", bytes,
                         " bytes: ", storage.status().message()));
  }
  cache.storage_ = *std::move(storage);
  TENON_RETURN_IF_ERROR(FillMemory(cache.storage_.data(), options.device, 0,
                                   cache.storage_.size(), Stream()));
  TENON_RETURN_IF_ERROR(Synchronize(options.device, Stream()));

  const size_t max_sequences = static_cast<size_t>(options.max_sequences);
  const size_t num_pages = static_cast<size_t>(options.num_pages);
  cache.sequences_.resize(max_sequences);
  cache.page_lists_.reset(
      new int32_t[max_sequences * static_cast<size_t>(cache.max_pages_)]);
  cache.references_.resize(num_pages);
  cache.leaving_.resize(num_pages);
  cache.plan_.reserve(max_sequences);
  cache.copies_.reserve(max_sequences);
  cache.free_slots_.reserve(max_sequences);
  for (uint32_t slot = options.max_sequences; slot > 0; --slot) {
    cache.free_slots_.push_back(slot - 1);
  }
  cache.free_pages_.reserve(num_pages);
  for (int64_t page = options.num_pages; page > 0; --page) {
    cache.free_pages_.push_back(static_cast<int32_t>(page - 1));
  }
  return cache;
}

TensorView KvCache::Plane(int32_t index) const {
  return MakeTensor(
      static_cast<const char*>(storage_.data()) + index * plane_bytes_,
      options_.dtype, options_.device,
      {options_.num_pages, options_.page_size, options_.num_kv_heads,
       options_.head_dim});
}

Status KvCache::NoAppend(const char* what) const {
  if (append_ == AppendState::kNone) return Status();
  return FailedPreconditionError(kWhat, ": ", what,
                                 " while an append is under way");
}

StatusOr<uint32_t> KvCache::Find(SequenceId id) const {
  if (id.slot >= sequences_.size() || !sequences_[id.slot].live ||
      sequences_[id.slot].generation != id.generation) {
    return NotFoundError(kWhat, ": there is no sequence ", id.slot, ".",
                         id.generation, " (any more)");
  }
  return id.slot;
}

int32_t KvCache::TakePage() {
  const int32_t page = free_pages_.back();
  free_pages_.pop_back();
  references_[page] = 1;
  return page;
}

void KvCache::ReturnPage(int32_t page) {
  if (--references_[page] == 0) free_pages_.push_back(page);
}

StatusOr<SequenceId> KvCache::TakeSlot() {
  if (free_slots_.empty()) {
    return ResourceExhaustedError(kWhat, ": all ", options_.max_sequences,
                                  " sequences (max_sequences) are in use");
  }
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  sequences_[slot].live = true;
  return SequenceId{slot, sequences_[slot].generation};
}

// Pages go back in the reverse order of their taking, so that a sequence that
// grows again gets the same ones.
void KvCache::DropPages(uint32_t slot, int32_t keep) {
  Sequence& sequence = sequences_[slot];
  const int32_t* pages = PagesOf(slot);
  while (sequence.num_pages > keep) ReturnPage(pages[--sequence.num_pages]);
}

StatusOr<SequenceId> KvCache::CreateSequence() {
  TENON_RETURN_IF_ERROR(NoAppend("CreateSequence"));
  return TakeSlot();
}

StatusOr<SequenceId> KvCache::Fork(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(NoAppend("Fork"));
  const StatusOr<uint32_t> parent = Find(sequence);
  if (!parent.ok()) return parent.status();
  StatusOr<SequenceId> id = TakeSlot();
  if (!id.ok()) return id;
  const Sequence& from = sequences_[*parent];
  Sequence& to = sequences_[id->slot];
  to.length = from.length;
  to.num_pages = from.num_pages;
  const int32_t* pages = PagesOf(*parent);
  std::copy_n(pages, from.num_pages, PagesOf(id->slot));
  for (int32_t i = 0; i < from.num_pages; ++i) ++references_[pages[i]];
  return id;
}

Status KvCache::Truncate(SequenceId sequence, int32_t length) {
  TENON_RETURN_IF_ERROR(NoAppend("Truncate"));
  const StatusOr<uint32_t> slot = Find(sequence);
  if (!slot.ok()) return slot.status();
  TENON_RETURN_IF_ERROR(CheckRange(kWhat, "length of Truncate", length, 0,
                                   sequences_[*slot].length));
  const int64_t keep =
      (int64_t{length} + options_.page_size - 1) / options_.page_size;
  DropPages(*slot, static_cast<int32_t>(keep));
  sequences_[*slot].length = length;
  return Status();
}

Status KvCache::Release(SequenceId sequence) {
  TENON_RETURN_IF_ERROR(NoAppend("Release"));
  const StatusOr<uint32_t> slot = Find(sequence);
  if (!slot.ok()) return slot.status();
  DropPages(*slot, 0);
  Sequence& released = sequences_[*slot];
  released.length = 0;
  released.live = false;
  if (++released.generation == 0) released.generation = 1;
  free_slots_.push_back(*slot);
  return Status();
}

StatusOr<int32_t> KvCache::Length(SequenceId sequence) const {
  const StatusOr<uint32_t> slot = Find(sequence);
  if (!slot.ok()) return slot.status();
  return sequences_[*slot].length;
}

}  // namespace tenon
