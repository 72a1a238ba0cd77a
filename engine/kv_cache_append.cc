#include <algorithm>
#include <cassert>

#include "engine/kv_cache.h"

// The append of a step: planned, committed, then finished or rolled back.

namespace tenon {

Status KvCache::PlanRow(size_t index, const AppendRow& row,
                        int64_t* pages_needed) {
  const StatusOr<uint32_t> slot = Find(row.sequence);
  if (!slot.ok()) return slot.status();
  Sequence& sequence = sequences_[*slot];
  if (row.num_tokens < 1) {
    return InvalidArgumentError("KvCache: rows[", index, "].num_tokens is ",
                                row.num_tokens, ", expected at least 1");
  }
  if (sequence.plan == plan_number_) {
    return InvalidArgumentError("KvCache: rows[", index,
                                "].sequence is in two rows of one step");
  }
  sequence.plan = plan_number_;
  const int64_t new_length = int64_t{sequence.length} + row.num_tokens;
  if (new_length > options_.max_context) {
    return ResourceExhaustedError(
        "KvCache: rows[", index, "].sequence would have ", new_length,
        " tokens, max_context is ", options_.max_context);
  }
  PlannedRow planned;
  planned.slot = *slot;
  planned.num_tokens = row.num_tokens;
  planned.old_length = sequence.length;
  planned.old_num_pages = sequence.num_pages;
  planned.new_num_pages = static_cast<int32_t>(
      (new_length + options_.page_size - 1) / options_.page_size);
  *pages_needed += planned.new_num_pages - planned.old_num_pages;
  if (sequence.length % options_.page_size != 0) {
    // New tokens go into the last page. Where all that share it write in this
    // append, the last one may do so in place, unless that would overwrite
    // tokens that a longer one, which copies them, gets back by a rollback.
    const int32_t last = PagesOf(*slot)[sequence.num_pages - 1];
    Leaving& leaving = leaving_[last];
    if (references_[last] - leaving.rows > 1 ||
        leaving.max_length > sequence.length) {
      ++leaving.rows;
      leaving.max_length = std::max(leaving.max_length, sequence.length);
      planned.copies_last_page = true;
      planned.shared_page = last;
      ++*pages_needed;
    }
  }
  plan_.push_back(planned);
  return Status();
}

void KvCache::ClearLeaving() {
  for (const PlannedRow& row : plan_) {
    if (row.copies_last_page) leaving_[row.shared_page] = Leaving();
  }
}

Status KvCache::PlanAppend(const std::vector<AppendRow>& rows) {
  TENON_RETURN_IF_ERROR(NoAppend("PlanAppend"));
  ++plan_number_;
  ClearLeaving();  // of a plan that ended in an exception
  plan_.clear();
  copies_.clear();
  int64_t pages_needed = 0;
  Status status;
  for (size_t i = 0; i < rows.size() && status.ok(); ++i) {
    status = PlanRow(i, rows[i], &pages_needed);
  }
  ClearLeaving();
  if (status.ok() && pages_needed > num_free_pages()) {
    status = ResourceExhaustedError("KvCache: the step needs ", pages_needed,
                                    " pages, ", num_free_pages(), " of ",
                                    options_.num_pages, " are free");
  }
  if (!status.ok()) {
    plan_.clear();
    return status;
  }
  append_ = AppendState::kPlanned;
  return Status();
}

void KvCache::CommitAppend() {
  assert(append_ == AppendState::kPlanned);
  for (PlannedRow& row : plan_) {
    Sequence& sequence = sequences_[row.slot];
    int32_t* pages = PagesOf(row.slot);
    if (row.copies_last_page) {
      const int32_t copy = TakePage();
      copies_.push_back(
          {row.shared_page, copy, row.old_length % options_.page_size});
      // Not free before FinishAppend: a rollback needs its contents.
      row.left_last = --references_[row.shared_page] == 0;
      pages[row.old_num_pages - 1] = copy;
    }
    while (sequence.num_pages < row.new_num_pages) {
      pages[sequence.num_pages++] = TakePage();
    }
    sequence.length += row.num_tokens;
  }
  append_ = AppendState::kCommitted;
}

void KvCache::FinishAppend() {
  assert(append_ == AppendState::kCommitted);
  for (const PlannedRow& row : plan_) {
    if (row.left_last) free_pages_.push_back(row.shared_page);
  }
  append_ = AppendState::kNone;
  plan_.clear();
  copies_.clear();
}

void KvCache::RollbackAppend() {
  if (append_ == AppendState::kCommitted) {
    // Backwards, so that the free pages too are in the order that they were.
    for (auto row = plan_.rbegin(); row != plan_.rend(); ++row) {
      DropPages(row->slot, row->old_num_pages);
      if (row->copies_last_page) {
        int32_t& last = PagesOf(row->slot)[row->old_num_pages - 1];
        ReturnPage(last);
        last = row->shared_page;
        ++references_[last];
      }
      sequences_[row->slot].length = row->old_length;
    }
  }
  append_ = AppendState::kNone;
  plan_.clear();
  copies_.clear();
}

Status KvCache::CopyPages(Stream stream) const {
  const int64_t page_bytes = token_bytes_ * options_.page_size;
  for (int32_t plane = 0; plane < 2 * options_.num_layers; ++plane) {
    char* data = static_cast<char*>(storage_.data()) + plane * plane_bytes_;
    for (const PageCopy& copy : copies_) {
      TENON_RETURN_IF_ERROR(CopyMemory(
          data + copy.to * page_bytes, options_.device,
          data + copy.from * page_bytes, options_.device,
          static_cast<size_t>(copy.num_tokens * token_bytes_), stream));
    }
  }
  return Status();
}

void KvCache::FillSlotMapping(int64_t* slots) const {
  for (const PlannedRow& row : plan_) {
    const int32_t* pages = PagesOf(row.slot);
    for (int32_t i = 0; i < row.num_tokens; ++i) {
      const int32_t position = row.old_length + i;
      *slots++ =
          int64_t{pages[position / options_.page_size]} * options_.page_size +
          position % options_.page_size;
    }
  }
}

void KvCache::FillBlockTable(int32_t* table, int64_t row_stride) const {
  for (const PlannedRow& row : plan_) {
    std::copy_n(PagesOf(row.slot), row.new_num_pages, table);
    table += row_stride;
  }
}

}  // namespace tenon
