#ifndef TENON_ENGINE_STEP_GRAPHS_H_
#define TENON_ENGINE_STEP_GRAPHS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "ops/core/graph.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"

namespace tenon {

// The numbers of rows that decode steps run with: a step of fewer rows is
// filled up with padding to the next one. What an op does to a row may depend
// on the number of rows, so steps are filled up whether there are graphs or
// not, and a token does not depend on that option.
//
// 1, 2, 4, 8, then multiples of 8 to 64, of 16 to 256, of 32 to 512, as far as
// they are less than max_rows, and max_rows itself. More than 512 rows: none,
// such a step runs as it is.
class DecodeBuckets {
 public:
  DecodeBuckets() = default;  // none
  explicit DecodeBuckets(int32_t max_rows);

  // The least bucket with room for `rows`; 0: none.
  int32_t Find(int32_t rows) const;
  const std::vector<int32_t>& sizes() const { return sizes_; }

 private:
  std::vector<int32_t> sizes_;  // ascending
};

// A captured decode step for each bucket.
class StepGraphs {
 public:
  StepGraphs() = default;  // none
  // Captures what enqueue() launches as the step of a bucket. It must have run
  // once before.
  Status Capture(int32_t bucket, Device device, Stream stream,
                 const std::function<Status()>& enqueue);

  // Null where there is none.
  const Graph* Find(int32_t bucket) const;
  int64_t num_graphs() const { return static_cast<int64_t>(graphs_.size()); }
  int64_t device_bytes() const;

 private:
  struct Entry {
    int32_t bucket = 0;
    Graph graph;
  };
  std::vector<Entry> graphs_;
};

}  // namespace tenon

#endif  // TENON_ENGINE_STEP_GRAPHS_H_
