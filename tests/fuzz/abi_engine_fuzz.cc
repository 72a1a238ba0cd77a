#include "abi/tenon.h"
#include "tests/fuzz/check.h"
#include "tests/fuzz/engine_world.h"
#include "tests/fuzz/input.h"

// Random sequences of calls on sessions of a tiny model, some of them hostile,
// next to a model of what they should do: which sequences live, how long they
// are, how many pages are free. After a hostile call nothing has changed; after
// everything has been released, everything is free.

namespace tenon::fuzz {
namespace {

tenon_model MakeModel() {
  auto args = Zeroed<tenon_model_random_args>();
  args.device_type = TENON_DEVICE_CPU;
  args.dtype = TENON_DTYPE_FLOAT32;
  args.seed = 1;
  args.config_json = kConfig;
  tenon_model model = 0;
  auto error = Zeroed<tenon_error>();
  if (tenon_model_create_random(&args, &model, &error) != TENON_OK) {
    Fail(error.message);
  }
  return model;
}

}  // namespace
}  // namespace tenon::fuzz

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(
    const uint8_t* data, size_t size) {
  static const tenon_model model = tenon::fuzz::MakeModel();
  tenon::fuzz::Input in(data, size);
  tenon::fuzz::World(model, in).Run();
  return 0;
}
