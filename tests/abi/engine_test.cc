// Models, sessions and sequences of the C interface: what they do is what the
// C++ classes do.

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/session.h"
#include "tests/abi/engine_fixture.h"
#include "tests/abi/moe_kernels_json.h"

namespace tenon::testing {
namespace {

class ModelTest : public DeviceTest {};

TEST_P(ModelTest, LoadsAndTellsWhatItIs) {
  const Owned model = LoadModel(GetParam());
  auto info = Make<tenon_model_info>();
  ExpectOk([&](tenon_error* e) { return tenon_model_query(model, &info, e); });
  const StatusOr<ModelConfig> config = LoadModelConfig(kTinyModel);
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(info.struct_size, sizeof(info));
  EXPECT_EQ(info.device_type, GetParam());
  EXPECT_EQ(info.device_index, 0);
  EXPECT_EQ(info.rank, 0);
  EXPECT_EQ(info.world_size, 1);
  EXPECT_EQ(info.dtype, TENON_DTYPE_FLOAT32);
  EXPECT_EQ(info.vocab_size, config->vocab_size);
  EXPECT_EQ(info.hidden_size, config->hidden_size);
  EXPECT_EQ(info.num_layers, config->num_layers);
  EXPECT_EQ(info.num_heads, config->num_heads);
  EXPECT_EQ(info.num_kv_heads, config->num_kv_heads);
  EXPECT_EQ(info.head_dim, config->head_dim);
  EXPECT_EQ(info.max_position_embeddings, config->max_position_embeddings);
  EXPECT_EQ(info.num_experts, config->num_experts);
  EXPECT_EQ(info.num_experts_per_tok, config->num_experts_per_tok);
  EXPECT_EQ(info.bos_token_id, config->bos_token_id);
  ASSERT_EQ(info.num_eos_token_ids,
            static_cast<int32_t>(config->eos_token_ids.size()));
  for (int32_t i = 0; i < info.num_eos_token_ids; ++i) {
    EXPECT_EQ(info.eos_token_ids[i], config->eos_token_ids[i]);
  }
  EXPECT_GT(info.weight_bytes, 100'000);
}

TEST_P(ModelTest, ProgressIsToldAndCanStopTheLoad) {
  struct Told {
    int calls = 0;
    int64_t done = 0;
    int64_t total = 0;
    int32_t answer = 0;
  } told;
  auto args = LoadArgs(GetParam());
  args.progress_user_data = &told;
  args.progress = [](void* data, int64_t done, int64_t total) {
    auto* t = static_cast<Told*>(data);
    ++t->calls;
    t->done = done;
    t->total = total;
    return t->answer;
  };
  tenon_model model = 0;
  ExpectOk([&](tenon_error* e) { return tenon_model_load(&args, &model, e); });
  EXPECT_GE(told.calls, 1);
  EXPECT_GT(told.total, 0);
  EXPECT_EQ(told.done, told.total);
  EXPECT_EQ(tenon_model_destroy(model, nullptr), TENON_OK);

  told.answer = 3;
  model = 0;
  ExpectError(
      TENON_CANCELLED, {"tenon_model_load: ", "stopped by progress"},
      [&](tenon_error* e) { return tenon_model_load(&args, &model, e); });
  EXPECT_EQ(model, 0u);
}

int64_t WeightBytes(const tenon_model_load_args& args) {
  tenon_model model = 0;
  ExpectOk([&](tenon_error* e) { return tenon_model_load(&args, &model, e); });
  auto info = Make<tenon_model_info>();
  ExpectOk([&](tenon_error* e) { return tenon_model_query(model, &info, e); });
  EXPECT_EQ(info.dtype, TENON_DTYPE_FLOAT32);
  EXPECT_EQ(tenon_model_destroy(model, nullptr), TENON_OK);
  return info.weight_bytes;
}

TEST_P(ModelTest, WeightsBecomeFp8WhereAsked) {
  auto args = LoadArgs(GetParam());
  const int64_t stored = WeightBytes(args);
  args.weights = TENON_WEIGHTS_FP8;
  EXPECT_LT(WeightBytes(args), stored / 2);
  // A caller of an earlier version knows nothing of it.
  args.struct_size = offsetof(tenon_model_load_args, weights);
  EXPECT_EQ(WeightBytes(args), stored);
}

TEST_P(ModelTest, RandomWeightsComeFromTheSeed) {
  const std::string config = TinyConfig();
  auto args = RandomArgs(GetParam(), config.c_str());
  std::vector<std::vector<int32_t>> tokens;
  for (uint64_t seed : {7, 7, 8}) {
    args.seed = seed;
    tenon_model handle = 0;
    ExpectOk([&](tenon_error* e) {
      return tenon_model_create_random(&args, &handle, e);
    });
    const Owned model(handle, tenon_model_destroy);
    auto info = Make<tenon_model_info>();
    ASSERT_EQ(tenon_model_query(model, &info, nullptr), TENON_OK);
    EXPECT_EQ(info.dtype, TENON_DTYPE_BFLOAT16);
    const Owned session = NewSession(model);
    tokens.push_back(
        Generate(session, NewSequence(session), Prompt(9, 1), 8, Seeded(3)));
  }
  EXPECT_EQ(tokens[0], tokens[1]);
  EXPECT_NE(tokens[0], tokens[2]);
}

TEST_P(ModelTest, OneRankOfAGroup) {
  const Owned whole = LoadModel(GetParam());
  auto args = LoadArgs(GetParam());
  args.rank = 1;
  args.world_size = 2;
  tenon_model handle = 0;
  ExpectOk([&](tenon_error* e) { return tenon_model_load(&args, &handle, e); });
  const Owned part(handle, tenon_model_destroy);
  auto whole_info = Make<tenon_model_info>();
  auto info = Make<tenon_model_info>();
  ASSERT_EQ(tenon_model_query(whole, &whole_info, nullptr), TENON_OK);
  ASSERT_EQ(tenon_model_query(part, &info, nullptr), TENON_OK);
  EXPECT_EQ(info.rank, 1);
  EXPECT_EQ(info.world_size, 2);
  EXPECT_LT(info.weight_bytes, whole_info.weight_bytes);
}

TENON_FOR_EACH_DEVICE(ModelTest);

TEST_P(SessionTest, TellsItsOptionsAndWhatItDid) {
  tenon_session_info info = Info();
  EXPECT_EQ(info.struct_size, sizeof(info));
  EXPECT_EQ(info.flags,
            TENON_SESSION_BATCH_INVARIANT | TENON_SESSION_COUNT_EXPERTS);
  EXPECT_EQ(info.max_sequences, 4);
  EXPECT_EQ(info.max_tokens, 48);
  EXPECT_EQ(info.max_context, 64);
  EXPECT_EQ(info.page_size, 8);
  EXPECT_EQ(info.num_pages, 4 * 8);
  EXPECT_EQ(info.max_logit_rows, 32);
  EXPECT_EQ(info.num_sequences, 0);
  EXPECT_EQ(info.num_free_pages, 32);
  EXPECT_EQ(info.num_steps, 0u);
  EXPECT_EQ(info.num_tokens, 0u);

  const tenon_sequence sequence = NewSequence(session_);
  Generate(session_, sequence, Prompt(13, 1), 4, Greedy());
  info = Info();
  EXPECT_EQ(info.num_sequences, 1);
  EXPECT_EQ(info.num_free_pages, 32 - 2);
  EXPECT_EQ(info.num_steps, 4u);
  EXPECT_EQ(info.num_tokens, 13u + 3u);
}

TEST_P(SessionTest, TheCacheCanBeGivenInBytes) {
  const int64_t bytes = Info().kv_cache_bytes;
  ASSERT_GT(bytes, 0);
  auto options = Make<tenon_session_options>();
  options.max_context = 64;
  options.page_size = 8;
  options.kv_cache_bytes = bytes / 2;
  tenon_session handle = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_session_create(model_, &options, &handle, e);
  });
  const Owned session(handle, tenon_session_destroy);
  auto info = Make<tenon_session_info>();
  ASSERT_EQ(tenon_session_query(session, &info, nullptr), TENON_OK);
  EXPECT_EQ(info.num_pages, 16);
  EXPECT_EQ(info.kv_cache_bytes, bytes / 2);
}

TEST_P(SessionTest, MeasuredKernelSizesChangeNoToken) {
  tenon_session_options options = SmallSession();
  options.moe_kernels_json = kMoeKernelsJson;
  const Owned tuned = NewSession(model_, options);
  std::vector<int32_t> tokens[2];
  for (tenon_session session :
       {tenon_session{tuned}, tenon_session{session_}}) {
    tokens[session == tuned] =
        Generate(session, NewSequence(session), Prompt(13, 1), 8, Greedy());
  }
  EXPECT_EQ(tokens[0], tokens[1]);
}

TEST_P(SessionTest, RowsHaveEditsMasksAndTopTokens) {
  tenon_session_options options = SmallSession();
  options.flags |= TENON_SESSION_LOGIT_BITMASKS;
  options.max_logit_edits = 4;
  options.max_top_logprobs = 3;
  const Owned session = NewSession(model_, options);
  tenon_sampling_params sampling = Greedy();
  sampling.num_top_logprobs = 3;
  int32_t top[3] = {-7, -7, -7};
  float logprobs[3] = {};
  const std::vector<int32_t> prompt = Prompt(5, 1);
  const auto draw = [&](auto change) {
    const tenon_sequence sequence = NewSequence(session);
    tenon_step_row row = Row(sequence, prompt, &sampling);
    row.top_tokens = top;
    row.top_logprobs = logprobs;
    change(&row);
    auto args = Make<tenon_step_args>();
    int32_t token = -7;
    args.num_rows = 1;
    args.rows = &row;
    args.tokens = &token;
    ExpectOk(
        [&](tenon_error* e) { return tenon_session_step(session, &args, e); });
    EXPECT_EQ(tenon_sequence_release(session, sequence, nullptr), TENON_OK);
    return token;
  };
  const int32_t best = draw([](tenon_step_row*) {});
  EXPECT_EQ(top[0], best);
  EXPECT_GE(logprobs[0], logprobs[1]);
  EXPECT_GE(logprobs[1], logprobs[2]);
  const int32_t second = top[1];
  alignas(16) const tenon_logit_edit ban = {best, TENON_EDIT_BAN, 0, 0};
  EXPECT_EQ(draw([&](tenon_step_row* row) {
              row->edits = &ban;
              row->num_edits = 1;
            }),
            second);
  EXPECT_EQ(top[0], second);
  std::vector<uint32_t> bitmask((kTinyVocab + 31) / 32, 0);
  bitmask[2] = 1u << 5;
  EXPECT_EQ(draw([&](tenon_step_row* row) { row->bitmask = bitmask.data(); }),
            69);
  EXPECT_EQ(top[0], 69);
  EXPECT_EQ(top[1], -1);
}

TEST_P(SessionTest, DefaultsFitTheModel) {
  tenon_session session = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_session_create(model_, nullptr, &session, e);
  });
  session_ = Owned(session, tenon_session_destroy);
  auto model = Make<tenon_model_info>();
  ASSERT_EQ(tenon_model_query(model_, &model, nullptr), TENON_OK);
  const tenon_session_info info = Info();
  EXPECT_EQ(info.flags, 0u);
  EXPECT_EQ(info.max_sequences, 32);
  EXPECT_EQ(info.max_tokens, 512);
  EXPECT_EQ(info.max_context, std::min(2048, model.max_position_embeddings));
  EXPECT_EQ(info.page_size, 16);
  EXPECT_EQ(info.max_logit_rows, 32);
}

// The same steps through the C++ class.
TEST_P(SessionTest, StepsAreThoseOfTheCppSession) {
  const Device device = {
      GetParam() == TENON_DEVICE_CPU ? DeviceType::kCpu : DeviceType::kCuda, 0};
  StatusOr<std::shared_ptr<const tenon::Model>> model =
      tenon::Model::Load(kTinyModel, device);
  ASSERT_TRUE(model.ok()) << model.status().message();
  SessionOptions options;
  options.max_sequences = 4;
  options.max_tokens = 48;
  options.max_context = 64;
  options.page_size = 8;
  options.max_logit_rows = 32;
  options.batch_invariant = true;
  options.count_experts = true;
  StatusOr<std::unique_ptr<tenon::Session>> cpp =
      tenon::Session::Create(*model, options);
  ASSERT_TRUE(cpp.ok()) << cpp.status().message();
  const int32_t num_layers = (*model)->config.num_layers;

  const tenon_sampling_params sampling[] = {Greedy(), Seeded(11)};
  std::vector<int32_t> inputs[] = {Prompt(13, 1), Prompt(5, 2)};
  const tenon_sequence sequences[] = {NewSequence(session_),
                                      NewSequence(session_)};
  const SequenceId ids[] = {*(*cpp)->CreateSequence(),
                            *(*cpp)->CreateSequence()};
  for (int step = 0; step < 6; ++step) {
    std::vector<tenon_step_row> rows;
    std::vector<StepRow> cpp_rows;
    std::vector<float> logits[2];
    std::vector<float> cpp_logits[2];
    for (int i = 0; i < 2; ++i) {
      // All logits of one row, the last ones of the other.
      const size_t count = (i == 0 ? inputs[i].size() : 1) * size_t{kTinyVocab};
      logits[i].resize(count, -1.0f);
      cpp_logits[i].resize(count, -2.0f);
      rows.push_back(Row(sequences[i], inputs[i], &sampling[i]));
      rows[i].logits = logits[i].data();
      rows[i].logits_mode = i == 0 ? TENON_LOGITS_ALL : TENON_LOGITS_LAST;
      StepRow row;
      row.sequence = ids[i];
      row.tokens = inputs[i].data();
      row.num_tokens = static_cast<int32_t>(inputs[i].size());
      std::memcpy(static_cast<void*>(&row.sampling), &sampling[i],
                  sizeof(row.sampling));
      row.logits = cpp_logits[i].data();
      row.logits_mode = i == 0 ? LogitsMode::kAll : LogitsMode::kLast;
      cpp_rows.push_back(row);
    }
    std::vector<int32_t> tokens;
    float logprobs[2] = {};
    int32_t statuses[2] = {-1, -1};
    std::vector<int32_t> experts(static_cast<size_t>(num_layers), -1);
    double microseconds = 0.0;
    tenon_step_args args = StepArgs(rows, &tokens);
    args.logprobs = logprobs;
    args.statuses = statuses;
    args.distinct_experts = experts.data();
    args.microseconds = &microseconds;
    ExpectOk(
        [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
    std::vector<StepRowResult> results;
    StepStats stats;
    const Status status = (*cpp)->Step(cpp_rows, &results, &stats);
    ASSERT_TRUE(status.ok()) << status.message();

    EXPECT_GT(microseconds, 0.0);
    size_t sparse = 0;
    for (int32_t layer = 0; layer < num_layers; ++layer) {
      const bool is_sparse = (*model)->config.IsMoeLayer(layer);
      EXPECT_EQ(experts[layer],
                is_sparse ? stats.distinct_experts[sparse++] : 0);
    }
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(tokens[i], results[i].token);
      EXPECT_EQ(std::memcmp(&logprobs[i], &results[i].logprob, 4), 0);
      EXPECT_EQ(statuses[i], TENON_SAMPLE_OK);
      EXPECT_EQ(std::memcmp(logits[i].data(), cpp_logits[i].data(),
                            logits[i].size() * sizeof(float)),
                0);
      inputs[i] = {tokens[i]};
    }
  }
}

TEST_P(SessionTest, AChunkDrawsNoToken) {
  const std::vector<int32_t> prompt = Prompt(13, 1);
  const tenon_sequence whole = NewSequence(session_);
  const std::vector<int32_t> expected =
      Generate(session_, whole, prompt, 5, Greedy());
  const tenon_sequence chunked = NewSequence(session_);
  const std::vector<int32_t> begin(prompt.begin(), prompt.begin() + 6);
  const std::vector<int32_t> end(prompt.begin() + 6, prompt.end());
  std::vector<int32_t> tokens;
  const std::vector<tenon_step_row> rows = {Row(chunked, begin, nullptr)};
  tenon_step_args args = StepArgs(rows, &tokens);
  float logprob = 5.0f;
  int32_t status = 5;
  args.logprobs = &logprob;
  args.statuses = &status;
  ExpectOk(
      [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
  EXPECT_EQ(tokens[0], -1);
  EXPECT_EQ(logprob, 0.0f);
  EXPECT_EQ(status, TENON_SAMPLE_OK);
  EXPECT_EQ(Generate(session_, chunked, end, 5, Greedy()), expected);
}

TEST_P(SessionTest, TokensMayPointIntoTheLastResults) {
  const tenon_sampling_params greedy = Greedy();
  const std::vector<int32_t> expected =
      Generate(session_, NewSequence(session_), Prompt(7, 3), 6, greedy);
  const tenon_sequence sequence = NewSequence(session_);
  std::vector<int32_t> tokens =
      Step(session_, {Row(sequence, Prompt(7, 3), &greedy)});
  std::vector<int32_t> actual = tokens;
  for (int i = 1; i < 6; ++i) {
    auto row = Row(sequence, tokens, &greedy);  // reads tokens[0] ...
    auto args = Make<tenon_step_args>();
    args.num_rows = 1;
    args.rows = &row;
    args.tokens = tokens.data();  // ... and writes it
    ExpectOk(
        [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
    actual.push_back(tokens[0]);
  }
  EXPECT_EQ(actual, expected);
}

TEST_P(SessionTest, RowsOfNewerClientsAreLonger) {
  struct NewerRow {
    tenon_step_row row;
    uint64_t appended;
  };
  const std::vector<int32_t> prompts[] = {Prompt(7, 1), Prompt(4, 2)};
  const tenon_sampling_params greedy = Greedy();
  const std::vector<int32_t> expected =
      Step(session_, {Row(NewSequence(session_), prompts[0], &greedy),
                      Row(NewSequence(session_), prompts[1], &greedy)});
  NewerRow rows[2] = {};
  for (int i = 0; i < 2; ++i) {
    rows[i].row = Row(NewSequence(session_), prompts[i], &greedy);
    rows[i].row.struct_size = sizeof(NewerRow);
  }
  std::vector<int32_t> tokens(2);
  auto args = Make<tenon_step_args>();
  args.num_rows = 2;
  args.rows = &rows[0].row;
  args.tokens = tokens.data();
  rows[1].appended = 1;
  ExpectStepFails(args, TENON_UNIMPLEMENTED,
                  {"rows[1]: a field at byte ", "newer than this library"});
  rows[1].appended = 0;
  rows[1].row.struct_size = sizeof(tenon_step_row);
  ExpectStepFails(args, TENON_INVALID_ARGUMENT,
                  {"rows[1].struct_size is 88, expected 96 as in rows[0]"});
  rows[1].row.struct_size = sizeof(NewerRow);
  ExpectOk(
      [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
  EXPECT_EQ(tokens, expected);
}

TEST_P(SessionTest, AStepWithoutRows) {
  auto args = Make<tenon_step_args>();
  ExpectOk(
      [&](tenon_error* e) { return tenon_session_step(session_, &args, e); });
  EXPECT_EQ(Info().num_steps, 1u);
}

TEST_P(SessionTest, ForksPartAndTruncationForgets) {
  const std::vector<int32_t> prompt = Prompt(13, 1);
  const tenon_sequence first = NewSequence(session_);
  const tenon_sampling_params greedy = Greedy();
  const int32_t token = Step(session_, {Row(first, prompt, &greedy)})[0];
  const int64_t free_pages = Info().num_free_pages;
  tenon_sequence second = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_sequence_fork(session_, first, &second, e);
  });
  EXPECT_NE(second, first);
  EXPECT_EQ(Info().num_free_pages, free_pages) << "pages are shared";
  EXPECT_EQ(LengthOf(session_, second), 13);
  const std::vector<int32_t> on_first =
      Generate(session_, first, {token}, 6, greedy);
  const std::vector<int32_t> on_second =
      Generate(session_, second, {token}, 6, greedy);
  EXPECT_EQ(on_first, on_second);
  EXPECT_EQ(LengthOf(session_, first), 19);

  ExpectOk([&](tenon_error* e) {
    return tenon_sequence_truncate(session_, first, 13, e);
  });
  EXPECT_EQ(LengthOf(session_, first), 13);
  EXPECT_EQ(Generate(session_, first, {token}, 6, greedy), on_first);
  for (tenon_sequence sequence : {first, second}) {
    ExpectOk([&](tenon_error* e) {
      return tenon_sequence_release(session_, sequence, e);
    });
  }
  EXPECT_EQ(Info().num_free_pages, 32);
  EXPECT_EQ(Info().num_sequences, 0);
}

TEST_P(SessionTest, SequencesOutliveTheModelsHandle) {
  const tenon_sequence sequence = NewSequence(session_);
  model_ = Owned();
  EXPECT_EQ(Generate(session_, sequence, Prompt(5, 1), 3, Greedy()).size(), 3u);
}

TENON_FOR_EACH_DEVICE(SessionTest);

}  // namespace
}  // namespace tenon::testing
