#ifndef TENON_EXAMPLES_C_OPS_H_
#define TENON_EXAMPLES_C_OPS_H_

#include "loader.h"
#include "vectors.h"

/* Runs the op of a case, with as much workspace as it asks for. Returns what
 * the library does; TENON_UNIMPLEMENTED for an op that is not known here. */
int32_t run_op(const tenon_library* library, tenon_context context,
               const struct test_case* test, tenon_error* error);

#endif /* TENON_EXAMPLES_C_OPS_H_ */
