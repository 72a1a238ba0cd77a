// What a benchmark program prints.

#include <algorithm>
#include <cstdio>

#include "ops/core/build_config.h"
#include "tests/bench/bench.h"
#include "tests/bench/bench_backend.h"

namespace tenon::bench {

double Ceilings::LimitMicroseconds(const Case& what) const {
  const double tflops = MatmulTflops(what.dtype);
  return std::max(what.bytes / read_gb_per_s * 1e-3,
                  tflops > 0.0 ? what.flops / tflops * 1e-6 : 0.0);
}

namespace {

// A number of a table, or a dash for one that is not positive.
void PrintCell(int width, int decimals, double value) {
  if (value > 0.0) {
    std::printf(" %*.*f", width, decimals, value);
  } else {
    std::printf(" %*s", width, "-");
  }
}

double Ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }

// 0 of what is a part of a step.
double TokensPerSecond(const Measurement& m) {
  return m.what.launches > 0
             ? 0.0
             : 1e6 * static_cast<double>(m.what.tokens) / m.microseconds;
}

}  // namespace

void Bench::PrintHeader() const {
  std::printf("%s on %s", name_.c_str(), info_.name.c_str());
  if constexpr (kCudaBuilt) {
    if (cuda()) std::printf(", up to %d MHz", ClockMhzCuda(device()));
  }
  std::printf("; %s inputs; medians\n", hot_ ? "hot" : "cold");
  std::printf("measured: read %.1f GB/s, copy %.1f GB/s, matrix %.2f TFLOP/s",
              ceilings_.read_gb_per_s, ceilings_.copy_gb_per_s,
              ceilings_.matmul_tflops);
  if (ceilings_.fp8_matmul_tflops > 0.0) {
    std::printf(", fp8 %.2f TFLOP/s", ceilings_.fp8_matmul_tflops);
  }
  std::printf("\n%-19s %-19s %6s %-11s %9s", "op", "shape", "tokens", "dtype",
              "us");
  if (options_.tokens_per_s) std::printf(" %8s", "tokens/s");
  if (options_.experts) std::printf(" %7s", "experts");
  std::printf(" %8s %7s %6s %6s %8s %6s", "MB", "GB/s", "%read", "%copy",
              "TFLOP/s", "%mm");
  if (options_.limit) std::printf(" %8s %6s", "limit", "%limit");
  if (options_.copy) std::printf(" %8s %6s", "copy us", "x copy");
  std::printf("  note\n");
}

void Bench::PrintRow(const Measurement& m) const {
  std::printf("%-19s %-19s %6lld %-11s %9.2f", m.what.op.c_str(),
              m.what.shape.c_str(), static_cast<long long>(m.what.tokens),
              DTypeName(m.what.dtype), m.microseconds);
  if (options_.tokens_per_s) PrintCell(8, 0, TokensPerSecond(m));
  if (options_.experts) PrintCell(7, 1, m.what.experts);
  const double gb_per_s = m.what.bytes / m.microseconds * 1e-3;
  PrintCell(8, 3, m.what.bytes * 1e-6);
  PrintCell(7, 1, gb_per_s);
  PrintCell(6, 1, 100.0 * gb_per_s / ceilings_.read_gb_per_s);
  PrintCell(6, 1, 100.0 * gb_per_s / ceilings_.copy_gb_per_s);
  const double tflops = m.what.flops / m.microseconds * 1e-6;
  PrintCell(8, 2, tflops);
  PrintCell(6, 1, 100.0 * Ratio(tflops, ceilings_.MatmulTflops(m.what.dtype)));
  if (options_.limit) {
    const double limit = ceilings_.LimitMicroseconds(m.what);
    PrintCell(8, 2, limit);
    PrintCell(6, 1, 100.0 * limit / m.microseconds);
  }
  if (options_.copy) {
    PrintCell(8, 2, m.copy_microseconds);
    PrintCell(6, 3, Ratio(m.microseconds, m.copy_microseconds));
  }
  std::printf("  %s\n", m.what.note.c_str());
  std::fflush(stdout);
}

// Names and notes come from the programs and hold nothing to be escaped.
void Bench::PrintJson() const {
  std::printf("{\"bench\": \"%s\", \"device\": \"%s\", \"cache\": \"%s\",\n",
              name_.c_str(), info_.name.c_str(), hot_ ? "hot" : "cold");
  std::printf(
      " \"read_gb_per_s\": %.1f, \"copy_gb_per_s\": %.1f, "
      "\"matmul_tflops\": %.3f, \"fp8_matmul_tflops\": %.3f,\n",
      ceilings_.read_gb_per_s, ceilings_.copy_gb_per_s, ceilings_.matmul_tflops,
      ceilings_.fp8_matmul_tflops);
  std::printf(" \"results\": [");
  const char* separator = "\n";
  for (const Measurement& m : results_) {
    std::printf(
        "%s  {\"op\": \"%s\", \"shape\": \"%s\", \"tokens\": %lld, "
        "\"dtype\": \"%s\", \"us\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, "
        "\"limit_us\": %.3f, \"experts\": %.2f, \"copy_us\": %.3f, "
        "\"launches\": %lld, \"note\": \"%s\"}",
        separator, m.what.op.c_str(), m.what.shape.c_str(),
        static_cast<long long>(m.what.tokens), DTypeName(m.what.dtype),
        m.microseconds, m.what.bytes, m.what.flops,
        ceilings_.LimitMicroseconds(m.what), m.what.experts,
        m.copy_microseconds, static_cast<long long>(m.what.launches),
        m.what.note.c_str());
    separator = ",\n";
  }
  std::printf("\n ]}\n");
}

}  // namespace tenon::bench
