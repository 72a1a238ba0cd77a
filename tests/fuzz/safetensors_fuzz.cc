#include <cstring>
#include <memory>
#include <string>

#include "engine/safetensors.h"
#include "tests/fuzz/check.h"

// The bytes of a safetensors file: 8 of the header's length, which the fuzzer
// seldom gets right by itself, are made from the size unless the first byte is
// odd. Of what is accepted, every byte can be read.

namespace tenon::fuzz {
namespace {

volatile char sink;

void ReadAll(const StoredTensor& tensor, const char* begin, size_t size) {
  const char* data = tensor.view.As<const char>();
  if (tensor.bytes < 0 || data < begin ||
      static_cast<size_t>(data - begin) + static_cast<size_t>(tensor.bytes) >
          size) {
    Fail("tensor " + tensor.name + " leaves the file");
  }
  char sum = 0;
  for (int64_t i = 0; i < tensor.bytes; ++i) sum ^= data[i];
  sink = sum;
}

void Parse(const char* data, size_t size) {
  ++counters().calls;
  ++counters().mutated;
  const auto tensors = ParseSafetensors(data, size, "dir/model.safetensors");
  if (tensors.ok()) {
    for (const StoredTensor& tensor : *tensors) ReadAll(tensor, data, size);
    return;
  }
  ++counters().rejected;
  const std::string message = tensors.status().message();
  if (message.rfind("dir/model.safetensors", 0) != 0) Fail(message);
}

}  // namespace
}  // namespace tenon::fuzz

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  // As long as the header: all but some bytes of data, as many as the first
  // byte says.
  const bool is_raw = data[0] % 2 == 1;
  const size_t data_bytes = data[0] / 2;
  const size_t text_bytes = size - 1;
  if (is_raw) {
    auto file = std::make_unique<char[]>(text_bytes);
    std::memcpy(file.get(), data + 1, text_bytes);
    tenon::fuzz::Parse(file.get(), text_bytes);
    return 0;
  }
  const size_t file_bytes = 8 + text_bytes + data_bytes;
  auto file = std::make_unique<char[]>(file_bytes);
  const uint64_t header_bytes = text_bytes;
  std::memcpy(file.get(), &header_bytes, 8);
  std::memcpy(file.get() + 8, data + 1, text_bytes);
  std::memset(file.get() + 8 + text_bytes, 'x', data_bytes);
  tenon::fuzz::Parse(file.get(), file_bytes);
  return 0;
}
