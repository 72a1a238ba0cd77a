#ifndef TENON_ABI_CALL_H_
#define TENON_ABI_CALL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

#include "abi/tenon.h"
#include "ops/core/status.h"

// What every exported function does around its work: reading self-describing
// structs, and turning a Status into a code and a tenon_error.

namespace tenon::abi {

// Fills `error`, if there is one with room, and returns the code. The message
// begins with `function`, which takes the place of the op's C++ name where the
// status has one ("RmsNorm: x ..." becomes "tenon_rms_norm: x ..."). Allocates
// nothing.
int32_t Report(const char* function, const Status& status, tenon_error* error);
int32_t Report(const char* function, int32_t code, const char* message,
               tenon_error* error);

// Runs body(), which returns a Status, on behalf of an exported function.
// Nothing that it throws gets past.
template <class Body>
int32_t Call(const char* function, tenon_error* error, Body&& body) noexcept {
  try {
    const Status status = body();
    return Report(function, status, error);
  } catch (const std::bad_alloc&) {
    return Report(function, TENON_RESOURCE_EXHAUSTED, "out of host memory",
                  error);
  } catch (const std::exception& exception) {
    return Report(function, TENON_INTERNAL, exception.what(), error);
  } catch (...) {
    return Report(function, TENON_INTERNAL, "unknown exception", error);
  }
}

// A struct's size in the first ABI version that had it: the least that a caller
// can pass. Structs that have grown since say so here; tests/abi compares with
// the headers of all versions.
template <class Struct>
inline constexpr size_t kFirstSize = sizeof(Struct);
template <>
inline constexpr size_t kFirstSize<tenon_context_info> =
    offsetof(tenon_context_info, num_moe_kernels);
template <>
inline constexpr size_t kFirstSize<tenon_session_options> =
    offsetof(tenon_session_options, kv_cache_bytes);
template <>
inline constexpr size_t kFirstSize<tenon_session_info> =
    offsetof(tenon_session_info, kv_cache_bytes);
template <>
inline constexpr size_t kFirstSize<tenon_linear_args> =
    offsetof(tenon_linear_args, weight_scales);
template <>
inline constexpr size_t kFirstSize<tenon_moe_grouped_matmul_args> =
    offsetof(tenon_moe_grouped_matmul_args, weight_scales);
template <>
inline constexpr size_t kFirstSize<tenon_moe_args> = offsetof(tenon_moe_args,
                                                              gate_scales);
template <>
inline constexpr size_t kFirstSize<tenon_step_row> = offsetof(tenon_step_row,
                                                              edits);
template <>
inline constexpr size_t kFirstSize<tenon_step_args> = offsetof(tenon_step_args,
                                                               mirostat_mu);
template <>
inline constexpr size_t kFirstSize<tenon_sampler_args> =
    offsetof(tenon_sampler_args, vocab_size);
template <>
inline constexpr size_t kFirstSize<tenon_model_load_args> =
    offsetof(tenon_model_load_args, weights);

// The longest struct that a caller may claim to have; more is taken for
// garbage, and not read.
inline constexpr size_t kMaxStructSize = 4096;

// Copies a caller's struct of its own length over a zeroed one of ours. Fails
// for null, for a size that no version has, and for set bytes that this version
// does not know. `name` is the argument's, for messages.
Status ReadStruct(const char* name, const void* from, size_t first_size,
                  size_t known_size, void* to);

template <class Struct>
Status ReadStruct(const char* name, const Struct* from, Struct* to) {
  uint32_t size = 0;
  if (from != nullptr) std::memcpy(&size, from, sizeof(size));
  if (size == sizeof(Struct)) {  // as nearly always: without a call
    std::memcpy(to, from, sizeof(Struct));
    return Status();
  }
  return ReadStruct(name, from, kFirstSize<Struct>, sizeof(Struct), to);
}

// The other direction: fills a caller's struct, as far as it goes, and keeps
// its struct_size. What we do not know becomes zero.
Status WriteStruct(const char* name, const void* from, size_t first_size,
                   size_t known_size, void* to);

template <class Struct>
Status WriteStruct(const char* name, const Struct& from, Struct* to) {
  return WriteStruct(name, &from, kFirstSize<Struct>, sizeof(Struct), to);
}

// Requires a reserved field to be zero, an output parameter to be there.
Status CheckReserved(const char* field, uint64_t value);
Status CheckPresent(const char* name, const void* pointer);

}  // namespace tenon::abi

#endif  // TENON_ABI_CALL_H_
