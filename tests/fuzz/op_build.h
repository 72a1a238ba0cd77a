#ifndef TENON_TESTS_FUZZ_OP_BUILD_H_
#define TENON_TESTS_FUZZ_OP_BUILD_H_

#include <string>

#include "tests/fuzz/op_case.h"

// What the descriptions of ops are made with.

namespace tenon::fuzz {

inline constexpr DLDataType kFloat32{TENON_DL_FLOAT, 32, 1};
inline constexpr DLDataType kInt32{TENON_DL_INT, 32, 1};
inline constexpr DLDataType kInt64{TENON_DL_INT, 64, 1};
inline constexpr DLDataType kUInt8{TENON_DL_UINT, 8, 1};
inline constexpr DLDataType kFloat8{TENON_DL_FLOAT8_E4M3FN, 8, 1};

inline DLDataType FloatType(Input& in) {
  return in.Pick<DLDataType>(
      {kFloat32, {TENON_DL_FLOAT, 16, 1}, {TENON_DL_BFLOAT, 16, 1}});
}

inline DLDataType IndexType(Input& in) { return in.OneIn(2) ? kInt32 : kInt64; }

inline int64_t NumTokens(Input& in) {
  return in.Pick<int64_t>({0, 1, 2, 3, 5});
}

inline uint32_t Flags(Input& in) {
  return in.OneIn(2) ? TENON_FLAG_BATCH_INVARIANT : 0;
}

template <class Args>
Args Zeroed() {
  Args args = {};
  args.struct_size = sizeof(args);
  return args;
}

// Functions of one signature for all ops.
template <class Args, auto Function>
int32_t Run(tenon_context context, const void* args, void* stream,
            tenon_error* error) {
  return Function(context, static_cast<const Args*>(args), stream, error);
}
template <class Args, auto Function>
int32_t Query(tenon_context context, const void* args, uint64_t* bytes,
              tenon_error* error) {
  return Function(context, static_cast<const Args*>(args), bytes, error);
}

// A field of the struct that Args stands for.
#define FIELD(kind, name) \
  Field { FieldKind::kind, #name, offsetof(Args, name) }
// A tensor of which some parts are not used.
#define PARTLY(kind, name) \
  Field { FieldKind::kind, #name, offsetof(Args, name), false }

// Those of ops_moe.cc; the others are in ops.cc.
Op MoeRouter();
Op MoeAlign();
Op MoeGroupedMatmul();
Op MoeSwiGlu();
Op MoeSumReduce();
Op Moe();

}  // namespace tenon::fuzz

#endif  // TENON_TESTS_FUZZ_OP_BUILD_H_
