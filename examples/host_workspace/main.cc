// A host application with Tenon in its build: one op on its own memory, then
// the engine.

#include <cstdio>
#include <string>
#include <vector>

#include "engine/model.h"
#include "engine/session.h"
#include "ops/rms_norm/rms_norm.h"

namespace {

using tenon::Device;
using tenon::DType;
using tenon::MakeTensor;
using tenon::Status;
using tenon::StatusOr;

Status NormaliseARow() {
  std::vector<float> x = {1.0f, -2.0f, 3.0f, -4.0f};
  const std::vector<float> weight(x.size(), 1.0f);
  const int64_t hidden = static_cast<int64_t>(x.size());

  tenon::RmsNormParams params;
  params.x = MakeTensor(x.data(), DType::kFloat32, Device(), {1, hidden});
  params.weight =
      MakeTensor(weight.data(), DType::kFloat32, Device(), {hidden});
  params.out = params.x;  // in place
  params.epsilon = 1e-6f;
  TENON_RETURN_IF_ERROR(tenon::RmsNorm(params, tenon::Stream()));

  std::printf("rms_norm:");
  for (float value : x) std::printf(" %.4f", value);
  std::printf("\n");
  return Status();
}

// The model's tokens are bytes; 0 begins a text.
Status ContinueText(const std::string& model_directory,
                    const std::string& prompt, int max_tokens) {
  auto model = tenon::Model::Load(model_directory, Device());
  TENON_RETURN_IF_ERROR(model.status());
  auto session = tenon::Session::Create(*model, tenon::SessionOptions());
  TENON_RETURN_IF_ERROR(session.status());
  auto sequence = (*session)->CreateSequence();
  TENON_RETURN_IF_ERROR(sequence.status());

  std::vector<int32_t> tokens = {0};
  for (unsigned char byte : prompt) tokens.push_back(byte);
  tenon::StepRow row;
  row.sequence = *sequence;
  row.tokens = tokens.data();
  row.num_tokens = static_cast<int32_t>(tokens.size());

  std::printf("%s", prompt.c_str());
  std::vector<tenon::StepRowResult> results;
  for (int i = 0; i < max_tokens; ++i) {
    TENON_RETURN_IF_ERROR((*session)->Step({row}, &results));
    std::putchar(results[0].token);
    row.tokens = &results[0].token;
    row.num_tokens = 1;
  }
  std::printf("\n");
  return Status();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string model =
      argc > 1 ? argv[1] : "external/tenon/examples/models/austen";
  Status status = NormaliseARow();
  if (status.ok()) status = ContinueText(model, "She was", 64);
  if (status.ok()) return 0;
  std::fprintf(stderr, "host: %s\n", status.message());
  return 1;
}
