#ifndef TENON_SERVICE_PAGE_BUDGET_H_
#define TENON_SERVICE_PAGE_BUDGET_H_

#include <cstdint>
#include <optional>
#include <utility>

namespace tenon::service {

class PageBudget;

// Pages set aside; the budget has them back when the claim goes.
class PageClaim {
 public:
  PageClaim() = default;
  PageClaim(PageClaim&& other) noexcept { Swap(&other); }
  PageClaim& operator=(PageClaim&& other) noexcept {
    Swap(&other);
    return *this;
  }
  ~PageClaim();

  int64_t pages() const { return pages_; }
  // Moves some of the pages to a claim of their own.
  PageClaim Split(int64_t pages) {
    PageClaim part(budget_, pages);
    pages_ -= pages;
    return part;
  }

 private:
  friend class PageBudget;
  PageClaim(PageBudget* budget, int64_t pages)
      : budget_(budget), pages_(pages) {}
  void Swap(PageClaim* other) {
    std::swap(budget_, other->budget_);
    std::swap(pages_, other->pages_);
  }

  PageBudget* budget_ = nullptr;
  int64_t pages_ = 0;
};

// Sets KV cache pages aside for the whole life of a sequence before it begins,
// so that no step ever runs out of them.
class PageBudget {
 public:
  explicit PageBudget(int64_t pages) : free_(pages) {}

  std::optional<PageClaim> Claim(int64_t pages) {
    if (pages > free_) return std::nullopt;
    free_ -= pages;
    return PageClaim(this, pages);
  }
  int64_t free() const { return free_; }

 private:
  friend class PageClaim;
  int64_t free_;
};

inline PageClaim::~PageClaim() {
  if (budget_ != nullptr) budget_->free_ += pages_;
}

}  // namespace tenon::service

#endif  // TENON_SERVICE_PAGE_BUDGET_H_
