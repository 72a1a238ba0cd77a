#ifndef TENON_OPS_SAMPLER_LOGIT_EDITS_H_
#define TENON_OPS_SAMPLER_LOGIT_EDITS_H_

#include <cstdint>
#include <vector>

#include "ops/core/status.h"
#include "ops/sampler/sampler.h"

namespace tenon {

// What holds for all tokens of a sequence. Ids are of the vocabulary.
struct LogitRules {
  struct Bias {
    int32_t id = -1;
    float bias = 0.0f;
  };
  std::vector<Bias> biases;  // each id once
  // Sequences that are never completed: the last token of one is banned where
  // the sequence, prompt or not, ends in the others.
  std::vector<std::vector<int32_t>> bad_words;
  // Where there are any, no others can be drawn (SamplingFlags::kOnlyAllowed).
  std::vector<int32_t> allowed_ids;
  // Banned before there are min_tokens tokens of output.
  std::vector<int32_t> stop_ids;
  int32_t min_tokens = 0;
  // Tokens that DRY neither penalises nor repeats across.
  std::vector<int32_t> dry_breakers;
};

// Whether a row with these needs edits.
bool NeedsLogitEdits(const SamplingParams& params, const LogitRules& rules);

// The tokens of one sequence, and the edits of the row that draws its next one.
// Memory is allocated by Create; nothing else allocates, nor does assigning one
// to another made with the same arguments (for a fork). Host memory only.
class LogitEdits {
 public:
  // For sequences of up to max_tokens tokens. InvalidArgument for ids outside
  // the vocabulary, a bias that is not finite or given twice, an empty bad
  // word.
  static StatusOr<LogitEdits> Create(int64_t vocab, int32_t max_tokens,
                                     const LogitRules& rules);

  // Whether tokens count for frequency_penalty and presence_penalty.
  enum class Source { kPrompt, kOutput };
  // InvalidArgument, and nothing appended, for ids outside the vocabulary or
  // more tokens than max_tokens.
  Status Append(const int32_t* tokens, int32_t count, Source source);
  // Forgets all tokens but the first `length`; more than there are is no error.
  void Truncate(int32_t length);

  int32_t length() const { return static_cast<int32_t>(tokens_.size()); }
  const LogitRules& rules() const { return rules_; }

  // The most edits that Build can write.
  int64_t max_edits() const;
  // Writes the edits for the token after the last, in draw order, and returns
  // their number. `params` are the row's; their flags should have kOnlyAllowed
  // just where there are allowed_ids.
  //
  // DRY (p-e-w 2024; as llama.cpp): where the sequence ends in n >=
  // dry_allowed_length tokens that stood there before, the token that followed
  // then gets offset -dry_multiplier * dry_base ^ (n - dry_allowed_length), for
  // the longest such n. Takes time in proportion to the tokens searched.
  int64_t Build(const SamplingParams& params, LogitEdit* edits);

 private:
  // A token with its Source.
  struct Token {
    int32_t id;
    Source source;
  };
  // How often an id is in the sequence.
  struct Count {
    int32_t order;  // DrawOrder
    int32_t id;
    uint32_t prompt;
    uint32_t output;
  };
  // What the rules or the end of the sequence say of an id.
  struct Change {
    int32_t order;
    int32_t id;
    uint32_t flags;  // of LogitEdit
    float bias;
    float offset;
    bool until_min_tokens;  // only before there are min_tokens
  };

  LogitEdits() = default;
  Status CheckIds(const char* field, const std::vector<int32_t>& ids) const;
  void AddRule(int32_t id, uint32_t flags, float bias, bool until_min_tokens);
  void CountOne(Token token);
  void CountAll();
  bool EndsIn(const std::vector<int32_t>& word, size_t count) const;
  void AddBadWords();
  void AddDry(const SamplingParams& params);

  int64_t vocab_ = 0;
  size_t max_tokens_ = 0;
  LogitRules rules_;
  std::vector<Change> fixed_;  // of the rules, in draw order
  std::vector<char> is_breaker_;
  std::vector<Token> tokens_;
  std::vector<Count> counts_;  // in draw order
  uint32_t num_output_ = 0;

  // Scratch.
  std::vector<Token> sorted_;
  std::vector<Change> changes_;  // of the end of the sequence
  std::vector<int32_t> repeats_;
};

}  // namespace tenon

#endif  // TENON_OPS_SAMPLER_LOGIT_EDITS_H_
