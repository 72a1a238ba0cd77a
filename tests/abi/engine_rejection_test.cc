// Bad arguments of the C interface's engine: every one is an error that says
// what is wrong, and nothing happens half.

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/abi/engine_fixture.h"

namespace tenon::testing {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kIsSanitized = true;
#else
constexpr bool kIsSanitized = false;
#endif

class ModelRejectionTest : public DeviceTest {};

TEST_P(ModelRejectionTest, RejectsBadLoads) {
  tenon_model model = 0;
  const auto rejects = [&](int32_t code, std::initializer_list<const char*> why,
                           void (*spoil)(tenon_model_load_args*)) {
    auto args = LoadArgs(GetParam());
    spoil(&args);
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_model_load(&args, &model, e);
    });
    EXPECT_EQ(model, 0u);
  };
  using Args = tenon_model_load_args;
  rejects(TENON_INVALID_ARGUMENT,
          {"tenon_model_load: args.struct_size is 0, expected"},
          [](Args* a) { a->struct_size = 0; });
  rejects(TENON_INVALID_ARGUMENT, {"tenon_model_load: reserved is 5"},
          [](Args* a) { a->reserved = 5; });
  rejects(TENON_INVALID_ARGUMENT, {"tenon_model_load: reserved1 is 5"},
          [](Args* a) { a->reserved1 = 5; });
  rejects(TENON_INVALID_ARGUMENT, {"tenon_model_load: weights is 2"},
          [](Args* a) { a->weights = 2; });
  rejects(TENON_INVALID_ARGUMENT, {"tenon_model_load: weights is -1"},
          [](Args* a) { a->weights = -1; });
  rejects(TENON_INVALID_ARGUMENT, {"directory is null"},
          [](Args* a) { a->directory = nullptr; });
  rejects(TENON_INVALID_ARGUMENT, {"device_type is 9"},
          [](Args* a) { a->device_type = 9; });
  rejects(TENON_UNAVAILABLE, {"device_index is 99"},
          [](Args* a) { a->device_index = 99; });
  rejects(TENON_INVALID_ARGUMENT, {"rank is 2 of world_size 2"}, [](Args* a) {
    a->rank = 2;
    a->world_size = 2;
  });
  rejects(TENON_INVALID_ARGUMENT, {"world_size"},
          [](Args* a) { a->world_size = -1; });
  rejects(TENON_NOT_FOUND, {"/no/such/model"},
          [](Args* a) { a->directory = "/no/such/model"; });
  rejects(TENON_NOT_FOUND, {"config.json"}, [](Args* a) { a->directory = ""; });

  const auto args = LoadArgs(GetParam());
  ExpectError(
      TENON_INVALID_ARGUMENT, {"tenon_model_load: args is null"},
      [&](tenon_error* e) { return tenon_model_load(nullptr, &model, e); });
  ExpectError(
      TENON_INVALID_ARGUMENT, {"tenon_model_load: model is null"},
      [&](tenon_error* e) { return tenon_model_load(&args, nullptr, e); });
}

TEST_P(ModelRejectionTest, RejectsBadRandomModels) {
  const std::string config = TinyConfig();
  tenon_model model = 0;
  const auto rejects = [&](int32_t code, std::initializer_list<const char*> why,
                           void (*spoil)(tenon_model_random_args*)) {
    auto args = RandomArgs(GetParam(), config.c_str());
    spoil(&args);
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_model_create_random(&args, &model, e);
    });
    EXPECT_EQ(model, 0u);
  };
  using Args = tenon_model_random_args;
  rejects(TENON_INVALID_ARGUMENT, {"dtype is 0, expected 1 (float32)"},
          [](Args* a) { a->dtype = 0; });
  rejects(TENON_INVALID_ARGUMENT, {"config_json is null"},
          [](Args* a) { a->config_json = nullptr; });
  rejects(TENON_INVALID_ARGUMENT, {"config_json: not valid JSON"},
          [](Args* a) { a->config_json = "{"; });
  rejects(TENON_UNIMPLEMENTED, {"config_json: architecture X"},
          [](Args* a) { a->config_json = "{\"architectures\":[\"X\"]}"; });
  rejects(TENON_INVALID_ARGUMENT, {"device_type is 0"},
          [](Args* a) { a->device_type = 0; });
  ExpectError(TENON_INVALID_ARGUMENT,
              {"tenon_model_create_random: args is null"}, [&](tenon_error* e) {
                return tenon_model_create_random(nullptr, &model, e);
              });
}

TEST_P(ModelRejectionTest, AModelTooLargeForTheMemory) {
  if (kIsSanitized) GTEST_SKIP() << "the sanitizer ends the process";
  std::string config = TinyConfig();
  const std::string field = "\"vocab_size\": ";
  const size_t at = config.find(field) + field.size();
  config.replace(at, config.find_first_of(",\n", at) - at, "1048576");
  const std::string hidden = "\"hidden_size\": ";
  const size_t hidden_at = config.find(hidden) + hidden.size();
  config.replace(hidden_at, config.find_first_of(",\n", hidden_at) - hidden_at,
                 "1048576");
  const auto args = RandomArgs(GetParam(), config.c_str());
  tenon_model model = 0;
  ExpectError(TENON_RESOURCE_EXHAUSTED, {"weights need ", " bytes on "},
              [&](tenon_error* e) {
                return tenon_model_create_random(&args, &model, e);
              });
}

class SessionRejectionTest : public SessionTest {};

// Everything that takes a sequence refuses this one.
void ExpectNoSequence(tenon_session session, tenon_sequence sequence) {
  const std::initializer_list<const char*> why = {
      "sequence is ", "which names no sequence of this session"};
  tenon_sequence fork = 0;
  int32_t length = -1;
  ExpectError(TENON_NOT_FOUND, why, [&](tenon_error* e) {
    return tenon_sequence_fork(session, sequence, &fork, e);
  });
  ExpectError(TENON_NOT_FOUND, why, [&](tenon_error* e) {
    return tenon_sequence_truncate(session, sequence, 0, e);
  });
  ExpectError(TENON_NOT_FOUND, why, [&](tenon_error* e) {
    return tenon_sequence_length(session, sequence, &length, e);
  });
  ExpectError(TENON_NOT_FOUND, why, [&](tenon_error* e) {
    return tenon_sequence_release(session, sequence, e);
  });
  const std::vector<int32_t> tokens = {1};
  const std::vector<tenon_step_row> rows = {Row(sequence, tokens, nullptr)};
  std::vector<int32_t> out;
  const tenon_step_args args = StepArgs(rows, &out);
  ExpectError(
      TENON_NOT_FOUND, {"rows[0].sequence is ", "which names no sequence"},
      [&](tenon_error* e) { return tenon_session_step(session, &args, e); });
  EXPECT_EQ(fork, 0u);
  EXPECT_EQ(length, -1);
  EXPECT_EQ(out[0], -7);
}

TEST_P(SessionRejectionTest, StaleAndForeignSequencesAreNotFound) {
  const tenon_sequence stale = NewSequence(session_);
  ASSERT_EQ(tenon_sequence_release(session_, stale, nullptr), TENON_OK);
  ExpectNoSequence(session_, stale);
  const tenon_sequence live = NewSequence(session_);  // in the same slot
  EXPECT_NE(live, stale);
  ExpectNoSequence(session_, stale);

  const Owned other = NewSession(model_);
  const tenon_sequence foreign = NewSequence(other);
  ExpectNoSequence(session_, foreign);
  ExpectNoSequence(other, live);
  for (uint64_t made_up :
       {uint64_t{0}, uint64_t{1}, live + 1, live + (uint64_t{1} << 20),
        std::numeric_limits<uint64_t>::max()}) {
    ExpectNoSequence(session_, made_up);
  }
  EXPECT_EQ(LengthOf(session_, live), 0);
}

TEST_P(SessionRejectionTest, RejectsBadOptions) {
  const auto rejects = [&](int32_t code, std::initializer_list<const char*> why,
                           void (*spoil)(tenon_session_options*)) {
    tenon_session_options options = SmallSession();
    spoil(&options);
    tenon_session session = 0;
    ExpectError(code, why, [&](tenon_error* e) {
      return tenon_session_create(model_, &options, &session, e);
    });
    EXPECT_EQ(session, 0u);
  };
  using Options = tenon_session_options;
  constexpr int32_t kInvalid = TENON_INVALID_ARGUMENT;
  rejects(kInvalid, {"tenon_session_create: options.struct_size is 3"},
          [](Options* o) { o->struct_size = 3; });
  rejects(kInvalid, {"options.flags is 16"}, [](Options* o) { o->flags = 16; });
  rejects(kInvalid, {"max_sequences is -1"},
          [](Options* o) { o->max_sequences = -1; });
  rejects(kInvalid, {"max_tokens is -1"},
          [](Options* o) { o->max_tokens = -1; });
  rejects(kInvalid, {"max_context is 100000"},
          [](Options* o) { o->max_context = 100000; });
  rejects(kInvalid, {"page_size is 100000"},
          [](Options* o) { o->page_size = 100000; });
  rejects(kInvalid, {"num_pages is -4"}, [](Options* o) { o->num_pages = -4; });
  rejects(kInvalid, {"max_logit_rows is -2"},
          [](Options* o) { o->max_logit_rows = -2; });
  rejects(kInvalid, {"num_threads is -3"},
          [](Options* o) { o->num_threads = -3; });
  rejects(kInvalid, {"options.kv_cache_dtype is 2"},
          [](Options* o) { o->kv_cache_dtype = 2; });
  rejects(kInvalid, {"options.reserved is 1"},
          [](Options* o) { o->reserved = 1; });
  rejects(kInvalid, {"max_top_logprobs"},
          [](Options* o) { o->max_top_logprobs = 21; });
  rejects(kInvalid, {"max_logit_edits"},
          [](Options* o) { o->max_logit_edits = -1; });
  rejects(kInvalid, {"options.moe_kernels_json: format is missing"},
          [](Options* o) { o->moe_kernels_json = "{}"; });
  tenon_session session = 0;
  ExpectError(TENON_NOT_FOUND, {"model is 123"}, [&](tenon_error* e) {
    return tenon_session_create(123, nullptr, &session, e);
  });
  ExpectError(kInvalid, {"session is null"}, [&](tenon_error* e) {
    return tenon_session_create(model_, nullptr, nullptr, e);
  });
}

TEST_P(SessionRejectionTest, MorePagesThanThereIsMemory) {
  if (kIsSanitized) GTEST_SKIP() << "the sanitizer ends the process";
  tenon_session_options options = SmallSession();
  options.page_size = 65536;
  options.num_pages = 1'000'000'000;
  tenon_session session = 0;
  ExpectError(TENON_RESOURCE_EXHAUSTED, {"1000000000 pages need ", " bytes"},
              [&](tenon_error* e) {
                return tenon_session_create(model_, &options, &session, e);
              });
  EXPECT_EQ(session, 0u);
}

TEST_P(SessionRejectionTest, RejectsBadSequenceArguments) {
  const tenon_sequence sequence = NewSequence(session_);
  Step(session_, {Row(sequence, Prompt(5, 1), nullptr)});
  for (int32_t length : {-1, 6}) {
    ExpectError(TENON_INVALID_ARGUMENT,
                {"num_tokens is ", "expected 0 to 5, the sequence's length"},
                [&](tenon_error* e) {
                  return tenon_sequence_truncate(session_, sequence, length, e);
                });
  }
  ExpectError(TENON_INVALID_ARGUMENT, {"num_tokens is null"},
              [&](tenon_error* e) {
                return tenon_sequence_length(session_, sequence, nullptr, e);
              });
  ExpectError(TENON_INVALID_ARGUMENT, {"fork is null"}, [&](tenon_error* e) {
    return tenon_sequence_fork(session_, sequence, nullptr, e);
  });
  ExpectError(TENON_INVALID_ARGUMENT, {"sequence is null"},
              [&](tenon_error* e) {
                return tenon_sequence_create(session_, nullptr, e);
              });
  for (int i = 0; i < 3; ++i) NewSequence(session_);
  tenon_sequence extra = 0;
  ExpectError(TENON_RESOURCE_EXHAUSTED, {"all 4 sequences (max_sequences)"},
              [&](tenon_error* e) {
                return tenon_sequence_create(session_, &extra, e);
              });
  ExpectError(TENON_RESOURCE_EXHAUSTED, {"all 4 sequences (max_sequences)"},
              [&](tenon_error* e) {
                return tenon_sequence_fork(session_, sequence, &extra, e);
              });
  EXPECT_EQ(extra, 0u);
  EXPECT_EQ(LengthOf(session_, sequence), 5);
}

// Steps that fail change nothing: neither outputs nor sequences.
class StepRejectionTest : public SessionTest {
 protected:
  void SetUp() override {
    SessionTest::SetUp();
    if (IsSkipped()) return;
    sequences_ = {NewSequence(session_), NewSequence(session_)};
    sampling_ = Greedy();
    for (int i = 0; i < 2; ++i) {
      prompts_.push_back(Prompt(5 + i, i));
      rows_.push_back(Row(sequences_[i], prompts_[i], &sampling_));
    }
    args_ = StepArgs(rows_, &tokens_);
    args_.logprobs = logprobs_;
    args_.statuses = statuses_;
    args_.microseconds = &microseconds_;
  }

  void ExpectRejected(int32_t code, std::initializer_list<const char*> why) {
    ExpectStepFails(args_, code, why);
    EXPECT_EQ(tokens_, std::vector<int32_t>({-7, -7}));
    EXPECT_EQ(logprobs_[0], 99.0f);
    EXPECT_EQ(statuses_[0], 99);
    EXPECT_EQ(microseconds_, 99.0);
    const tenon_session_info info = Info();
    EXPECT_EQ(info.num_steps, 0u);
    EXPECT_EQ(info.num_free_pages, 32);
    for (tenon_sequence sequence : sequences_) {
      EXPECT_EQ(LengthOf(session_, sequence), 0);
    }
  }

  std::vector<tenon_sequence> sequences_;
  std::vector<std::vector<int32_t>> prompts_;
  tenon_sampling_params sampling_;
  std::vector<tenon_step_row> rows_;
  std::vector<int32_t> tokens_;
  float logprobs_[2] = {99.0f, 99.0f};
  int32_t statuses_[2] = {99, 99};
  double microseconds_ = 99.0;
  tenon_step_args args_;
};

TEST_P(StepRejectionTest, Arguments) {
  ExpectError(
      TENON_INVALID_ARGUMENT, {"tenon_session_step: args is null"},
      [&](tenon_error* e) { return tenon_session_step(session_, nullptr, e); });
  const tenon_step_args good = args_;
  args_.struct_size = 12;
  ExpectRejected(TENON_INVALID_ARGUMENT, {"args.struct_size is 12"});
  args_ = good;
  args_.num_rows = -1;
  ExpectRejected(TENON_INVALID_ARGUMENT, {"num_rows is -1, expected >= 0"});
  args_.num_rows = 5;
  ExpectRejected(TENON_RESOURCE_EXHAUSTED,
                 {"num_rows is 5, more than max_sequences 4"});
  args_.num_rows = std::numeric_limits<int32_t>::max();
  ExpectRejected(TENON_RESOURCE_EXHAUSTED, {"num_rows is 2147483647"});
  args_ = good;
  args_.rows = nullptr;
  ExpectRejected(TENON_INVALID_ARGUMENT, {"rows is null"});
  args_ = good;
  args_.tokens = nullptr;
  ExpectRejected(TENON_INVALID_ARGUMENT, {"tokens is null"});
  args_ = good;
  const Owned plain = [&] {
    tenon_session_options options = SmallSession();
    options.flags = 0;
    return NewSession(model_, options);
  }();
  int32_t experts[64];
  args_.distinct_experts = experts;
  ExpectError(
      TENON_INVALID_ARGUMENT,
      {"distinct_experts is given", "TENON_SESSION_COUNT_EXPERTS"},
      [&](tenon_error* e) { return tenon_session_step(plain, &args_, e); });
}

TEST_P(StepRejectionTest, Rows) {
  const std::vector<tenon_step_row> good = rows_;
  const auto rejects = [&](int32_t code, std::initializer_list<const char*> why,
                           const auto& spoil) {
    spoil(&rows_[1]);
    ExpectRejected(code, why);
    rows_[1] = good[1];
  };
  using Row = tenon_step_row;
  constexpr int32_t kInvalid = TENON_INVALID_ARGUMENT;
  rejects(kInvalid, {"rows[1].struct_size is 0"},
          [](Row* row) { row->struct_size = 0; });
  rejects(kInvalid, {"rows[1].flags is 2"}, [](Row* row) { row->flags = 2; });
  rejects(kInvalid, {"rows[1] continues and has tokens"},
          [](Row* row) { row->flags = TENON_ROW_CONTINUES; });
  rejects(kInvalid, {"rows[1].logits_mode is 3"},
          [](Row* row) { row->logits_mode = 3; });
  rejects(kInvalid, {"rows[1].logits is null"},
          [](Row* row) { row->logits_mode = TENON_LOGITS_LAST; });
  rejects(kInvalid, {"rows[1] has no tokens"},
          [](Row* row) { row->tokens = nullptr; });
  rejects(kInvalid, {"rows[1] has no tokens"},
          [](Row* row) { row->num_tokens = 0; });
  rejects(kInvalid, {"rows[1] has no tokens"},
          [](Row* row) { row->num_tokens = -5; });
  rejects(TENON_NOT_FOUND, {"rows[1].sequence is 12345"},
          [](Row* row) { row->sequence = 12345; });
  rejects(kInvalid, {"rows[1].sequence is in two rows"},
          [&](Row* row) { row->sequence = good[0].sequence; });
  rejects(TENON_RESOURCE_EXHAUSTED, {"more than max_tokens 48"},
          [](Row* row) { row->num_tokens = 1 << 30; });
  const std::vector<int32_t> odd = {1, 2, kTinyVocab};
  rejects(kInvalid, {"rows[1].tokens[2] is 131, expected 0 to 130"},
          [&](Row* row) {
            row->tokens = odd.data();
            row->num_tokens = 3;
          });
  tenon_sampling_params bad = Greedy();
  const auto rejects_sampling = [&](const char* why, const auto& spoil) {
    bad = Greedy();
    spoil(&bad);
    rejects(kInvalid, {"rows[1].sampling: ", why},
            [&](Row* row) { row->sampling = &bad; });
  };
  using Params = tenon_sampling_params;
  rejects_sampling("temperature is -1",
                   [](Params* p) { p->temperature = -1.0f; });
  rejects_sampling("top_k is -2", [](Params* p) { p->top_k = -2; });
  rejects_sampling("filter_order is 3", [](Params* p) { p->filter_order = 3; });
  rejects_sampling("reserved0 is 1", [](Params* p) { p->reserved0 = 1; });
  rejects_sampling("reserved is 9", [](Params* p) { p->reserved[5] = 9; });

  rejects_sampling("mirostat_tau is -5",
                   [](Params* p) { p->mirostat_tau = -5.0f; });
  const auto rejects_row = [&](const char* why, const auto& spoil) {
    bad = Greedy();
    rejects(kInvalid, {"rows[1]", why}, [&](Row* row) {
      row->sampling = &bad;
      spoil(&bad, row);
    });
  };
  rejects_row("need edits", [](Params* p, Row*) { p->repetition_penalty = 2; });
  rejects_row("need edits", [](Params* p, Row*) { p->frequency_penalty = 1; });
  rejects_row("bitmask is null",
              [](Params* p, Row*) { p->flags = TENON_SAMPLING_USE_BITMASK; });
  rejects_row("top_tokens is null",
              [](Params* p, Row*) { p->num_top_logprobs = 2; });
  int32_t top_tokens[2];
  float top_logprobs[2];
  rejects_row("more than max_top_logprobs 0", [&](Params* p, Row* row) {
    p->num_top_logprobs = 2;
    row->top_tokens = top_tokens;
    row->top_logprobs = top_logprobs;
  });
  alignas(16) tenon_logit_edit edits[2] = {};
  rejects_row("edits is not aligned", [&](Params*, Row* row) {
    row->edits = reinterpret_cast<tenon_logit_edit*>(&edits[0].state);
  });
  rejects_row("num_edits is -1", [&](Params*, Row* row) {
    row->edits = edits;
    row->num_edits = -1;
  });
  rejects_row("reserved1 is 1", [](Params*, Row* row) { row->reserved1 = 1; });
  rejects(TENON_RESOURCE_EXHAUSTED, {"2 edits, more than max_logit_edits 0"},
          [&](Row* row) {
            row->sampling = &bad;
            row->edits = edits;
            row->num_edits = 2;
          });
}

TEST_P(StepRejectionTest, MoreThanTheSessionHas) {
  const std::vector<int32_t> many = Prompt(40, 1);
  std::vector<float> logits(40 * kTinyVocab);
  rows_[1].tokens = many.data();
  rows_[1].num_tokens = 40;
  rows_[1].logits = logits.data();
  rows_[1].logits_mode = TENON_LOGITS_ALL;
  ExpectRejected(TENON_RESOURCE_EXHAUSTED,
                 {"logits of 41 tokens, more than max_logit_rows 32"});
  rows_[1].logits_mode = TENON_LOGITS_NONE;
  // Nor did any of it change what a good step gives.
  const std::vector<int32_t> expected = [&] {
    const Owned fresh = NewSession(model_);
    return Step(fresh, {Row(NewSequence(fresh), prompts_[0], &sampling_),
                        Row(NewSequence(fresh), many, &sampling_)});
  }();
  EXPECT_EQ(Step(session_, rows_), expected);
  // Now the context is too long.
  ExpectStepFails(args_, TENON_RESOURCE_EXHAUSTED,
                  {"rows[1].sequence would have 80 tokens, max_context is 64"});
}

TEST_P(StepRejectionTest, PagesRunOut) {
  tenon_session_options options = SmallSession();
  options.num_pages = 1;
  session_ = NewSession(model_, options);
  const tenon_sequence sequence = NewSequence(session_);
  const std::vector<int32_t> prompt = Prompt(9, 1);
  const std::vector<tenon_step_row> rows = {Row(sequence, prompt, &sampling_)};
  ExpectStepFails(StepArgs(rows, &tokens_), TENON_RESOURCE_EXHAUSTED,
                  {"needs 2 pages, 1 of 1 are free"});
  EXPECT_EQ(LengthOf(session_, sequence), 0);
}

TENON_FOR_EACH_DEVICE(ModelRejectionTest);
TENON_FOR_EACH_DEVICE(SessionRejectionTest);
TENON_FOR_EACH_DEVICE(StepRejectionTest);

}  // namespace
}  // namespace tenon::testing
