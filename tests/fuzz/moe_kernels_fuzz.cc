#include <string>

#include "engine/moe_kernel_file.h"
#include "tests/fuzz/check.h"

// The text of a file of kernel sizes. What is accepted is a table that can be
// used, and is written and read back to the same; what is not is told with the
// file's name.

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  using tenon::fuzz::Fail;
  ++tenon::fuzz::counters().calls;
  ++tenon::fuzz::counters().mutated;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto file = tenon::ParseMoeKernelFile(text, "kernels.json");
  if (file.ok()) {
    const tenon::MoeKernelTable table = file->table();
    if (!tenon::CheckMoeKernelTable("", table).ok()) {
      Fail("an unusable table was accepted");
    }
    const std::string written = tenon::FormatMoeKernelFile(*file);
    const auto again = tenon::ParseMoeKernelFile(written, "written");
    if (!again.ok()) Fail(again.status().message());
    if (tenon::FormatMoeKernelFile(*again) != written) {
      Fail("written twice, it is not the same");
    }
    return 0;
  }
  ++tenon::fuzz::counters().rejected;
  const std::string message = file.status().message();
  if (message.rfind("kernels.json", 0) != 0) Fail(message);
  return 0;
}
