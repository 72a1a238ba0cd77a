#ifndef TENON_ENGINE_STEP_ROWS_H_
#define TENON_ENGINE_STEP_ROWS_H_

#include <cstdint>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/session.h"
#include "engine/step_buffers.h"
#include "engine/step_graphs.h"
#include "ops/core/status.h"

// From the rows that a caller gives to the arrays that a step reads.

namespace tenon {

// The tokens that a step drew: of which sequences, and where among its results
// they are.
struct DrawnTokens {
  std::vector<SequenceId> sequences;  // of each row
  std::vector<int32_t> places;        // -1: a row that was not sampled

  // Of the sequence's token; -1: there is none. `hint`: the row to look at
  // first.
  int32_t Find(SequenceId sequence, size_t hint) const;
  void Reserve(size_t rows) {
    sequences.reserve(rows);
    places.reserve(rows);
  }
  void Clear() {
    sequences.clear();
    places.clear();
  }
};

// Checks what needs no cache, which checks sequences and pages. `before` are
// the tokens of the last step.
Status CheckStepRows(const std::vector<StepRow>& rows,
                     const SessionOptions& options, int64_t vocab_size,
                     const DrawnTokens& before);

// The shape of a decode step of `rows` rows, padding included.
StepShape DecodeShape(int32_t rows);

// The shape of the step that runs the rows: a decode step, where all have one
// token and there is a bucket for them.
StepShape ShapeOf(const std::vector<StepRow>& rows,
                  const DecodeBuckets& buckets);

// The mirostat state of sequences on the device: each slot has two places, so
// that a step that fails leaves what it has read.
class MirostatStates {
 public:
  void Reserve(int32_t slots) { places_.assign(slots, -1); }

  // Where mu is, -1 where there is none yet, and where a step leaves the next.
  MirostatPlaces Find(SequenceId sequence) const {
    const int32_t first = 2 * static_cast<int32_t>(sequence.slot);
    const int32_t from = places_[sequence.slot];
    return {from, from == first ? first + 1 : first};
  }
  // Of a step that has succeeded, or a copy.
  void Moved(SequenceId sequence, int32_t to) { places_[sequence.slot] = to; }
  void Forget(SequenceId sequence) { places_[sequence.slot] = -1; }

 private:
  std::vector<int32_t> places_;  // of each slot
};

// Where the logits of a row are, as rows of the matrix of all; of those that
// are sampled also where their token is.
struct LogitPlace {
  int32_t last = -1;      // of its last token; -1: not computed
  int32_t others = -1;    // from where on those before it are, with kAll
  int32_t mirostat = -1;  // where its mu is left; -1: a row without mirostat
};
// The logits that a row asks for or is sampled from.
int32_t NumLogitRows(const StepRow& row);

// Fills the host side of `buffers`, which has the rows' shape, and `places`,
// one for each row, for an append that is committed.
void FillStep(const std::vector<StepRow>& rows, const KvCache& cache,
              const DrawnTokens& before, const MirostatStates& mirostat,
              StepBuffers* buffers, std::vector<LogitPlace>* places);

}  // namespace tenon

#endif  // TENON_ENGINE_STEP_ROWS_H_
