// What a step costs in the service without gRPC and engine: reading the
// request, checking it, the loop, writing the reply. One client, medians in
// microseconds.
//
//   step_loop_bench [KIB]
//
// Before every step KIB of memory are written (default 0), as an engine on the
// CPU evicts what the service touches.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "service/step_loop.h"
#include "service/validator.h"
#include "tests/testing/bench_model.h"

namespace tenon::service {
namespace {

constexpr int kSteps = 1000;
constexpr int kWarmUp = 100;

template <class Base, class Request, class Response>
class OwnCall final : public Base {
 public:
  OwnCall() {
    Base::request = &own_request;
    Base::response = &own_response;
  }
  // The loop may be in its own thread's hands at the time.
  void Run(StepLoop* loop) {
    finished_ = false;
    Base::arrival = Clock::now();
    loop->Submit(static_cast<Base*>(this));
    while (!finished_) {
    }
  }
  void Finish(const Failure& failure) override {
    if (!failure.ok()) {
      std::fprintf(stderr, "%s\n", failure.message.c_str());
      std::exit(1);
    }
    finished_ = true;
  }

  Request own_request;
  Response own_response;

 private:
  std::atomic<bool> finished_{false};
};

using OwnCreate = OwnCall<CreateCall, v1::CreateSequencesRequest,
                          v1::CreateSequencesResponse>;
using OwnStep = OwnCall<StepCall, v1::StepRequest, v1::StepResponse>;
using OwnRelease = OwnCall<ReleaseCall, v1::ReleaseSequencesRequest,
                           v1::ReleaseSequencesResponse>;

double Microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void Measure(int rows, std::vector<char>* trash, const Limits& limits,
             StepLoop* loop) {
  OwnCreate create;
  for (int i = 0; i < rows; ++i) {
    v1::NewSequence* sequence = create.own_request.add_sequences();
    for (int j = 0; j < 4; ++j) {
      sequence->add_prompt(static_cast<uint32_t>(1 + (i + j) % 100));
    }
    sequence->set_max_tokens(kSteps + 1);
    sequence->set_ignore_eos(true);
  }
  create.Run(loop);
  const Validator validator(loop->engine().model().config,
                            loop->engine().options().max_context, limits);
  v1::StepRequest request;
  request.set_session_id(create.own_response.session_id());
  for (uint64_t seq : create.own_response.seq()) request.add_seq(seq);

  OwnStep step;
  std::string bytes, reply;
  std::vector<double> read, check, inside, write;
  for (int i = 0; i < kSteps; ++i) {
    request.set_step_id(static_cast<uint64_t>(i) + 1);
    request.SerializeToString(&bytes);
    for (size_t at = 0; at < trash->size(); at += 64) ++(*trash)[at];
    const Time begin = Clock::now();
    step.own_request.ParseFromString(bytes);
    const Time parsed = Clock::now();
    step.own_response.Clear();
    if (!validator.Check(step.own_request).ok()) std::exit(1);
    const Time checked = Clock::now();
    step.Run(loop);
    const Time stepped = Clock::now();
    step.own_response.SerializeToString(&reply);
    const Time end = Clock::now();
    if (i < kWarmUp) continue;
    const double engine_us =
        1e-3 * static_cast<double>(step.own_response.timing().step_ns());
    read.push_back(Microseconds(parsed - begin));
    check.push_back(Microseconds(checked - parsed));
    inside.push_back(Microseconds(stepped - checked) - engine_us);
    write.push_back(Microseconds(end - stepped));
  }
  std::printf("%5d %7.2f %7.2f %7.2f %7.2f\n", rows, Median(read),
              Median(check), Median(inside), Median(write));
  OwnRelease release;
  release.own_request.set_session_id(create.own_response.session_id());
  release.own_request.set_end_session(true);
  release.Run(loop);
}

int Main(int argc, char** argv) {
  const size_t kib = argc > 1 ? static_cast<size_t>(std::atoi(argv[1])) : 0;
  std::vector<char> trash(kib << 10);
  auto model = Model::Random(testing::SmallestModel(), DType::kFloat32,
                             {DeviceType::kCpu, 0}, 1);
  if (!model.ok()) {
    std::fprintf(stderr, "%s\n", model.status().message());
    return 1;
  }
  const Limits limits;
  SessionOptions options;
  StepLoop::SetEngineLimits(limits, &options);
  options.max_context = kSteps + 8;
  options.num_pages = int64_t{limits.rows_per_step} * (kSteps / 16 + 2);
  auto engine = Session::Create(*model, options);
  if (!engine.ok()) {
    std::fprintf(stderr, "%s\n", engine.status().message());
    return 1;
  }
  StepLoop loop(*std::move(engine), {limits, true});
  std::printf(" rows    read   check    loop   write\n");
  for (const int rows : {1, 16, 64, 256}) {
    Measure(rows, &trash, limits, &loop);
  }
  return 0;
}

}  // namespace
}  // namespace tenon::service

int main(int argc, char** argv) { return tenon::service::Main(argc, argv); }
