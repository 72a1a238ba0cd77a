#ifndef TENON_ENGINE_EXPERT_COUNTER_H_
#define TENON_ENGINE_EXPERT_COUNTER_H_

#include <cstdint>
#include <vector>

#include "engine/activations.h"
#include "engine/model_config.h"
#include "ops/core/memory.h"
#include "ops/core/status.h"
#include "ops/core/stream.h"

namespace tenon {

// Counts the distinct experts that the tokens of a step chose in each sparse
// layer. Allocates nothing once it is created.
class ExpertCounter {
 public:
  ExpertCounter() = default;  // counts nothing
  // `activations` keep the choices of all layers; both are to outlive this.
  static StatusOr<ExpertCounter> Create(const ModelConfig& config,
                                        const Activations& activations);

  // Copies what was chosen in a step of `tokens` tokens, padding included, to
  // the host, in stream order.
  Status Enqueue(int64_t tokens, Stream stream);

  // Of a step that has no tokens, and so no Enqueue.
  void Clear() { ids_per_layer_ = 0; }

  // Of each sparse layer, in order, after a synchronisation; overwrites
  // `counts`, which needs room for as many.
  void Count(std::vector<int32_t>* counts);
  int32_t num_layers() const;  // sparse ones

 private:
  const ModelConfig* config_ = nullptr;
  const Activations* activations_ = nullptr;
  int64_t ids_per_layer_ = 0;
  Buffer ids_;                 // of the host: layer after layer
  std::vector<char> is_used_;  // each expert, of one layer
};

}  // namespace tenon

#endif  // TENON_ENGINE_EXPERT_COUNTER_H_
