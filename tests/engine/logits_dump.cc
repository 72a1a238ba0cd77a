// Runs a model over a list of tokens and writes every position's logits, for
// tests/golden/full_width.py to compare with transformers:
//   logits_dump MODEL_DIR TOKENS.safetensors OUT.safetensors cpu|cuda
// TOKENS holds `tokens` int32 [n]; OUT gets `logits` float32 [n, vocab].

#include <cstdio>
#include <string>
#include <vector>

#include "engine/file.h"
#include "engine/safetensors.h"
#include "engine/session.h"

namespace tenon {
namespace {

Status WriteLogits(const std::string& path, int64_t rows, int64_t vocab,
                   const std::vector<float>& logits) {
  std::string header =
      StrCat("{\"logits\":{\"dtype\":\"F32\",\"shape\":[", rows, ",", vocab,
             "],\"data_offsets\":[0,", logits.size() * sizeof(float), "]}}");
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return NotFoundError(path, ": cannot be written");
  const bool written =
      std::fwrite(&length, sizeof(length), 1, file) == 1 &&
      std::fwrite(header.data(), header.size(), 1, file) == 1 &&
      std::fwrite(logits.data(), sizeof(float), logits.size(), file) ==
          logits.size();
  if (std::fclose(file) != 0 || !written) {
    return DataLossError(path, ": not written in full");
  }
  return Status();
}

Status Run(const std::string& directory, const std::string& tokens_path,
           const std::string& out_path, Device device) {
  StatusOr<MappedFile> file = MappedFile::Open(tokens_path);
  TENON_RETURN_IF_ERROR(file.status());
  StatusOr<std::vector<StoredTensor>> tensors =
      ParseSafetensors(file->data(), file->size(), file->path());
  TENON_RETURN_IF_ERROR(tensors.status());
  std::vector<int32_t> tokens;
  for (const StoredTensor& tensor : *tensors) {
    if (tensor.name != "tokens" || tensor.view.dtype != DType::kInt32) continue;
    const int32_t* data = tensor.view.As<const int32_t>();
    tokens.assign(data, data + NumElements(tensor.view));
  }
  if (tokens.empty()) {
    return InvalidArgumentError(tokens_path, " has no int32 tensor `tokens`");
  }
  StatusOr<std::shared_ptr<const Model>> model = Model::Load(directory, device);
  TENON_RETURN_IF_ERROR(model.status());
  const int32_t count = static_cast<int32_t>(tokens.size());
  SessionOptions options;
  options.max_sequences = 1;
  options.max_tokens = options.max_logit_rows = options.max_context = count;
  StatusOr<std::unique_ptr<Session>> session = Session::Create(*model, options);
  TENON_RETURN_IF_ERROR(session.status());
  StatusOr<SequenceId> sequence = (*session)->CreateSequence();
  TENON_RETURN_IF_ERROR(sequence.status());
  std::vector<float> logits(tokens.size() *
                            static_cast<size_t>((*model)->config.vocab_size));
  StepRow row;
  row.sequence = *sequence;
  row.tokens = tokens.data();
  row.num_tokens = count;
  row.sample = false;
  row.logits_mode = LogitsMode::kAll;
  row.logits = logits.data();
  std::vector<StepRowResult> results;
  TENON_RETURN_IF_ERROR((*session)->Step({row}, &results));
  return WriteLogits(out_path, count, (*model)->config.vocab_size, logits);
}

}  // namespace
}  // namespace tenon

int main(int argc, char** argv) {
  const std::string device_name = argc == 5 ? argv[4] : "";
  if (device_name != "cpu" && device_name != "cuda") {
    std::fprintf(stderr, "usage: logits_dump MODEL_DIR TOKENS OUT cpu|cuda\n");
    return 2;
  }
  tenon::Device device;
  device.type =
      device_name == "cpu" ? tenon::DeviceType::kCpu : tenon::DeviceType::kCuda;
  const tenon::Status status = tenon::Run(argv[1], argv[2], argv[3], device);
  if (status.ok()) return 0;
  std::fprintf(stderr, "logits_dump: %s\n", status.message());
  return 1;
}
