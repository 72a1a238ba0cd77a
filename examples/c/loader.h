#ifndef TENON_EXAMPLES_C_LOADER_H_
#define TENON_EXAMPLES_C_LOADER_H_

/* Opens libtenon.so at run time, for programs that must start without it too.
 * Programs that always need it just link with -ltenon. */

#include <tenon/tenon.h>

/* What this program calls; add what yours does. */
#define TENON_FUNCTIONS(X)             \
  X(abi_version)                       \
  X(version_string)                    \
  X(status_name)                       \
  X(context_create)                    \
  X(context_destroy)                   \
  X(embedding)                         \
  X(rms_norm)                          \
  X(linear_workspace_size)             \
  X(linear)                            \
  X(quantize_fp8)                      \
  X(qk_norm)                           \
  X(attention_workspace_size)          \
  X(attention)                         \
  X(moe_router)                        \
  X(moe_align_workspace_size)          \
  X(moe_align)                         \
  X(moe_grouped_matmul_workspace_size) \
  X(moe_grouped_matmul)                \
  X(moe_swiglu)                        \
  X(moe_sum_reduce)                    \
  X(moe_workspace_size)                \
  X(moe)                               \
  X(sampler_workspace_size)            \
  X(sampler)                           \
  X(model_load)                        \
  X(model_destroy)                     \
  X(session_create)                    \
  X(session_destroy)                   \
  X(sequence_create)                   \
  X(sequence_release)                  \
  X(session_step)                      \
  X(session_enqueue_step)              \
  X(session_wait_step)

/* tenon_abi_version() is library.abi_version(), and so on. The types are those
 * of the header's declarations. */
typedef struct tenon_library {
  void* handle;
#define TENON_MEMBER(name) __typeof__(&tenon_##name) name;
  TENON_FUNCTIONS(TENON_MEMBER)
#undef TENON_MEMBER
} tenon_library;

/* Opens `path`, or where that is NULL libtenon.so.1 as the dynamic linker finds
 * it. Returns 0; or -1 with the reason as a sentence, and nothing is open. */
int tenon_library_open(const char* path, tenon_library* library, char* reason,
                       size_t reason_size);

void tenon_library_close(tenon_library* library);

#endif /* TENON_EXAMPLES_C_LOADER_H_ */
