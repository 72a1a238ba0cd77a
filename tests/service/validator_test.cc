// Requests that are refused for what they are.

#include "service/validator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace tenon::service {
namespace {

class ValidatorTest : public ::testing::Test {
 protected:
  ValidatorTest() : validator_(Config(), 64, SmallLimits()) {}

  static ModelConfig Config() {
    ModelConfig config;
    config.vocab_size = 100;
    return config;
  }
  static Limits SmallLimits() {
    Limits limits;
    limits.rows_per_step = 4;
    limits.prompt_tokens = 80;
    limits.stop_tokens = 2;
    limits.logit_rules = 6;
    return limits;
  }
  static v1::CreateSequencesRequest Create() {
    v1::CreateSequencesRequest request;
    request.add_sequences()->add_prompt(7);
    return request;
  }
  static v1::StepRequest Step() {
    v1::StepRequest request;
    request.set_step_id(1);
    request.add_seq(1);
    request.add_seq(2);
    return request;
  }
  template <class Request>
  void Expect(const Request& request, StatusCode code, const char* subject) {
    const Failure failure = validator_.Check(request);
    EXPECT_EQ(failure.code, code) << failure.message;
    EXPECT_EQ(failure.subject, subject);
  }

  Validator validator_;
};

TEST_F(ValidatorTest, AcceptsWhatIsRight) {
  EXPECT_TRUE(validator_.Check(Create()).ok());
  EXPECT_TRUE(validator_.Check(Step()).ok());
}

TEST_F(ValidatorTest, Prompts) {
  v1::CreateSequencesRequest request;
  Expect(request, StatusCode::kInvalidArgument, "sequences");
  request.add_sequences();
  Expect(request, StatusCode::kInvalidArgument, "sequences[0].prompt");
  request = Create();
  request.mutable_sequences(0)->add_prompt(100);
  Expect(request, StatusCode::kInvalidArgument, "sequences[0].prompt[1]");
  request.mutable_sequences(0)->set_prompt(1, 0xffffffff);
  Expect(request, StatusCode::kInvalidArgument, "sequences[0].prompt[1]");
  for (int i = 0; i < 79; ++i) request.mutable_sequences(0)->add_prompt(1);
  Expect(request, StatusCode::kResourceExhausted, "prompt_tokens");
  request = Create();
  for (int i = 0; i < 64; ++i) request.mutable_sequences(0)->add_prompt(1);
  Expect(request, StatusCode::kOutOfRange, "sequences[0]");
}

TEST_F(ValidatorTest, MaxTokensAndStops) {
  v1::CreateSequencesRequest request = Create();
  v1::NewSequence* sequence = request.mutable_sequences(0);
  sequence->set_max_tokens(0);
  Expect(request, StatusCode::kInvalidArgument, "sequences[0].max_tokens");
  sequence->set_max_tokens(64);
  EXPECT_TRUE(validator_.Check(request).ok());
  sequence->set_max_tokens(65);
  Expect(request, StatusCode::kOutOfRange, "sequences[0]");
  sequence->set_max_tokens(0xffffffff);
  Expect(request, StatusCode::kOutOfRange, "sequences[0]");
  sequence->clear_max_tokens();
  sequence->add_stop_token(100);
  Expect(request, StatusCode::kInvalidArgument, "sequences[0].stop_token[0]");
  for (int i = 0; i < 2; ++i) sequence->add_stop_token(1);
  Expect(request, StatusCode::kResourceExhausted, "stop_tokens");
}

TEST_F(ValidatorTest, SamplingParameters) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float bad : {-1.0f, nan, std::numeric_limits<float>::infinity()}) {
    v1::CreateSequencesRequest request = Create();
    request.mutable_sequences(0)->mutable_sampling()->set_temperature(bad);
    Expect(request, StatusCode::kInvalidArgument, "sequences[0].sampling");
  }
  for (float bad : {-0.1f, 1.5f, nan}) {
    v1::StepRequest request = Step();
    request.mutable_overrides()->set_top_p(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_min_p(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
  }
  v1::StepRequest request = Step();
  request.mutable_overrides()->set_top_k(-2);
  Expect(request, StatusCode::kInvalidArgument, "overrides");
  request = Step();
  request.mutable_overrides()->set_filter_order(
      static_cast<v1::FilterOrder>(9));
  Expect(request, StatusCode::kInvalidArgument, "overrides.filter_order");
  for (float bad : {-0.1f, nan}) {
    request = Step();
    request.mutable_overrides()->set_typical_p(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_top_n_sigma(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_xtc_probability(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_xtc_threshold(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_mirostat_tau(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
    request = Step();
    request.mutable_overrides()->set_mirostat_eta(bad);
    Expect(request, StatusCode::kInvalidArgument, "overrides");
  }
}

// Of a newer client: nobody would notice that it has no effect.
TEST_F(ValidatorTest, UnknownSamplingParametersAreRefused) {
  v1::StepRequest request = Step();
  const std::string unknown("\xf8\x3f\x05", 3);  // field 1023
  ASSERT_TRUE(request.mutable_overrides()->ParseFromString(unknown));
  Expect(request, StatusCode::kInvalidArgument, "overrides");
}

// Zero is not the default of these, and unset is not zero.
TEST_F(ValidatorTest, UnsetIsNotZero) {
  v1::Sampling sampling;
  SamplingParams base;
  base.temperature = 0.7f;
  base.top_p = 0.9f;
  base.seed = 5;
  SamplingParams merged = MergeSampling(base, sampling);
  EXPECT_EQ(merged.temperature, 0.7f);
  EXPECT_EQ(merged.top_p, 0.9f);
  EXPECT_EQ(merged.seed, 5u);
  sampling.set_temperature(0.0f);
  sampling.set_top_p(0.0f);
  sampling.set_seed(0);
  merged = MergeSampling(base, sampling);
  EXPECT_EQ(merged.temperature, 0.0f);
  EXPECT_EQ(merged.top_p, 0.0f);
  EXPECT_EQ(merged.seed, 0u);
}

TEST_F(ValidatorTest, EveryParameterArrives) {
  v1::Sampling sampling;
  sampling.set_min_p(0.1f);
  sampling.set_typical_p(0.2f);
  sampling.set_top_n_sigma(0.3f);
  sampling.set_xtc_probability(0.4f);
  sampling.set_xtc_threshold(0.5f);
  sampling.set_filter_order(v1::FILTER_ORDER_LLAMA_CPP);
  sampling.set_mirostat_tau(0.6f);
  sampling.set_mirostat_eta(0.7f);
  const SamplingParams merged = MergeSampling(SamplingParams(), sampling);
  EXPECT_EQ(merged.min_p, 0.1f);
  EXPECT_EQ(merged.typical_p, 0.2f);
  EXPECT_EQ(merged.top_n_sigma, 0.3f);
  EXPECT_EQ(merged.xtc_probability, 0.4f);
  EXPECT_EQ(merged.xtc_threshold, 0.5f);
  EXPECT_EQ(merged.filter_order, FilterOrder::kLlamaCpp);
  EXPECT_EQ(merged.mirostat_tau, 0.6f);
  EXPECT_EQ(merged.mirostat_eta, 0.7f);
}

TEST_F(ValidatorTest, Steps) {
  v1::StepRequest request = Step();
  request.set_step_id(0);
  Expect(request, StatusCode::kInvalidArgument, "step_id");
  request = Step();
  request.add_input_token(1);
  Expect(request, StatusCode::kInvalidArgument, "input_token");
  request.add_input_token(100);
  Expect(request, StatusCode::kInvalidArgument, "input_token[1]");
  request = Step();
  for (int i = 0; i < 3; ++i) request.add_seq(3);
  Expect(request, StatusCode::kResourceExhausted, "rows_per_step");
  request.clear_seq();
  Expect(request, StatusCode::kInvalidArgument, "seq");
}

TEST_F(ValidatorTest, WhatTheServerCannotIsUnimplemented) {
  v1::StepRequest request = Step();
  request.set_want(v1::WANT_LOGPROB);
  EXPECT_TRUE(validator_.Check(request).ok());
  request.set_want(v1::WANT_LOGPROB | 4);
  Expect(request, StatusCode::kUnimplemented, "want");
  request.set_want(0x80000000);
  Expect(request, StatusCode::kUnimplemented, "want");
}

TEST_F(ValidatorTest, TopTokens) {
  v1::StepRequest request = Step();
  request.set_top_n(1);
  Expect(request, StatusCode::kInvalidArgument, "top_n");
  request.set_want(v1::WANT_TOP_N);
  EXPECT_TRUE(validator_.Check(request).ok());
  request.set_top_n(20);
  EXPECT_TRUE(validator_.Check(request).ok());
  for (uint32_t top_n : {0u, 21u, 0xffffffffu}) {
    request.set_top_n(top_n);
    Expect(request, StatusCode::kInvalidArgument, "top_n");
  }
  v1::CreateSequencesRequest create = Create();
  create.set_want(v1::WANT_TOP_N);
  Expect(create, StatusCode::kInvalidArgument, "top_n");
  v1::GenerateRequest generate;
  generate.set_want(v1::WANT_TOP_N);
  Expect(generate, StatusCode::kInvalidArgument, "top_n");
}

TEST_F(ValidatorTest, PenaltiesAndDry) {
  v1::StepRequest request = Step();
  v1::Sampling* sampling = request.mutable_overrides();
  sampling->set_frequency_penalty(-1.0f);
  sampling->set_presence_penalty(2.0f);
  sampling->set_repetition_penalty(1.5f);
  sampling->set_dry_multiplier(0.8f);
  EXPECT_TRUE(validator_.Check(request).ok());
  const auto bad = [&](void (*set)(v1::Sampling*)) {
    v1::StepRequest other = request;
    set(other.mutable_overrides());
    Expect(other, StatusCode::kInvalidArgument, "overrides");
  };
  bad([](v1::Sampling* s) { s->set_repetition_penalty(-1.0f); });
  bad([](v1::Sampling* s) { s->set_frequency_penalty(NAN); });
  bad([](v1::Sampling* s) { s->set_presence_penalty(INFINITY); });
  bad([](v1::Sampling* s) { s->set_dry_multiplier(-1.0f); });
  bad([](v1::Sampling* s) { s->set_dry_base(0.5f); });
  bad([](v1::Sampling* s) { s->set_dry_allowed_length(-1); });
  bad([](v1::Sampling* s) { s->set_dry_range(-1); });
}

TEST_F(ValidatorTest, LogitRules) {
  v1::CreateSequencesRequest good = Create();
  v1::LogitRules* rules =
      good.mutable_sequences(0)->mutable_sampling()->mutable_rules();
  rules->add_bias()->set_token(99);
  rules->add_bad_word()->add_token(3);
  rules->add_allowed_token(4);
  rules->add_dry_breaker(5);
  rules->set_min_tokens(64);
  EXPECT_TRUE(validator_.Check(good).ok());
  v1::StepRequest step = Step();
  *step.mutable_overrides()->mutable_rules() = *rules;
  Expect(step, StatusCode::kInvalidArgument, "overrides.rules");

  const std::string field = "sequences[0].sampling.rules";
  const auto bad = [&](const char* name, void (*change)(v1::LogitRules*)) {
    v1::CreateSequencesRequest request = good;
    change(request.mutable_sequences(0)->mutable_sampling()->mutable_rules());
    Expect(request, StatusCode::kInvalidArgument, (field + name).c_str());
  };
  using Rules = v1::LogitRules;
  bad(".bias[0]", [](Rules* r) { r->mutable_bias(0)->set_token(100); });
  bad(".bias[0]", [](Rules* r) { r->mutable_bias(0)->set_bias(NAN); });
  bad(".bias", [](Rules* r) { r->add_bias()->set_token(99); });
  bad(".bad_word[0].token[1]",
      [](Rules* r) { r->mutable_bad_word(0)->add_token(100); });
  bad(".bad_word[1]", [](Rules* r) { r->add_bad_word(); });
  bad(".allowed_token[1]", [](Rules* r) { r->add_allowed_token(0xffffffff); });
  bad(".dry_breaker[1]", [](Rules* r) { r->add_dry_breaker(100); });
  bad(".min_tokens", [](Rules* r) { r->set_min_tokens(65); });
  bad("", [](Rules* r) {
    r->GetReflection()->MutableUnknownFields(r)->AddVarint(77, 1);
  });
  for (int i = 0; i < 3; ++i) rules->add_allowed_token(4);
  Expect(good, StatusCode::kResourceExhausted, "logit_rules");
}

TEST_F(ValidatorTest, LeasesForksAndReleases) {
  v1::CreateSequencesRequest create = Create();
  create.set_lease_ms(0);
  Expect(create, StatusCode::kInvalidArgument, "lease_ms");
  create.set_lease_ms(600001);
  Expect(create, StatusCode::kInvalidArgument, "lease_ms");
  v1::ForkSequencesRequest fork;
  Expect(fork, StatusCode::kInvalidArgument, "seq");
  fork.add_seq(1);
  fork.add_seed(1);
  fork.add_seed(2);
  Expect(fork, StatusCode::kInvalidArgument, "seed");
  v1::ReleaseSequencesRequest release;
  EXPECT_TRUE(validator_.Check(release).ok());
  v1::AbortRequest abort;
  Expect(abort, StatusCode::kInvalidArgument, "session_id");
}

}  // namespace
}  // namespace tenon::service
