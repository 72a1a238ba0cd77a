#ifndef TENON_ENGINE_CHECKPOINT_H_
#define TENON_ENGINE_CHECKPOINT_H_

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/file.h"
#include "engine/safetensors.h"
#include "ops/core/status.h"
#include "ops/core/tensor_view.h"

namespace tenon {

// The tensors of a Hugging Face model directory, as it is published: one
// model.safetensors, or model.safetensors.index.json and the shards that it
// names. Files are mapped, not read: opening takes as long as parsing their
// headers, and several processes share one copy in memory. Immutable, so any
// number of threads may use it.
class Checkpoint {
 public:
  // NotFound for a missing file; DataLoss for a malformed one (see
  // ParseSafetensors). Errors name the file and the tensor.
  static StatusOr<std::shared_ptr<const Checkpoint>> Open(
      const std::string& directory);

  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  // A CPU view of the tensor in the mapped file, valid while this object lives.
  // NotFound where there is none of that name, Unimplemented where its dtype is
  // one that no op knows.
  StatusOr<TensorView> Find(std::string_view name) const;
  // Whether there is a tensor of that name.
  bool Has(const std::string& name) const { return entries_.count(name) > 0; }

  // The path of the file that holds a tensor; the directory where none does.
  const std::string& FileOf(std::string_view name) const;

  // All names, in the order of the files and of the data in them.
  const std::vector<std::string>& names() const { return names_; }
  // Bytes of all tensors together.
  int64_t total_bytes() const { return total_bytes_; }
  const std::string& directory() const { return directory_; }

 private:
  Checkpoint() = default;

  struct Entry {
    StoredTensor tensor;
    size_t file = 0;  // of files_
  };
  using Index = std::unordered_map<std::string, std::string>;  // name to file

  // Maps a file and adds its tensors; with an index, those that it assigns to
  // the file.
  Status AddFile(const std::string& file_name, const Index* index);
  Status AddShards(const std::string& index_path);

  std::string directory_;
  std::vector<MappedFile> files_;
  std::unordered_map<std::string, Entry> entries_;
  std::vector<std::string> names_;
  int64_t total_bytes_ = 0;
};

}  // namespace tenon

#endif  // TENON_ENGINE_CHECKPOINT_H_
