// Handles: whatever is no live handle of the right kind is an error, and never
// another object.

#include "abi/handles.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <limits>
#include <set>
#include <thread>
#include <vector>

#include "abi/context.h"
#include "abi/model.h"
#include "tests/abi/engine_fixture.h"

namespace tenon::abi {
namespace {

using ::tenon::testing::ExpectError;
using ::tenon::testing::ExpectOk;
using ::tenon::testing::Make;
using ::tenon::testing::Owned;

int32_t CreateContext(tenon_context* context, tenon_error* error) {
  auto options = Make<tenon_context_options>();
  options.device_type = TENON_DEVICE_CPU;
  options.num_threads = 1;
  return tenon_context_create(&options, context, error);
}

Owned NewContext() {
  tenon_context context = 0;
  ExpectOk([&](tenon_error* e) { return CreateContext(&context, e); });
  return Owned(context, tenon_context_destroy);
}

int32_t Query(tenon_context context, tenon_error* error = nullptr) {
  auto info = Make<tenon_context_info>();
  return tenon_context_query(context, &info, error);
}

void ExpectNoContext(uint64_t handle, const char* why) {
  ExpectError(TENON_NOT_FOUND, {"tenon_context_query: context is ", why},
              [&](tenon_error* e) { return Query(handle, e); });
  if (handle == 0) return;
  ExpectError(TENON_NOT_FOUND, {"tenon_context_destroy: context is ", why},
              [&](tenon_error* e) { return tenon_context_destroy(handle, e); });
}

TEST(HandlesTest, StaleOnesAreNotFound) {
  tenon_context context = 0;
  ExpectOk([&](tenon_error* e) { return CreateContext(&context, e); });
  ExpectOk([&](tenon_error* e) { return Query(context, e); });
  ExpectOk([&](tenon_error* e) { return tenon_context_destroy(context, e); });
  ExpectNoContext(context, "which names no context (any more)");

  // Its slot again, whichever it was: another object, another handle.
  std::vector<Owned> others;
  for (int i = 0; i < kMaxHandles; ++i) others.push_back(NewContext());
  ExpectNoContext(context, "which names no context (any more)");
  for (uint64_t other : others) EXPECT_NE(other, context);
}

TEST(HandlesTest, ForeignKindsAreNotFound) {
  const Owned context = NewContext();
  auto info = Make<tenon_model_info>();
  ExpectError(
      TENON_NOT_FOUND,
      {"model is ", "a handle of a context, expected one of a model"},
      [&](tenon_error* e) { return tenon_model_query(context, &info, e); });
  ExpectError(
      TENON_NOT_FOUND,
      {"session is ", "a handle of a context, expected one of a session"},
      [&](tenon_error* e) { return tenon_session_destroy(context, e); });
  ExpectOk([&](tenon_error* e) { return Query(context, e); });
}

TEST(HandlesTest, MadeUpOnesAreNotFound) {
  const Owned context = NewContext();
  ExpectNoContext(0, "is 0, no context");
  for (uint64_t handle :
       {uint64_t{1}, uint64_t{4095}, context - kMaxHandles,
        context + kMaxHandles, context + 1, context ^ uint64_t{1} << 40,
        context | uint64_t{1} << 63, std::numeric_limits<uint64_t>::max()}) {
    ExpectNoContext(handle, "which names no context");
  }
  ExpectOk([&](tenon_error* e) { return Query(context, e); });
}

TEST(HandlesTest, DestroyingZeroDoesNothing) {
  EXPECT_EQ(tenon_context_destroy(0, nullptr), TENON_OK);
  EXPECT_EQ(tenon_model_destroy(0, nullptr), TENON_OK);
  EXPECT_EQ(tenon_session_destroy(0, nullptr), TENON_OK);
}

TEST(HandlesTest, ThereAre4096) {
  std::set<uint64_t> seen;
  std::vector<Owned> contexts;
  for (int i = 0; i < kMaxHandles; ++i) {
    contexts.push_back(NewContext());
    ASSERT_TRUE(seen.insert(contexts.back()).second);
  }
  tenon_context extra = 77;
  ExpectError(TENON_RESOURCE_EXHAUSTED, {"all 4096 handles"},
              [&](tenon_error* e) { return CreateContext(&extra, e); });
  EXPECT_EQ(extra, 77u) << "written without success";
  contexts.erase(contexts.begin() + 1234);
  contexts.push_back(NewContext());
  EXPECT_TRUE(seen.insert(contexts.back()).second) << "a number came again";
}

// An object that tells whether it lives.
std::unique_ptr<ModelObject> MakeObject(std::weak_ptr<const Model>* watch) {
  auto object = std::make_unique<ModelObject>();
  object->model = std::make_shared<const Model>();
  *watch = object->model;
  return object;
}

TEST(HandlesTest, ADestroyedObjectLivesWhileItIsInUse) {
  std::weak_ptr<const Model> watch;
  const StatusOr<uint64_t> handle = AddHandle(MakeObject(&watch));
  ASSERT_TRUE(handle.ok());
  {
    Pin<ModelObject> first;
    Pin<ModelObject> second;
    ASSERT_TRUE(PinHandle("model", *handle, &first).ok());
    ASSERT_TRUE(PinHandle("model", *handle, &second).ok());
    EXPECT_TRUE(DestroyHandle("model", HandleKind::kModel, *handle).ok());
    Pin<ModelObject> late;
    EXPECT_EQ(PinHandle("model", *handle, &late).code(), StatusCode::kNotFound);
    EXPECT_EQ(DestroyHandle("model", HandleKind::kModel, *handle).code(),
              StatusCode::kNotFound);
    first = Pin<ModelObject>();
    EXPECT_FALSE(watch.expired()) << "while there is a second user";
    EXPECT_EQ(second->model, watch.lock());
  }
  EXPECT_TRUE(watch.expired());
}

TEST(HandlesTest, ThreadsDestroyWhatOthersUse) {
  constexpr int kRounds = 300;
  constexpr int kThreads = 3;
  for (int round = 0; round < kRounds; ++round) {
    std::weak_ptr<const Model> watch;
    const StatusOr<uint64_t> handle = AddHandle(MakeObject(&watch));
    ASSERT_TRUE(handle.ok());
    std::atomic<int> destroyed{0};
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&] {
        for (int j = 0; j < 20; ++j) {
          Pin<ModelObject> pin;
          const Status status = PinHandle("model", *handle, &pin);
          if (status.ok() ? pin->model == nullptr
                          : status.code() != StatusCode::kNotFound) {
            ++wrong;
          }
        }
        destroyed += DestroyHandle("model", HandleKind::kModel, *handle).ok();
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(destroyed, 1);
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(watch.expired());
  }
}

TEST(HandlesTest, ThreadsCreateAndDestroyTheirOwn) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 500; ++j) {
        tenon_context context = 0;
        wrong += CreateContext(&context, nullptr) != TENON_OK;
        wrong += Query(context) != TENON_OK;
        wrong += tenon_context_destroy(context, nullptr) != TENON_OK;
        wrong += Query(context) != TENON_NOT_FOUND;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Runs `body`, which returns how many things went wrong, in a child process.
template <class Body>
int RunInChild(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

bool SaysFork(int32_t code, const tenon_error& error) {
  return code == TENON_FAILED_PRECONDITION &&
         std::string(error.message).find("fork()") != std::string::npos;
}

TEST(HandlesTest, AChildProcessHasNoneOfItsParents) {
  const Owned context = NewContext();
  tenon_context stale = 0;
  ASSERT_EQ(CreateContext(&stale, nullptr), TENON_OK);
  ASSERT_EQ(tenon_context_destroy(stale, nullptr), TENON_OK);
  EXPECT_EQ(RunInChild([&] {
              auto error = Make<tenon_error>();
              int wrong = 0;
              wrong += !SaysFork(Query(context, &error), error);
              wrong += !SaysFork(tenon_context_destroy(context, &error), error);
              wrong += Query(context + kMaxHandles * 1000) != TENON_NOT_FOUND;
              // Its own work, beside the parent's that still do not.
              tenon_context own = 0;
              wrong += CreateContext(&own, nullptr) != TENON_OK;
              wrong += Query(own) != TENON_OK;
              wrong += !SaysFork(Query(context, &error), error);
              // In its own child they do not in turn.
              wrong += RunInChild([&] {
                return !SaysFork(Query(own, &error), error) +
                       !SaysFork(Query(context, &error), error);
              });
              wrong += tenon_context_destroy(own, nullptr) != TENON_OK;
              wrong += Query(own) != TENON_NOT_FOUND;
              return wrong;
            }),
            0);
  ExpectOk([&](tenon_error* e) { return Query(context, e); });
  ExpectNoContext(stale, "(any more)");
}

}  // namespace
}  // namespace tenon::abi
