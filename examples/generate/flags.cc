#include "examples/generate/flags.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <limits>

namespace tenon::examples {
namespace {

constexpr int32_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int32_t kMaxBatch = 1 << 20;  // as a session has it

// Digits alone: strtoull would also take spaces and signs.
bool ToInteger(const std::string& text, uint64_t* value) {
  errno = 0;
  *value = std::strtoull(text.c_str(), nullptr, 10);
  return !text.empty() && errno == 0 &&
         text.find_first_not_of("0123456789") == std::string::npos;
}

Status ParseInt(const std::string& flag, const std::string& text, int32_t low,
                int32_t high, int32_t* value) {
  uint64_t number = 0;
  if (!ToInteger(text, &number) || number < static_cast<uint64_t>(low) ||
      number > static_cast<uint64_t>(high)) {
    return InvalidArgumentError(
        flag, ": \"", text, "\" is not an integer from ", low, " to ", high);
  }
  *value = static_cast<int32_t>(number);
  return Status();
}

Status ParseFloat(const std::string& flag, const std::string& text, double high,
                  float* value) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(number >= 0.0) || !(number <= high)) {
    return InvalidArgumentError(flag, ": \"", text,
                                "\" is not a number from 0 to ", high);
  }
  *value = static_cast<float>(number);
  return Status();
}

Status ParseSeed(const std::string& text, uint64_t* seed) {
  if (ToInteger(text, seed)) return Status();
  return InvalidArgumentError("--seed: \"", text,
                              "\" is not an integer from 0 to 2^64 - 1");
}

Status ParseIds(const std::string& text, std::vector<int32_t>* ids) {
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    ids->push_back(0);
    TENON_RETURN_IF_ERROR(ParseInt("--prompt-ids",
                                   text.substr(begin, end - begin), 0, kMaxInt,
                                   &ids->back()));
    begin = end + 1;
  }
  return Status();
}

Status ParseDevice(const std::string& text, Device* device) {
  if (text != "cpu" && text != "cuda") {
    return InvalidArgumentError("--device: ", text, " is not cpu or cuda");
  }
  device->type = text == "cpu" ? DeviceType::kCpu : DeviceType::kCuda;
  return Status();
}

Status ParseWeights(const std::string& text, bool* fp8) {
  if (text != "stored" && text != "fp8") {
    return InvalidArgumentError("--weights: ", text, " is not stored or fp8");
  }
  *fp8 = text == "fp8";
  return Status();
}

Status SetFlag(const std::string& flag, const std::string& value,
               Flags* flags) {
  if (flag == "--model") {
    flags->model = value;
    return value.empty() ? InvalidArgumentError(flag, ": no directory is given")
                         : Status();
  }
  if (flag == "--prompt") {
    flags->prompt = value;
    return Status();
  }
  if (flag == "--prompt-ids") return ParseIds(value, &flags->prompt_ids);
  if (flag == "--max-tokens") {
    return ParseInt(flag, value, 1, kMaxInt, &flags->max_tokens);
  }
  if (flag == "--batch") {
    return ParseInt(flag, value, 1, kMaxBatch, &flags->batch);
  }
  if (flag == "--temperature") {
    return ParseFloat(flag, value, 1e6, &flags->sampling.temperature);
  }
  if (flag == "--top-k") {
    return ParseInt(flag, value, 0, kMaxInt, &flags->sampling.top_k);
  }
  if (flag == "--top-p") {
    return ParseFloat(flag, value, 1.0, &flags->sampling.top_p);
  }
  if (flag == "--seed") return ParseSeed(value, &flags->sampling.seed);
  if (flag == "--device") return ParseDevice(value, &flags->device);
  if (flag == "--weights") return ParseWeights(value, &flags->fp8_weights);
  return InvalidArgumentError("unknown option ", flag, "; see --help");
}

}  // namespace

const char kUsage[] =
    R"(Continues a prompt with a Qwen3 or Qwen3-MoE model and prints the text as it comes.

  --model DIR        Hugging Face checkpoint directory (default: the shipped model)
  --prompt TEXT      for a byte-level model, such as the shipped one
  --prompt-ids N,..  token ids instead, for any model; prints ids
  --max-tokens N     how many to generate (400)
  --temperature X    0 is greedy (0.8)
  --top-k N          0 is off (0)
  --top-p X          1 is off (0.95)
  --seed N           the same seed gives the same text (0)
  --batch N          that many continuations at once (1)
  --device cpu|cuda  (cpu)
  --weights stored|fp8  as the checkpoint has them, or quantised while loading (stored)
)";

StatusOr<Flags> ParseFlags(int argc, char** argv) {
  Flags flags;
  flags.sampling.temperature = 0.8f;
  flags.sampling.top_p = 0.95f;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag == "--help") {
      flags.help = true;
      return flags;
    }
    std::string value;
    const size_t equals = flag.find('=');
    if (equals != std::string::npos) {
      value = flag.substr(equals + 1);
      flag.resize(equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      return InvalidArgumentError(flag, ": unknown option or value missing; ",
                                  "see --help");
    }
    TENON_RETURN_IF_ERROR(SetFlag(flag, value, &flags));
  }
  return flags;
}

}  // namespace tenon::examples
