#ifndef TENON_ENGINE_KV_CACHE_H_
#define TENON_ENGINE_KV_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/core/memory.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// Names a sequence of one KvCache. The generation tells it from others that had
// its slot before, so an id that outlives its sequence is found out. A zeroed
// id never names one.
struct SequenceId {
  uint32_t slot = 0;
  uint32_t generation = 0;
};
inline bool operator==(SequenceId a, SequenceId b) {
  return a.slot == b.slot && a.generation == b.generation;
}
inline bool operator!=(SequenceId a, SequenceId b) { return !(a == b); }

struct KvCacheOptions {
  int32_t num_layers = 0;
  int32_t num_kv_heads = 0;  // of this rank
  int32_t head_dim = 0;
  DType dtype = DType::kInvalid;
  // Of float8_e4m3: K and V are what is stored times this. 1 otherwise.
  float k_scale = 1.0f;
  float v_scale = 1.0f;
  Device device;
  int32_t page_size = 16;  // tokens
  int64_t num_pages = 0;
  int32_t max_sequences = 0;
  int32_t max_context = 0;  // tokens of one sequence
};

// New tokens of one sequence.
struct AppendRow {
  SequenceId sequence;
  int32_t num_tokens = 0;
};

// The first num_tokens tokens of a page, to be copied to another one.
struct PageCopy {
  int32_t from = 0;
  int32_t to = 0;
  int32_t num_tokens = 0;
};

// K and V of all layers in pages, and which page belongs to which sequences. A
// page holds page_size consecutive tokens of a sequence, in every layer at the
// same index. Forked sequences share pages; one that is about to write to a
// shared page gets a copy of it first.
//
// All memory, of the device and of the host, is allocated by Create. Not
// thread-safe.
//
// A step appends to several sequences at once, all or none:
//   PlanAppend      checks everything and changes nothing
//   CommitAppend    takes the pages; sequences have their new lengths
//   CopyPages, FillSlotMapping, FillBlockTable, then the step itself
//   FinishAppend, or RollbackAppend after an error, which leaves every sequence
//                   and the pages of its old length as they were
// Between PlanAppend and the end of the append nothing else may change a
// sequence: that is a FailedPrecondition.
class KvCache {
 public:
  KvCache() = default;  // without pages or sequences
  // InvalidArgument naming the option; ResourceExhausted naming the bytes. The
  // cache starts as zeros, so that what a kernel may read behind a sequence's
  // end is finite.
  static StatusOr<KvCache> Create(const KvCacheOptions& options);

  // The most pages that a cache of at most `bytes` bytes can have; 0 for a
  // negative number. num_pages is not read.
  static int64_t PagesIn(const KvCacheOptions& options, int64_t bytes);

  // [num_pages, page_size, num_kv_heads, head_dim]
  TensorView k(int32_t layer) const { return Plane(2 * layer); }
  TensorView v(int32_t layer) const { return Plane(2 * layer + 1); }

  // An empty sequence. ResourceExhausted when there are max_sequences.
  StatusOr<SequenceId> CreateSequence();
  // A second sequence with the same tokens, in the same pages.
  StatusOr<SequenceId> Fork(SequenceId sequence);
  // Forgets all tokens but the first `length`, at most those that there are.
  Status Truncate(SequenceId sequence, int32_t length);
  Status Release(SequenceId sequence);
  // NotFound for a sequence that does not exist (any more), as everywhere.
  StatusOr<int32_t> Length(SequenceId sequence) const;

  // InvalidArgument for a row without tokens or a sequence in two rows;
  // ResourceExhausted, with the numbers, for too few free pages or more than
  // max_context tokens.
  Status PlanAppend(const std::vector<AppendRow>& rows);
  void CommitAppend();
  void FinishAppend();
  // Also drops an append that is only planned.
  void RollbackAppend();

  // Of a committed append. The copies must be done, in stream order, before the
  // new tokens are written.
  const std::vector<PageCopy>& page_copies() const { return copies_; }
  Status CopyPages(Stream stream) const;
  // slots[i]: page * page_size + offset of new token i, row after row.
  void FillSlotMapping(int64_t* slots) const;
  // The pages of row i from table[i * row_stride] on, as many as its new length
  // has; the rest of a row is left alone.
  void FillBlockTable(int32_t* table, int64_t row_stride) const;

  int64_t num_free_pages() const {
    return static_cast<int64_t>(free_pages_.size());
  }
  int32_t num_sequences() const {
    return options_.max_sequences - static_cast<int32_t>(free_slots_.size());
  }
  // Columns that a block table needs: the most pages of a sequence.
  int32_t max_pages_per_sequence() const { return max_pages_; }
  const KvCacheOptions& options() const { return options_; }
  int64_t bytes() const { return static_cast<int64_t>(storage_.size()); }

 private:
  enum class AppendState { kNone, kPlanned, kCommitted };

  struct Sequence {
    uint32_t generation = 1;
    bool live = false;
    int32_t length = 0;
    int32_t num_pages = 0;  // always ceil(length / page_size)
    uint64_t plan = 0;      // the last one that it was part of
  };

  // What a row will change, and what it was.
  struct PlannedRow {
    uint32_t slot = 0;
    int32_t num_tokens = 0;
    int32_t old_length = 0;
    int32_t old_num_pages = 0;
    int32_t new_num_pages = 0;
    bool copies_last_page = false;
    int32_t shared_page = -1;  // the old last page, if it is copied
    bool left_last = false;    // no sequence has shared_page any more
  };

  // Of a page during PlanAppend: the earlier rows that will copy it, and so
  // leave it to the others, and the greatest length among them.
  struct Leaving {
    int32_t rows = 0;
    int32_t max_length = 0;
  };

  TensorView Plane(int32_t index) const;
  int32_t* PagesOf(uint32_t slot) const {
    return page_lists_.get() + static_cast<size_t>(slot) * max_pages_;
  }
  Status NoAppend(const char* what) const;
  // The sequence's slot.
  StatusOr<uint32_t> Find(SequenceId id) const;
  StatusOr<SequenceId> TakeSlot();
  void DropPages(uint32_t slot, int32_t keep);
  Status PlanRow(size_t index, const AppendRow& row, int64_t* pages_needed);
  void ClearLeaving();
  int32_t TakePage();
  void ReturnPage(int32_t page);

  KvCacheOptions options_;
  int32_t max_pages_ = 0;    // of one sequence
  int64_t token_bytes_ = 0;  // of K (or V) of one token in one layer
  int64_t plane_bytes_ = 0;  // of K (or V) of one layer
  Buffer storage_;           // K of layer 0, V of layer 0, K of layer 1, ...

  std::vector<Sequence> sequences_;
  std::vector<uint32_t> free_slots_;
  std::unique_ptr<int32_t[]> page_lists_;  // [max_sequences, max_pages_]
  std::vector<int32_t> free_pages_;        // the last one is taken first
  std::vector<int32_t> references_;  // of each page: sequences that have it

  AppendState append_ = AppendState::kNone;
  uint64_t plan_number_ = 0;
  std::vector<PlannedRow> plan_;
  std::vector<PageCopy> copies_;
  std::vector<Leaving> leaving_;  // of each page; empty between calls
};

}  // namespace tenon

#endif  // TENON_ENGINE_KV_CACHE_H_
