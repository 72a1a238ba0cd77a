#include "engine/checkpoint.h"

#include <set>
#include <utility>

#include "engine/json.h"

namespace tenon {
namespace {

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 100'000'000;

// A shard's name comes from a file that may have been written by anyone: only
// files of the model's own directory are opened.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

}  // namespace

StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(
    const std::string& directory) {
  std::shared_ptr<Checkpoint> checkpoint(new Checkpoint());
  checkpoint->directory_ = directory;
  const std::string index_path = directory + "/" + kIndexFile;
  if (FileExists(directory + "/" + kSingleFile)) {
    TENON_RETURN_IF_ERROR(checkpoint->AddFile(kSingleFile, nullptr));
  } else if (FileExists(index_path)) {
    TENON_RETURN_IF_ERROR(checkpoint->AddShards(index_path));
  } else {
    return NotFoundError(directory, ": has neither ", kSingleFile, " nor ",
                         kIndexFile);
  }
  return std::shared_ptr<const Checkpoint>(std::move(checkpoint));
}

Status Checkpoint::AddShards(const std::string& index_path) {
  StatusOr<std::string> text = ReadFile(index_path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  const StatusOr<JsonValue> root =
      ParseJson(*text, index_path, StatusCode::kDataLoss);
  if (!root.ok()) return root.status();
  const JsonValue* weight_map = root->Find("weight_map");
  if (weight_map == nullptr || weight_map->object() == nullptr) {
    return DataLossError(index_path, ": has no object \"weight_map\"");
  }
  Index index;
  std::set<std::string> shards;  // in the order of their numbers
  for (const auto& [name, value] : *weight_map->object()) {
    const std::string* file = value.string();
    if (file == nullptr || !IsPlainFileName(*file)) {
      return DataLossError(
          index_path, ": tensor \"", name,
          "\": its value is not the name of a file in this directory: ",
          file == nullptr ? "not a string" : file->c_str());
    }
    shards.insert(*file);
    index.emplace(name, *file);
  }
  for (const std::string& shard : shards) {
    const Status status = AddFile(shard, &index);
    if (status.code() == StatusCode::kNotFound) {
      return NotFoundError(status.message(), " (a shard named by ", index_path,
                           ")");
    }
    TENON_RETURN_IF_ERROR(status);
  }
  for (const auto& [name, file] : index) {
    if (entries_.count(name) == 0) {
      return DataLossError(directory_, "/", file, ": has no tensor \"", name,
                           "\", which ", index_path, " says it has");
    }
  }
  return Status();
}

Status Checkpoint::AddFile(const std::string& file_name, const Index* index) {
  StatusOr<MappedFile> file = MappedFile::Open(directory_ + "/" + file_name);
  if (!file.ok()) return file.status();
  StatusOr<std::vector<StoredTensor>> tensors =
      ParseSafetensors(file->data(), file->size(), file->path());
  if (!tensors.ok()) return tensors.status();
  files_.push_back(*std::move(file));
  for (StoredTensor& tensor : *tensors) {
    if (index != nullptr) {
      const auto it = index->find(tensor.name);
      if (it == index->end() || it->second != file_name) continue;
    }
    names_.push_back(tensor.name);
    total_bytes_ += tensor.bytes;
    entries_.emplace(names_.back(),
                     Entry{std::move(tensor), files_.size() - 1});
  }
  return Status();
}

StatusOr<TensorView> Checkpoint::Find(std::string_view name) const {
  const auto it = entries_.find(std::string(name));
  if (it == entries_.end()) {
    return NotFoundError(directory_, ": has no tensor \"", name, "\"");
  }
  const StoredTensor& tensor = it->second.tensor;
  if (tensor.view.dtype == DType::kInvalid) {
    return UnimplementedError(FileOf(name), ": tensor \"", name,
                              "\" has dtype ", tensor.stored_dtype,
                              ", which is not supported");
  }
  return tensor.view;
}

const std::string& Checkpoint::FileOf(std::string_view name) const {
  const auto it = entries_.find(std::string(name));
  return it == entries_.end() ? directory_ : files_[it->second.file].path();
}

}  // namespace tenon
