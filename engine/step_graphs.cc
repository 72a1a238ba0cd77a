#include "engine/step_graphs.h"

#include <algorithm>
#include <utility>

namespace tenon {
namespace {

constexpr int32_t kMaxBucket = 512;

int32_t NextBucket(int32_t rows) {
  if (rows < 8) return rows * 2;
  if (rows < 64) return rows + 8;
  return rows + (rows < 256 ? 16 : 32);
}

}  // namespace

DecodeBuckets::DecodeBuckets(int32_t max_rows) {
  const int32_t last = std::min(max_rows, kMaxBucket);
  for (int32_t rows = 1; rows < last; rows = NextBucket(rows)) {
    sizes_.push_back(rows);
  }
  sizes_.push_back(last);
}

int32_t DecodeBuckets::Find(int32_t rows) const {
  const auto bucket = std::lower_bound(sizes_.begin(), sizes_.end(), rows);
  return bucket == sizes_.end() ? 0 : *bucket;
}

Status StepGraphs::Capture(int32_t bucket, Device device, Stream stream,
                           const std::function<Status()>& enqueue) {
  StatusOr<Graph> graph = Graph::Capture(device, stream, enqueue);
  TENON_RETURN_IF_ERROR(graph.status());
  graphs_.push_back({bucket, *std::move(graph)});
  return Status();
}

const Graph* StepGraphs::Find(int32_t bucket) const {
  for (const Entry& entry : graphs_) {
    if (entry.bucket == bucket) return &entry.graph;
  }
  return nullptr;
}

int64_t StepGraphs::device_bytes() const {
  int64_t bytes = 0;
  for (const Entry& entry : graphs_) bytes += entry.graph.info().device_bytes;
  return bytes;
}

}  // namespace tenon
