#include <string>

#include "engine/model_config.h"
#include "tests/fuzz/check.h"

// The text of a config.json. What is accepted is valid; what is not is told
// with the file's name.

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  using tenon::fuzz::Fail;
  ++tenon::fuzz::counters().calls;
  ++tenon::fuzz::counters().mutated;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto config = tenon::ParseModelConfig(text, "dir/config.json");
  if (config.ok()) {
    if (!config->Validate().ok()) Fail("an invalid config was accepted");
    return 0;
  }
  ++tenon::fuzz::counters().rejected;
  const std::string message = config.status().message();
  if (message.rfind("dir/config.json", 0) != 0) Fail(message);
  return 0;
}
