#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "engine/checkpoint.h"
#include "tests/fuzz/check.h"

// The text of a model.safetensors.index.json beside two good shards. Names of
// files in it must not lead out of the directory.

namespace tenon::fuzz {
namespace {

// A model directory, gone when the process ends.
class Directory {
 public:
  Directory() {
    const char* parent = std::getenv("TEST_TMPDIR");
    std::string pattern =
        std::string(parent != nullptr ? parent : "/tmp") + "/index_fuzz_XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) Fail("no directory " + pattern);
    path_ = pattern;
    WriteShard("a.safetensors", R"({"a":{"dtype":"U8","shape":[2],)");
    WriteShard("b.safetensors", R"({"b":{"dtype":"U8","shape":[2],)");
  }
  ~Directory() { std::filesystem::remove_all(path_); }

  const std::string& path() const { return path_; }
  void Write(const std::string& name, const std::string& contents) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << contents;
  }

 private:
  void WriteShard(const std::string& name, std::string header) const {
    header += R"("data_offsets":[0,2]}})";
    std::string file(8, '\0');
    file[0] = static_cast<char>(header.size());
    Write(name, file + header + "xy");
  }

  std::string path_;
};

}  // namespace
}  // namespace tenon::fuzz

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  using tenon::fuzz::Fail;
  static const tenon::fuzz::Directory directory;
  ++tenon::fuzz::counters().calls;
  ++tenon::fuzz::counters().mutated;
  directory.Write("model.safetensors.index.json",
                  std::string(reinterpret_cast<const char*>(data), size));
  const auto checkpoint = tenon::Checkpoint::Open(directory.path());
  if (!checkpoint.ok()) {
    ++tenon::fuzz::counters().rejected;
    const std::string message = checkpoint.status().message();
    if (message.rfind(directory.path(), 0) != 0) Fail(message);
    return 0;
  }
  for (const std::string& name : (*checkpoint)->names()) {
    if (name != "a" && name != "b") Fail("a tensor of another file: " + name);
    if (!(*checkpoint)->Find(name).ok()) Fail("no tensor " + name);
  }
  return 0;
}
