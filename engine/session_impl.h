#ifndef TENON_ENGINE_SESSION_IMPL_H_
#define TENON_ENGINE_SESSION_IMPL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/activations.h"
#include "engine/decode_step.h"
#include "engine/expert_counter.h"
#include "engine/session.h"
#include "engine/step_buffers.h"
#include "engine/step_graphs.h"
#include "engine/step_rows.h"
#include "ops/core/graph.h"
#include "ops/core/memory.h"
#include "ops/linear/cublas_lt.h"

// Private to session.cc, which creates it, and session_step.cc, which runs
// steps.

namespace tenon {

struct Session::Impl {
  std::shared_ptr<const Model> model;
  SessionOptions options;
  StepLimits limits;
  OwnedStream stream;
  std::unique_ptr<CublasLt> cublas_lt;
  MoeKernelTable moe_kernels;  // of the options; empty without one
  KvCache cache;
  Activations activations;
  StepBuffers buffers;
  DecodeBuckets buckets;  // none on the CPU
  StepGraphs graphs;      // one for each bucket, or none
  bool is_broken = false;

  // A step that was enqueued, one for each side of the buffers.
  struct Flight {
    Event done;
    DrawnTokens drawn;
    // Of each row: where its mirostat mu was left; -1: it has none.
    std::vector<int32_t> mirostat;
    ExpertCounter experts;
    int32_t tokens = 0;
    double begin = 0.0;
  };
  Flight flights[kMaxStepsInFlight];
  int last_side = 1;      // of the step that was enqueued last
  int num_in_flight = 0;  // that nobody has waited for
  // What the last step drew, or will; empty after one that failed.
  DrawnTokens last_drawn;
  MirostatStates mirostat;

  // Of the step that is being enqueued; they keep their memory.
  std::vector<AppendRow> append;
  std::vector<LogitPlace> logit_places;  // of each row

  Status CheckUsable(const char* what) const;
  Status CreateFlights();
  Status CaptureGraphs();
  Status EnqueueModel();
  Status Launch(const std::vector<StepRow>& rows, bool count_experts);
  Status CopyLogits(const std::vector<StepRow>& rows);
  Status Enqueue(const std::vector<StepRow>& rows, bool count_experts);
  void Finish(const Flight& flight);
  void Reserve(StepStats* stats) const;
  void TakeResults(Flight* flight, std::vector<StepRowResult>* results,
                   StepStats* stats);
  void Recover() noexcept;
};

}  // namespace tenon

#endif  // TENON_ENGINE_SESSION_IMPL_H_
