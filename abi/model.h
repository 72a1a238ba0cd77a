#ifndef TENON_ABI_MODEL_H_
#define TENON_ABI_MODEL_H_

#include <memory>

#include "engine/model.h"

namespace tenon::abi {

// What a tenon_model names. Sessions share the model itself, so that it
// outlives its handle.
struct ModelObject {
  std::shared_ptr<const Model> model;
};

}  // namespace tenon::abi

#endif  // TENON_ABI_MODEL_H_
