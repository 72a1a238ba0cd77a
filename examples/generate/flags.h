#ifndef TENON_EXAMPLES_GENERATE_FLAGS_H_
#define TENON_EXAMPLES_GENERATE_FLAGS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "ops/core/status.h"
#include "ops/core/tensor_view.h"
#include "ops/sampler/sampler.h"

namespace tenon::examples {

struct Flags {
  std::string model = "examples/models/austen";
  std::string prompt = "It was";
  std::vector<int32_t> prompt_ids;  // instead of prompt
  int32_t max_tokens = 400;
  int32_t batch = 1;
  SamplingParams sampling;
  Device device;
  bool fp8_weights = false;  // quantise them while loading
  bool help = false;
};

// What --help prints.
extern const char kUsage[];

// InvalidArgument, in one line, for an unknown flag or a bad value.
StatusOr<Flags> ParseFlags(int argc, char** argv);

}  // namespace tenon::examples

#endif  // TENON_EXAMPLES_GENERATE_FLAGS_H_
