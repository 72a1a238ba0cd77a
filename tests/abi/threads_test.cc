// Threads that share models, sessions and contexts. Run under
// ThreadSanitizer as well.

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "tests/abi/engine_fixture.h"

namespace tenon::testing {
namespace {

constexpr int kThreads = 3;

// Runs body(i) on several threads at once.
template <class Body>
void OnThreads(Body&& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

class ThreadsTest : public DeviceTest {
 protected:
  // What a session of its own gives for prompt `i`.
  static std::vector<int32_t> Expected(tenon_model model, int i) {
    const Owned session = NewSession(model);
    return Generate(session, NewSequence(session), Prompt(9 + i, i), 12,
                    Seeded(static_cast<uint64_t>(i)));
  }
};

TEST_P(ThreadsTest, ModelsAreLoadedAtTheSameTime) {
  std::vector<int32_t> tokens[kThreads];
  OnThreads([&](int i) { tokens[i] = Expected(LoadModel(GetParam()), 1); });
  for (const std::vector<int32_t>& other : tokens) {
    EXPECT_EQ(other, tokens[0]);
  }
}

TEST_P(ThreadsTest, SessionsShareAModel) {
  const Owned model = LoadModel(GetParam());
  std::vector<int32_t> expected[kThreads];
  std::vector<int32_t> tokens[kThreads];
  for (int i = 0; i < kThreads; ++i) expected[i] = Expected(model, i);
  OnThreads([&](int i) { tokens[i] = Expected(model, i); });
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(tokens[i], expected[i]);
}

TEST_P(ThreadsTest, CallsOnOneSessionTakeTurns) {
  const Owned model = LoadModel(GetParam());
  const Owned session = NewSession(model);
  std::vector<int32_t> expected[kThreads];
  std::vector<int32_t> tokens[kThreads];
  for (int i = 0; i < kThreads; ++i) expected[i] = Expected(model, i);
  OnThreads([&](int i) {
    // Sequences come and go beside the steps of the others.
    for (int round = 0; round < 3; ++round) {
      const tenon_sequence sequence = NewSequence(session);
      tokens[i] = Generate(session, sequence, Prompt(9 + i, i), 12,
                           Seeded(static_cast<uint64_t>(i)));
      auto info = Make<tenon_session_info>();
      EXPECT_EQ(tenon_session_query(session, &info, nullptr), TENON_OK);
      EXPECT_EQ(tenon_sequence_release(session, sequence, nullptr), TENON_OK);
    }
  });
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(tokens[i], expected[i]);
  auto info = Make<tenon_session_info>();
  ASSERT_EQ(tenon_session_query(session, &info, nullptr), TENON_OK);
  EXPECT_EQ(info.num_sequences, 0);
  EXPECT_EQ(info.num_free_pages, info.num_pages);
  EXPECT_EQ(info.num_steps, uint64_t{kThreads * 3 * 12});
}

TEST_P(ThreadsTest, ASessionIsDestroyedWhileItIsInUse) {
  const Owned model = LoadModel(GetParam());
  for (int round = 0; round < 4; ++round) {
    const Owned session = NewSession(model);
    std::atomic<int> steps{0};
    std::atomic<int> wrong{0};
    std::thread destroyer([&] {
      while (steps < kThreads) std::this_thread::yield();
      wrong += tenon_session_destroy(session, nullptr) != TENON_OK;
    });
    OnThreads([&](int) {
      tenon_sequence sequence = 0;
      if (tenon_sequence_create(session, &sequence, nullptr) != TENON_OK) {
        ++steps;
        return;
      }
      const tenon_sampling_params greedy = Greedy();
      std::vector<int32_t> input = {1};
      for (int i = 0; i < 60; ++i) {
        const std::vector<tenon_step_row> rows = {
            Row(sequence, input, &greedy)};
        std::vector<int32_t> tokens;
        const tenon_step_args args = StepArgs(rows, &tokens);
        const int32_t code = tenon_session_step(session, &args, nullptr);
        ++steps;
        if (code == TENON_NOT_FOUND) return;
        wrong += code != TENON_OK;
        input = tokens;
      }
    });
    destroyer.join();
    EXPECT_EQ(wrong, 0);
    auto info = Make<tenon_session_info>();
    EXPECT_EQ(tenon_session_query(session, &info, nullptr), TENON_NOT_FOUND);
  }
}

TENON_FOR_EACH_DEVICE(ThreadsTest);

// A matrix of floats in host memory.
struct Matrix {
  explicit Matrix(int64_t rows, int64_t columns, float first)
      : data(static_cast<size_t>(rows * columns)), shape{rows, columns} {
    for (size_t i = 0; i < data.size(); ++i) {
      data[i] = first + static_cast<float>(i % 17) * 0.25f;
    }
    tensor.data = data.data();
    tensor.device = {TENON_DL_CPU, 0};
    tensor.ndim = rows == 1 ? 1 : 2;
    tensor.dtype = {TENON_DL_FLOAT, 32, 1};
    tensor.shape = rows == 1 ? shape + 1 : shape;
  }
  std::vector<float> data;
  int64_t shape[2];
  DLTensor tensor = {};
};

TEST(ContextThreadsTest, OpsOnOneContextTakeTurns) {
  auto options = Make<tenon_context_options>();
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 2;
  tenon_context handle = 0;
  ExpectOk([&](tenon_error* e) {
    return tenon_context_create(&options, &handle, e);
  });
  const Owned context(handle, tenon_context_destroy);
  const auto norm = [&](tenon_context with, int i, std::vector<float>* out) {
    Matrix x(211, 96, static_cast<float>(i) - 1.0f);
    Matrix weight(1, 96, 0.5f);
    Matrix y(211, 96, 0.0f);
    auto args = Make<tenon_rms_norm_args>();
    args.x = &x.tensor;
    args.weight = &weight.tensor;
    args.out = &y.tensor;
    args.epsilon = 1e-6f;
    for (int round = 0; round < 40; ++round) {
      ExpectOk([&](tenon_error* e) {
        return tenon_rms_norm(with, &args, nullptr, e);
      });
    }
    *out = y.data;
  };
  std::vector<float> expected[kThreads];
  std::vector<float> actual[kThreads];
  for (int i = 0; i < kThreads; ++i) norm(0, i, &expected[i]);
  OnThreads([&](int i) { norm(context, i, &actual[i]); });
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(actual[i], expected[i]);
}

}  // namespace
}  // namespace tenon::testing
