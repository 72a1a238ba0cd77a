#ifndef TENON_TESTS_ENGINE_TRAFFIC_H_
#define TENON_TESTS_ENGINE_TRAFFIC_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/session.h"

namespace tenon::testing {

// Which rows get their logits.
enum class TrafficLogits {
  kSome,  // one of every second step
  kAll,   // with which, on CUDA, EnqueueStep waits for its own step
  kNone,
};

inline constexpr int32_t kTrafficSequences = 11;
inline constexpr int32_t kTrafficContext = 96;

// Of a session for Traffic, with graphs of 1, 2, 4, 8 and 11 rows.
inline SessionOptions TrafficOptions(bool batch_invariant) {
  SessionOptions options;
  options.max_sequences = kTrafficSequences;
  options.max_tokens = 64;
  options.max_context = kTrafficContext;
  options.batch_invariant = batch_invariant;
  options.count_experts = true;
  options.num_threads = 2;
  return options;
}

// A simulated host of a session: sequences come with a prompt, go on with what
// was drawn, and leave. When they do follows from a seed alone, so two sessions
// get the same steps.
class Traffic {
 public:
  // What became of a sequence.
  struct Record {
    std::vector<int32_t> prompt;
    uint64_t seed = 0;
    std::vector<int32_t> tokens;  // drawn
    std::vector<float> logprobs;
    std::vector<float> mirostat_mus;
  };

  explicit Traffic(Session* session,
                   TrafficLogits which_logits = TrafficLogits::kSome,
                   int32_t max_length = kTrafficContext)
      : session_(session),
        which_logits_(which_logits),
        vocab_(static_cast<int32_t>(session->model().config.vocab_size)),
        max_length_(max_length) {}

  // Runs steps; with `pipelined` each is enqueued before the one before it was
  // waited for.
  void Run(int num_steps, bool pipelined) {
    for (int i = 0; i < num_steps && !::testing::Test::HasFatalFailure(); ++i) {
      MakeRows(pipelined);
      if (pipelined) {
        ASSERT_NO_FATAL_FAILURE(Check(session_->EnqueueStep(rows_)));
        Leave();
        if (session_->num_steps_in_flight() == kMaxStepsInFlight) Wait();
      } else {
        ASSERT_NO_FATAL_FAILURE(
            Check(session_->Step(rows_, &results_, &stats_)));
        TakeResults();
        Leave();
      }
    }
    while (session_->num_steps_in_flight() > 0) Wait();
  }

  // Between two runs: those that are still here leave.
  void ReleaseAll() {
    for (Live& live : live_) live.steps_left = 0;
    Leave();
  }

  const std::vector<Record>& records() const { return records_; }
  const std::vector<float>& logits() const { return logits_; }
  const std::vector<int32_t>& experts() const { return experts_; }

  static SamplingParams Sampling(uint64_t seed) {
    SamplingParams sampling;
    sampling.temperature = seed % 3 == 0 ? 0.0f : 0.9f;
    sampling.top_k = seed % 5 == 0 ? 7 : 0;
    sampling.mirostat_tau = seed % 4 == 0 ? 2.5f : 0.0f;
    sampling.mirostat_eta = 0.2f;
    sampling.seed = seed;
    return sampling;
  }

 private:
  struct Live {
    SequenceId sequence;
    size_t record = 0;
    int32_t steps_left = 0;
    bool is_new = true;
  };

  static void Check(const Status& status) {
    ASSERT_TRUE(status.ok()) << status.message();
  }

  uint32_t Random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }

  void Join() {
    // Spells without a newcomer: those steps have one token in each row.
    if (!live_.empty() && Random() % 6 != 0) return;
    const int32_t room = kTrafficSequences - static_cast<int32_t>(live_.size());
    if (room == 0) return;
    for (uint32_t n = Random() % std::min(room, 5) + 1; n > 0; --n) {
      StatusOr<SequenceId> sequence = session_->CreateSequence();
      ASSERT_NO_FATAL_FAILURE(Check(sequence.status()));
      Record record;
      record.seed = Random();
      record.prompt.resize(Random() % 9 + 1);
      for (int32_t& token : record.prompt) {
        token = static_cast<int32_t>(Random() % vocab_);
      }
      const auto steps = static_cast<int32_t>(Random() % (max_length_ - 10));
      live_.push_back({*sequence, records_.size(), steps + 1, true});
      records_.push_back(record);
    }
  }

  // Composes the next step.
  void MakeRows(bool pipelined) {
    Join();
    rows_.clear();
    std::vector<size_t> places;
    for (Live& live : live_) {
      const Record& record = records_[live.record];
      StepRow row;
      row.sequence = live.sequence;
      row.sampling = Sampling(record.seed);
      row.num_tokens = 1;
      if (live.is_new) {
        row.tokens = record.prompt.data();
        row.num_tokens = static_cast<int32_t>(record.prompt.size());
      } else if (pipelined) {
        row.continues = true;
      } else {
        row.tokens = &record.tokens.back();
      }
      live.is_new = false;
      rows_.push_back(row);
      places.push_back(live.record);
    }
    enqueued_.push_back(places);
    WantLogits();
  }

  // Each time in memory of their own.
  void WantLogits() {
    const size_t one = Random() % rows_.size();
    const bool is_wanted = Random() % 2 != 0;
    const bool all = which_logits_ == TrafficLogits::kAll;
    const size_t count = all ? rows_.size() : 1;
    if (which_logits_ == TrafficLogits::kNone) {
      step_logits_.emplace_back();
      return;
    }
    step_logits_.emplace_back(count * static_cast<size_t>(vocab_), 0.0f);
    if (!all && !is_wanted) return;
    for (size_t i = 0; i < count; ++i) {
      StepRow& row = rows_[all ? i : one];
      row.logits_mode = LogitsMode::kLast;
      row.logits = step_logits_.back().data() + i * static_cast<size_t>(vocab_);
    }
  }

  void Wait() {
    ASSERT_NO_FATAL_FAILURE(Check(session_->WaitStep(&results_, &stats_)));
    TakeResults();
  }

  // Of the step that was enqueued first.
  void TakeResults() {
    const std::vector<size_t> places = enqueued_.front();
    enqueued_.erase(enqueued_.begin());
    ASSERT_EQ(results_.size(), places.size());
    for (size_t i = 0; i < places.size(); ++i) {
      ASSERT_EQ(results_[i].status, SampleStatus::kOk);
      records_[places[i]].tokens.push_back(results_[i].token);
      records_[places[i]].logprobs.push_back(results_[i].logprob);
      records_[places[i]].mirostat_mus.push_back(results_[i].mirostat_mu);
    }
    logits_.insert(logits_.end(), step_logits_.front().begin(),
                   step_logits_.front().end());
    step_logits_.erase(step_logits_.begin());
    experts_.insert(experts_.end(), stats_.distinct_experts.begin(),
                    stats_.distinct_experts.end());
  }

  void Leave() {
    for (size_t i = live_.size(); i-- > 0;) {
      if (--live_[i].steps_left > 0) continue;
      ASSERT_NO_FATAL_FAILURE(
          Check(session_->ReleaseSequence(live_[i].sequence)));
      live_.erase(live_.begin() + static_cast<ptrdiff_t>(i));
    }
  }

  Session* session_;
  TrafficLogits which_logits_;
  int32_t vocab_;
  int32_t max_length_;
  uint64_t state_ = 7;
  std::vector<Live> live_;
  std::vector<Record> records_;
  std::vector<float> logits_;
  std::vector<int32_t> experts_;

  std::vector<StepRow> rows_;
  std::vector<StepRowResult> results_;
  StepStats stats_;
  // Of the steps whose results are to come: records of the rows, and logits.
  std::vector<std::vector<size_t>> enqueued_;
  std::vector<std::vector<float>> step_logits_;
};

inline bool operator==(const Traffic::Record& a, const Traffic::Record& b) {
  return a.prompt == b.prompt && a.seed == b.seed && a.tokens == b.tokens &&
         a.logprobs == b.logprobs && a.mirostat_mus == b.mirostat_mus;
}

// Expects that both had the same results, bit for bit.
inline void ExpectSameTraffic(const Traffic& a, const Traffic& b) {
  ASSERT_EQ(a.records().size(), b.records().size());
  for (size_t i = 0; i < a.records().size(); ++i) {
    ASSERT_TRUE(a.records()[i] == b.records()[i]) << "sequence " << i;
  }
  EXPECT_TRUE(a.logits() == b.logits());
  EXPECT_EQ(a.experts(), b.experts());
}

}  // namespace tenon::testing

#endif  // TENON_TESTS_ENGINE_TRAFFIC_H_
