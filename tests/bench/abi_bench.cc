// What the C interface adds to a call of an op: both on zero tokens, where
// nothing but reading and checking the arguments is left. Nanoseconds stand in
// the notes.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "abi/tenon.h"
#include "tests/abi/op_cases.h"
#include "tests/bench/bench.h"

namespace tenon {
namespace {

constexpr int kCalls = 2000;
constexpr int kRounds = 101;

template <class Call>
double NanosecondsPerCall(const Call& call) {
  const double begin = bench::Seconds();
  for (int i = 0; i < kCalls; ++i) call();
  return (bench::Seconds() - begin) / kCalls * 1e9;
}

tenon_context MakeContext(const bench::Bench& b) {
  tenon_context_options options = {};
  options.struct_size = sizeof(options);
  options.device_type = b.cuda() ? TENON_DEVICE_CUDA : TENON_DEVICE_CPU;
  options.num_threads = b.cuda() ? 0 : 1;
  tenon_error error = {sizeof(error), 0, ""};
  tenon_context context = 0;
  if (tenon_context_create(&options, &context, &error) != TENON_OK) {
    std::fprintf(stderr, "%s\n", error.message);
    std::exit(1);
  }
  return context;
}

// One op; the two take turns, so that the clock's changes hit both.
void RunCase(bench::Bench& b, tenon_context context, DType dtype,
             abi_test::OpMaker make) {
  const abi_test::OpCasePtr op = make({b.device(), dtype}, 0);
  if (!b.Wants(op->function)) return;
  abi_test::AddWorkspace(context, b.device(), op.get());
  const Stream stream = b.stream();
  std::vector<double> cpp, c;
  for (int i = 0; i < kRounds; ++i) {
    bool ok = true;
    cpp.push_back(
        NanosecondsPerCall([&] { ok = ok && op->call_cpp(stream).ok(); }));
    c.push_back(NanosecondsPerCall([&] {
      ok = ok && op->call(context, stream.cuda, nullptr) == TENON_OK;
    }));
    if (!ok) {
      std::fprintf(stderr, "%s failed\n", op->function.c_str());
      std::exit(1);
    }
  }
  const double cpp_ns = bench::Median(cpp);
  const double c_ns = bench::Median(c);
  char note[80];
  std::snprintf(note, sizeof(note), "C++ %.0f ns, C %.0f ns, difference %.0f",
                cpp_ns, c_ns, c_ns - cpp_ns);
  const char* shape = context == 0 ? "no context" : "context";
  b.Add({op->function, shape, 0, dtype, 0.0, 0.0, note}, c_ns * 1e-3);
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  using tenon::DType;
  tenon::bench::Bench b(argc, argv, "abi_bench");
  const tenon_context context = tenon::MakeContext(b);
  for (DType dtype : b.DTypes({DType::kBFloat16})) {
    for (tenon_context of_call : {tenon_context{0}, context}) {
      for (tenon::abi_test::OpMaker make : tenon::abi_test::OpMakers()) {
        tenon::RunCase(b, of_call, dtype, make);
      }
    }
  }
  tenon_context_destroy(context, nullptr);
  return b.Finish();
}
