#ifndef TENON_TESTS_TESTING_CUDA_GRAPH_H_
#define TENON_TESTS_TESTING_CUDA_GRAPH_H_

#include <functional>

#include "ops/core/status.h"
#include "ops/core/stream.h"

namespace tenon::testing {

// Captures what `body` enqueues on the stream into a graph and launches that
// `replays` times. An allocation or a synchronisation during capture is an
// error. Only linked in where kCudaBuilt.
Status RunAsCudaGraph(Stream stream, int replays,
                      const std::function<Status()>& body);

}  // namespace tenon::testing

#endif  // TENON_TESTS_TESTING_CUDA_GRAPH_H_
