#include "ops/sampler/logit_edits.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/core/validate.h"
#include "ops/sampler/row_plan.h"

namespace tenon {
namespace {

constexpr char kName[] = "LogitEdits";

bool HasPenalties(const SamplingParams& params) {
  return (params.repetition_penalty != 0.0f &&
          params.repetition_penalty != 1.0f) ||
         params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f;
}

}  // namespace

bool NeedsLogitEdits(const SamplingParams& params, const LogitRules& rules) {
  return HasPenalties(params) || params.dry_multiplier > 0.0f ||
         !rules.biases.empty() || !rules.bad_words.empty() ||
         !rules.allowed_ids.empty() ||
         (rules.min_tokens > 0 && !rules.stop_ids.empty());
}

Status LogitEdits::CheckIds(const char* field,
                            const std::vector<int32_t>& ids) const {
  for (int32_t id : ids) {
    TENON_RETURN_IF_ERROR(CheckRange(kName, field, id, 0, vocab_ - 1));
  }
  return Status();
}

void LogitEdits::AddRule(int32_t id, uint32_t flags, float bias,
                         bool until_min_tokens) {
  fixed_.push_back(
      {DrawOrder(id, vocab_), id, flags, bias, 0.0f, until_min_tokens});
}

StatusOr<LogitEdits> LogitEdits::Create(int64_t vocab, int32_t max_tokens,
                                        const LogitRules& rules) {
  LogitEdits e;
  TENON_RETURN_IF_ERROR(CheckRange(kName, "vocab", vocab, 1, kMaxVocab));
  TENON_RETURN_IF_ERROR(
      CheckRange(kName, "max_tokens", max_tokens, 0, LogitEdit::kCountMask));
  e.vocab_ = vocab;
  e.max_tokens_ = static_cast<size_t>(max_tokens);
  e.rules_ = rules;
  for (const LogitRules::Bias& bias : rules.biases) {
    TENON_RETURN_IF_ERROR(e.CheckIds("id of biases", {bias.id}));
    constexpr double kMax = std::numeric_limits<float>::max();
    TENON_RETURN_IF_ERROR(CheckFinite(kName, "bias", bias.bias, -kMax, kMax));
    e.AddRule(bias.id, 0, bias.bias, false);
  }
  for (const std::vector<int32_t>& word : rules.bad_words) {
    TENON_RETURN_IF_ERROR(e.CheckIds("id of bad_words", word));
    if (word.empty()) {
      return InvalidArgumentError(kName, ": a bad word has no tokens");
    }
    if (word.size() == 1) e.AddRule(word[0], LogitEdit::kBan, 0.0f, false);
  }
  TENON_RETURN_IF_ERROR(e.CheckIds("allowed_ids", rules.allowed_ids));
  TENON_RETURN_IF_ERROR(e.CheckIds("stop_ids", rules.stop_ids));
  TENON_RETURN_IF_ERROR(e.CheckIds("dry_breakers", rules.dry_breakers));
  for (int32_t id : rules.allowed_ids) {
    e.AddRule(id, LogitEdit::kAllow, 0.0f, false);
  }
  for (int32_t id : rules.stop_ids) e.AddRule(id, LogitEdit::kBan, 0.0f, true);
  const auto by_order = [](const Change& a, const Change& b) {
    return a.order < b.order;
  };
  std::stable_sort(e.fixed_.begin(), e.fixed_.end(), by_order);
  // Biases come first among those of an id.
  for (size_t i = 1; i < e.fixed_.size(); ++i) {
    const Change& a = e.fixed_[i - 1];
    const Change& b = e.fixed_[i];
    if (a.id == b.id && a.bias != 0.0f && b.bias != 0.0f) {
      return InvalidArgumentError(kName, ": two biases of id ", a.id);
    }
  }
  e.is_breaker_.assign(
      rules.dry_breakers.empty() ? 0 : static_cast<size_t>(vocab), 0);
  for (int32_t id : rules.dry_breakers) {
    e.is_breaker_[static_cast<size_t>(id)] = 1;
  }
  e.tokens_.reserve(e.max_tokens_);
  e.sorted_.reserve(e.max_tokens_);
  e.repeats_.reserve(e.max_tokens_);
  e.counts_.reserve(std::min(e.max_tokens_, static_cast<size_t>(vocab)));
  e.changes_.reserve(e.max_tokens_ + rules.bad_words.size());
  return e;
}

void LogitEdits::CountOne(Token token) {
  const int32_t order = DrawOrder(token.id, vocab_);
  auto at = std::lower_bound(
      counts_.begin(), counts_.end(), order,
      [](const Count& count, int32_t wanted) { return count.order < wanted; });
  if (at == counts_.end() || at->order != order) {
    at = counts_.insert(at, {order, token.id, 0, 0});
  }
  ++(token.source == Source::kPrompt ? at->prompt : at->output);
}

void LogitEdits::CountAll() {
  sorted_ = tokens_;
  std::sort(sorted_.begin(), sorted_.end(), [&](Token a, Token b) {
    return DrawOrder(a.id, vocab_) < DrawOrder(b.id, vocab_);
  });
  counts_.clear();
  for (Token token : sorted_) {
    if (counts_.empty() || counts_.back().id != token.id) {
      counts_.push_back({DrawOrder(token.id, vocab_), token.id, 0, 0});
    }
    Count& count = counts_.back();
    ++(token.source == Source::kPrompt ? count.prompt : count.output);
  }
}

Status LogitEdits::Append(const int32_t* tokens, int32_t count, Source source) {
  const size_t size = static_cast<size_t>(std::max(count, 0));
  if (size > max_tokens_ - tokens_.size()) {
    return InvalidArgumentError(kName, ": ", tokens_.size() + size,
                                " tokens, more than max_tokens ", max_tokens_);
  }
  for (size_t i = 0; i < size; ++i) {
    TENON_RETURN_IF_ERROR(CheckRange(kName, "token", tokens[i], 0, vocab_ - 1));
  }
  for (size_t i = 0; i < size; ++i) tokens_.push_back({tokens[i], source});
  if (source == Source::kOutput) num_output_ += static_cast<uint32_t>(size);
  // One by one is quadratic.
  constexpr size_t kFew = 16;
  if (size > kFew) {
    CountAll();
  } else {
    for (size_t i = 0; i < size; ++i) CountOne({tokens[i], source});
  }
  return Status();
}

void LogitEdits::Truncate(int32_t length) {
  const size_t kept = static_cast<size_t>(std::max(length, 0));
  if (kept >= tokens_.size()) return;
  tokens_.resize(kept);
  num_output_ = static_cast<uint32_t>(std::count_if(
      tokens_.begin(), tokens_.end(),
      [](Token token) { return token.source == Source::kOutput; }));
  CountAll();
}

int64_t LogitEdits::max_edits() const {
  const size_t ids =
      counts_.capacity() + fixed_.size() + rules_.bad_words.size();
  return std::min(vocab_, static_cast<int64_t>(ids));
}

// Whether the sequence ends in the first `count` tokens of the word.
bool LogitEdits::EndsIn(const std::vector<int32_t>& word, size_t count) const {
  if (count > tokens_.size()) return false;
  const Token* end = tokens_.data() + tokens_.size() - count;
  for (size_t i = 0; i < count; ++i) {
    if (end[i].id != word[i]) return false;
  }
  return true;
}

void LogitEdits::AddBadWords() {
  for (const std::vector<int32_t>& word : rules_.bad_words) {
    if (word.size() < 2 || !EndsIn(word, word.size() - 1)) continue;
    const int32_t id = word.back();
    changes_.push_back(
        {DrawOrder(id, vocab_), id, LogitEdit::kBan, 0.0f, 0.0f, false});
  }
}

void LogitEdits::AddDry(const SamplingParams& params) {
  const int32_t length = static_cast<int32_t>(tokens_.size());
  const int32_t range =
      params.dry_range > 0 ? std::min(params.dry_range, length) : length;
  const int32_t allowed =
      params.dry_allowed_length > 0 ? params.dry_allowed_length : 2;
  // The sequence backwards.
  const auto at = [&](int32_t i) { return tokens_[length - 1 - i].id; };
  const auto breaks = [&](int32_t id) {
    return !is_breaker_.empty() && is_breaker_[id] != 0;
  };
  int32_t limit = 0;  // of a repeat: it does not reach past a breaker
  while (limit < range && !breaks(at(limit))) ++limit;
  if (limit < allowed) return;
  // repeats_[i]: tokens from i on that are as those from 0 on (Z-algorithm);
  // [left, right) is the match that reaches furthest.
  repeats_.assign(static_cast<size_t>(range), 0);
  const double base = params.dry_base > 0.0f ? params.dry_base : 1.75;
  int32_t left = 0;
  int32_t right = 0;
  for (int32_t i = 1; i < range; ++i) {
    int32_t n = i < right ? std::min(repeats_[i - left], right - i) : 0;
    while (i + n < range && at(n) == at(i + n)) ++n;
    repeats_[i] = n;
    if (i + n > right) {
      left = i;
      right = i + n;
    }
    const int32_t repeat = std::min(n, limit);
    const int32_t next = at(i - 1);
    if (repeat < allowed || breaks(next)) continue;
    const double penalty =
        params.dry_multiplier * std::pow(base, repeat - allowed);
    changes_.push_back(
        {DrawOrder(next, vocab_), next, 0, 0.0f, -FloatBelow(penalty), false});
  }
}

int64_t LogitEdits::Build(const SamplingParams& params, LogitEdit* edits) {
  changes_.clear();
  AddBadWords();
  if (params.dry_multiplier > 0.0f) AddDry(params);
  std::sort(changes_.begin(), changes_.end(),
            [](const Change& a, const Change& b) { return a.order < b.order; });
  // Three lists in draw order become one.
  constexpr int32_t kEnd = std::numeric_limits<int32_t>::max();
  const bool early =
      num_output_ < static_cast<uint32_t>(std::max(rules_.min_tokens, 0));
  auto count = HasPenalties(params) ? counts_.begin() : counts_.end();
  auto fixed = fixed_.begin();
  auto change = changes_.begin();
  LogitEdit* out = edits;
  while (true) {
    const int32_t order =
        std::min({count != counts_.end() ? count->order : kEnd,
                  fixed != fixed_.end() ? fixed->order : kEnd,
                  change != changes_.end() ? change->order : kEnd});
    if (order == kEnd) return out - edits;
    LogitEdit edit;
    if (count != counts_.end() && count->order == order) {
      edit.id = count->id;
      edit.state = count->output;
      if (count->prompt > 0) edit.state |= LogitEdit::kInPrompt;
      ++count;
    }
    const auto apply = [&](const Change& c) {
      edit.id = c.id;
      edit.state |= c.flags;
      edit.bias += c.bias;
      // The longest repeat of a token counts.
      edit.offset = std::min(edit.offset, c.offset);
    };
    for (; fixed != fixed_.end() && fixed->order == order; ++fixed) {
      if (early || !fixed->until_min_tokens) apply(*fixed);
    }
    for (; change != changes_.end() && change->order == order; ++change) {
      apply(*change);
    }
    if (edit.id >= 0) *out++ = edit;
  }
}

}  // namespace tenon
