#include "service/tokens.h"

#include <fstream>
#include <utility>

namespace tenon::service {
namespace {

bool SameBytes(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i] ^ b[i]);
  }
  return difference == 0;
}

}  // namespace

Status TokenFile::Load() {
  if (path_.empty()) return Status();
  std::ifstream file(path_);
  std::vector<std::string> tokens;
  std::string line;
  while (std::getline(file, line)) {
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) {
      line.pop_back();
    }
    if (!line.empty() && line[0] != '#') tokens.push_back(line);
  }
  if (!file.eof()) return NotFoundError(path_, ": cannot be read");
  if (tokens.empty()) return InvalidArgumentError(path_, ": has no tokens");
  std::lock_guard<std::mutex> lock(mutex_);
  tokens_ = std::move(tokens);
  return Status();
}

bool TokenFile::Contains(std::string_view token) const {
  std::lock_guard<std::mutex> lock(mutex_);
  bool found = false;
  for (const std::string& known : tokens_) found |= SameBytes(known, token);
  return found;
}

}  // namespace tenon::service
