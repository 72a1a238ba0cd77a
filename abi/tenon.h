#ifndef TENON_H_
#define TENON_H_

/* Tenon's C interface: transformer building blocks for Mixture-of-Experts
 * models, and an engine made of them, in one libtenon.so. C99 and C++11.
 *
 * Conventions
 *
 * Results. Functions return a TENON_* status code; TENON_OK is 0. The last
 * parameter is an optional tenon_error (NULL: not wanted) that receives the
 * code and a message naming function, field and value. There is no thread-local
 * state and nothing to free. Output parameters are written on success alone.
 * Nothing throws, aborts, exits, prints, installs handlers or reads the
 * environment.
 *
 * Structs. Every struct that is passed begins with struct_size, which the
 * caller sets to sizeof of the struct as it was compiled, after zeroing the
 * whole: tenon_rms_norm_args args = {0}; args.struct_size = sizeof(args);
 * (A size that is no multiple of 8, as no version's is, is refused.)
 * Fields are only ever appended. What a caller's struct is too short to hold
 * reads as zero, and zero means the behaviour before the field existed. A
 * struct longer than the library knows is accepted as long as the part that it
 * does not know is zero, else the call is TENON_UNIMPLEMENTED: a new feature is
 * never ignored silently. Fields named reserved must be zero. The exceptions
 * are tenon_sampling_params and tenon_logit_edit, of fixed size, because arrays
 * of them live on devices.
 *
 * Codes, constants and functions are never renumbered, changed or removed while
 * the major ABI version, which is the SONAME, stays. tenon_abi_version() tells
 * a client whether a library that it has opened is new enough.
 *
 * Tensors are borrowed for the call: const DLTensor*, NULL for optional ones
 * that are not given. Strides and byte_offset are honoured; strides of NULL
 * mean compact and row-major. Shapes below are written [rows, columns]; unless
 * said otherwise the last dimension is contiguous and the others may be
 * strided. "float" dtypes are float32, float16 and bfloat16. Data must be
 * aligned to its element; 16 bytes, in every row, is fast.
 *
 * Memory. Ops work in memory of the caller and allocate nothing. Where scratch
 * is needed, tenon_<op>_workspace_size() says how much: an upper bound that
 * depends on shapes, dtypes and device alone and does not shrink when there are
 * more tokens, so one query for the largest call is enough. It ignores data
 * pointers. Workspaces are aligned to 256 bytes (64 on the CPU).
 *
 * Streams. `stream` is a cudaStream_t (CUstream) for tensors on a CUDA device;
 * NULL is the legacy default stream. Ops enqueue there and return: they never
 * synchronise, and can be captured in a CUDA graph. On CPU tensors `stream`
 * must be NULL and the op is done when the call returns. Results are
 * deterministic: the same call gives the same bits, and a row does not depend
 * on the content of other rows.
 *
 * Checks. Everything that the host can know is checked before any work is
 * enqueued: a call that fails has changed nothing. The content of device memory
 * (ids, positions, lengths) cannot be checked; each op says what it does with
 * values out of range, and it never accesses memory outside its tensors.
 *
 * Handles are 64-bit numbers, never 0. A handle that was destroyed, is of
 * another kind, or never existed is TENON_NOT_FOUND: numbers are not reused
 * while the process lives. At most 4096 contexts, models and sessions exist at
 * once. Destroying 0 is TENON_OK and does nothing. A handle that is in use by
 * another thread when it is destroyed lives until that call returns. After
 * fork() all handles are TENON_FAILED_PRECONDITION in the child.
 *
 * Threads. TENON_THREAD(any): any number of threads at a time, also on one
 * handle. TENON_THREAD(turns): the same, but calls on one session take turns.
 */

#include <stddef.h>
#include <stdint.h>

#include "tenon_dlpack.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef TENON_API
#define TENON_API __attribute__((visibility("default")))
#endif
#define TENON_THREAD(rule) /* for readers and binding generators */

/* ------------------------------------------------------------------ Basics */

/* This header's version; tenon_abi_version() has the library's. */
#define TENON_ABI_MAJOR 1
#define TENON_ABI_MINOR 4

/* Status codes; equal to absl::StatusCode and to gRPC's. */
#define TENON_OK 0
#define TENON_CANCELLED 1
#define TENON_UNKNOWN 2
#define TENON_INVALID_ARGUMENT 3
#define TENON_DEADLINE_EXCEEDED 4
#define TENON_NOT_FOUND 5
#define TENON_ALREADY_EXISTS 6
#define TENON_PERMISSION_DENIED 7
#define TENON_RESOURCE_EXHAUSTED 8
#define TENON_FAILED_PRECONDITION 9
#define TENON_ABORTED 10
#define TENON_OUT_OF_RANGE 11
#define TENON_UNIMPLEMENTED 12
#define TENON_INTERNAL 13
#define TENON_UNAVAILABLE 14
#define TENON_DATA_LOSS 15
#define TENON_UNAUTHENTICATED 16

/* Opaque handles. */
typedef uint64_t tenon_context;
typedef uint64_t tenon_model;
typedef uint64_t tenon_session;
typedef uint64_t tenon_sequence;

/* Where a status is told. The library writes code and message and never more
 * than struct_size bytes; a message that is too long is cut. A struct_size that
 * leaves no room for code means that nothing is written. */
typedef struct tenon_error {
  uint32_t struct_size;
  int32_t code;      /* what the function returned */
  char message[512]; /* ends with a zero byte; empty for TENON_OK */
} tenon_error;

/* (major << 16) | minor of the library. A client works with every library of
 * its own major version and at least its own minor version. */
TENON_THREAD(any) TENON_API uint32_t tenon_abi_version(void);

/* The release, such as "0.1.0". A constant. */
TENON_THREAD(any) TENON_API const char* tenon_version_string(void);

/* "INVALID_ARGUMENT" for TENON_INVALID_ARGUMENT; "UNKNOWN" for a number that is
 * no code. A constant. */
TENON_THREAD(any) TENON_API const char* tenon_status_name(int32_t code);

/* ----------------------------------------------------------------- Devices */

#define TENON_DEVICE_CPU 1 /* as in DLDevice */
#define TENON_DEVICE_CUDA 2

#define TENON_CPU_ISA_GENERIC 1
#define TENON_CPU_ISA_AVX2 2
#define TENON_CPU_ISA_AVX512 3

typedef struct tenon_device_info {
  uint32_t struct_size;
  int32_t device_type; /* out, from here on */
  int32_t device_index;
  int32_t num_cores;          /* multiprocessors; usable CPUs on the CPU */
  int32_t compute_capability; /* 90 for 9.0; 0 on the CPU */
  int32_t cpu_isa;            /* TENON_CPU_ISA_*; 0 on CUDA */
  int64_t total_memory_bytes;
  int64_t l2_bytes; /* last-level cache on the CPU; 0: unknown */
  char name[128];
} tenon_device_info;

/* Devices of a type that this library can use: 1 for the CPU; 0 for CUDA where
 * there is no driver or the library was built without CUDA. */
TENON_THREAD(any)
TENON_API int32_t tenon_device_count(int32_t device_type, int32_t* count,
                                     tenon_error* error);

/* TENON_UNAVAILABLE where there is no such device. */
TENON_THREAD(any)
TENON_API int32_t tenon_device_query(int32_t device_type, int32_t device_index,
                                     tenon_device_info* info,
                                     tenon_error* error);

/* ---------------------------------------------------------------- Contexts */

#define TENON_CUBLAS_LT_IF_FOUND 0
#define TENON_CUBLAS_LT_OFF 1
#define TENON_CUBLAS_LT_REQUIRED 2 /* else tenon_context_create fails */

typedef struct tenon_context_options {
  uint32_t struct_size;
  int32_t device_type; /* TENON_DEVICE_* */
  int32_t device_index;
  int32_t num_threads; /* CPU: threads of an op, the caller's included; 0: one
                          for each usable CPU. CUDA: must be 0. */
  int32_t cublas_lt;   /* TENON_CUBLAS_LT_*; CPU: must be 0 */
  int32_t reserved;
} tenon_context_options;

typedef struct tenon_context_info {
  uint32_t struct_size;
  int32_t device_type; /* out, from here on */
  int32_t device_index;
  int32_t num_threads;
  uint64_t cublas_lt_version; /* such as 130100; 0: cuBLASLt is not used */
  /* Since ABI 1.3. */
  int32_t num_moe_kernels; /* rows that tenon_context_set_moe_kernels gave */
  int32_t reserved;
} tenon_context_info;

/* What ops of a device share: the CPU's threads, cuBLASLt, measured sizes of
 * kernels. Ops take 0 as well: then CPU ops run on the calling thread alone and
 * CUDA ops use the library's own kernels. CPU ops of several threads on one
 * context take turns on its threads. */
TENON_THREAD(any)
TENON_API int32_t tenon_context_create(const tenon_context_options* options,
                                       tenon_context* context,
                                       tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_context_query(tenon_context context,
                                      tenon_context_info* info,
                                      tenon_error* error);
/* Since ABI 1.3: sizes of tenon_moe's expert kernels on this GPU, in place of
 * those built in: the text of a file that tools/tune wrote. No bit of a result
 * depends on them. The CPU has none, but checks the text. Once for a context,
 * also while others use it.
 *   TENON_INVALID_ARGUMENT     a text that is no such file
 *   TENON_FAILED_PRECONDITION  the context has some already */
TENON_THREAD(any)
TENON_API int32_t tenon_context_set_moe_kernels(tenon_context context,
                                                const char* json,
                                                tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_context_destroy(tenon_context context,
                                        tenon_error* error);

/* --------------------------------------------------------------------- Ops
 *
 * All take a context (or 0), whose device the tensors must be on, and all
 * tensors of a call are on one device. Errors of every op:
 *   TENON_INVALID_ARGUMENT  a field breaks the rules written at its struct
 *   TENON_NOT_FOUND         the context
 *   TENON_UNIMPLEMENTED     this library has no kernel for the device, or a
 *                           field that it does not know is set
 *   TENON_UNAVAILABLE       the device reports an error
 * Zero tokens (rows) are TENON_OK and launch nothing.
 */

/* Bits of `flags`. */

/* A row does not depend, bit for bit, on how many others there are either. On
 * the CPU that always holds. */
#define TENON_FLAG_BATCH_INVARIANT 1u

/* How a norm applies its weight; models were trained with either. */
#define TENON_ROUNDING_FLOAT32_MULTIPLY 0 /* round(x * inv_rms * weight) */
#define TENON_ROUNDING_CAST_THEN_MULTIPLY \
  1 /* round(round(x * inv_rms) * weight), as Hugging Face's modules do */

/* out[t] = table[ids[t]], bit for bit; zeros for an id outside the table.
 * out overlaps no input. */
typedef struct tenon_embedding_args {
  uint32_t struct_size;
  uint32_t reserved;
  const DLTensor* ids;   /* [tokens] int32 or int64 */
  const DLTensor* table; /* [vocab_size, hidden] float */
  const DLTensor* out;   /* [tokens, hidden], dtype of table */
} tenon_embedding_args;

TENON_THREAD(any)
TENON_API int32_t tenon_embedding(tenon_context context,
                                  const tenon_embedding_args* args,
                                  void* stream, tenon_error* error);

/* Root-mean-square norm of every row, optionally after adding to a residual:
 *   residual given: residual += x, v = residual; else v = x
 *   out = v / sqrt(mean(v^2) + epsilon) * weight
 * Aliasing: out may be x; residual overlaps neither.
 * Numerics: the sum with the residual is rounded to the dtype once and the norm
 * is of the rounded sum; squares accumulate in float32. */
typedef struct tenon_rms_norm_args {
  uint32_t struct_size;
  int32_t rounding;         /* TENON_ROUNDING_* */
  const DLTensor* x;        /* [tokens, hidden] float */
  const DLTensor* residual; /* like x, in/out, optional */
  const DLTensor* weight;   /* [hidden], dtype of x or float32 */
  const DLTensor* out;      /* like x */
  float epsilon;            /* > 0, finite */
  uint32_t reserved;
} tenon_rms_norm_args;

TENON_THREAD(any)
TENON_API int32_t tenon_rms_norm(tenon_context context,
                                 const tenon_rms_norm_args* args, void* stream,
                                 tenon_error* error);

/* out = x * weight^T + bias. out overlaps no input.
 * Numerics: products and sums in float32 (no TF32), one rounding. Through
 * cuBLASLt, where the context has it and TENON_FLAG_BATCH_INVARIANT is not set,
 * the order of the sum may depend on the number of tokens. The first call of a
 * shape then looks up an algorithm on the host, which allocates.
 *
 * fp8 weights (of this op and of the MoE ops), whatever the dtype of x: element
 * * scale is what they stand for, with a scale for each block of 128 x 128 (the
 * last ones may be partial) or for each row. x is quantised as by
 * tenon_quantize_fp8 with blocks of 1 x 128. For every 128 of the depth,
 * products and sum are in float32 (in the accumulators of tensor cores), times
 * activation scale and block scale, added in float32 in ascending order; a
 * scale per row multiplies the end result. */
typedef struct tenon_linear_args {
  uint32_t struct_size;
  uint32_t flags;
  const DLTensor* x;      /* [tokens, in_features] float */
  const DLTensor* weight; /* [out_features, in_features], dtype of x or, since
                             ABI 1.2, float8_e4m3fn */
  const DLTensor* bias;   /* [out_features], dtype of x, optional */
  const DLTensor* out;    /* [tokens, out_features], dtype of x or float32 */
  void* workspace;
  uint64_t workspace_size; /* bytes */
  /* Since ABI 1.2. */
  const DLTensor* weight_scales; /* of float8_e4m3fn weight: float32
                                    [ceil(out_features / 128),
                                    ceil(in_features / 128)] or
                                    [out_features] */
} tenon_linear_args;

TENON_THREAD(any)
TENON_API int32_t tenon_linear_workspace_size(tenon_context context,
                                              const tenon_linear_args* args,
                                              uint64_t* bytes,
                                              tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_linear(tenon_context context,
                               const tenon_linear_args* args, void* stream,
                               tenon_error* error);

/* Quantises to float8_e4m3fn with a scale for each block, so that element *
 * scale is about x (since ABI 1.2):
 *   amax  = max(largest |x| of the block, 1e-10)
 *   scale = amax / 448
 *   out   = e4m3(x * (448 / amax))
 * Blocks of block_rows x block_cols: 1 x 128 (activations), 128 x 128 (weights,
 * as published fp8 models have them), 1 x 0 (a scale per row); the last ones
 * may be partial. out and scales overlap neither each other nor x.
 * Numerics: float32, one rounding to nearest even, saturating; NaN stays NaN
 * and does not count for amax. The same bits on every device. */
typedef struct tenon_quantize_fp8_args {
  uint32_t struct_size;
  int32_t block_rows; /* 1 or 128 */
  int32_t block_cols; /* 128; 0: all columns, with block_rows 1 */
  uint32_t reserved;
  const DLTensor* x;      /* [rows, cols] float */
  const DLTensor* out;    /* [rows, cols] float8_e4m3fn */
  const DLTensor* scales; /* float32 [ceil(rows / block_rows),
                             ceil(cols / block_cols)], or [rows] with
                             block_cols 0 */
} tenon_quantize_fp8_args;

TENON_THREAD(any)
TENON_API int32_t tenon_quantize_fp8(tenon_context context,
                                     const tenon_quantize_fp8_args* args,
                                     void* stream, tenon_error* error);

/* Attention pre-processing in one launch, in place: RMSNorm of every Q and K
 * head, then the rotary embedding (with cos_sin), then the write of K and V
 * into the paged cache (with k_cache): head = head / sqrt(mean(head^2) +
 * epsilon) * weight Packed form: qkv holds the heads of Q from element q_offset
 * of a row on, K from k_offset, V from v_offset. Strided form: q and k (and v)
 * instead, with free token and head strides; the counts then come from their
 * shapes, and offsets and counts must be 0. V is read for a cache write alone.
 * head_dim is 64, 128 or 256.
 *
 * Rotary embedding (NeoX): element i of the first half of the rotated
 * dimensions pairs with element i of the second: a' = a cos - b sin, b' = b cos
 * + a sin. Heads of a token whose position is outside cos_sin are not rotated.
 * Cache write: slot = page * page_size + offset in the page; a negative slot,
 * or one past the cache, is skipped. float8 caches store value / scale.
 *
 * Aliasing: tensors that are written share no memory with others (slices that
 * interleave are fine). Elements outside Q and K keep their bytes.
 * Numerics: float32 throughout; with rotation the normalised values are rounded
 * to the dtype first, then rotated in float32 and rounded once; float8 values
 * are rounded to nearest even and saturate at 448. */
typedef struct tenon_qk_norm_args {
  uint32_t struct_size;
  int32_t rounding;    /* TENON_ROUNDING_* */
  const DLTensor* qkv; /* [tokens, row width] float, in/out */
  int64_t q_offset;    /* in elements */
  int64_t k_offset;
  int64_t v_offset;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  float epsilon;            /* > 0, finite */
  const DLTensor* q;        /* [tokens, num_q_heads, head_dim], in/out */
  const DLTensor* k;        /* [tokens, num_kv_heads, head_dim], in/out */
  const DLTensor* v;        /* like k */
  const DLTensor* q_weight; /* [head_dim], dtype of q or float32 */
  const DLTensor* k_weight;
  const DLTensor* cos_sin;   /* [max_positions, rotary_dim] float32: cosines
                                of the rotary_dim / 2 frequencies, then
                                sines; optional */
  const DLTensor* positions; /* [tokens] int32 or int64; with cos_sin */
  const DLTensor* k_cache;   /* [num_pages, page_size, num_kv_heads,
                                head_dim], dtype of q or float8_e4m3fn;
                                optional, with v_cache */
  const DLTensor* v_cache;
  const DLTensor* slot_mapping; /* [tokens] int64; with k_cache */
  float k_scale;                /* of float8 caches, > 0; otherwise 0 or 1 */
  float v_scale;
  int32_t rotary_dim; /* even, 2 to head_dim; with cos_sin */
  uint32_t reserved;
} tenon_qk_norm_args;

TENON_THREAD(any)
TENON_API int32_t tenon_qk_norm(tenon_context context,
                                const tenon_qk_norm_args* args, void* stream,
                                tenon_error* error);

/* Causal grouped-query attention over a paged KV cache, for a ragged batch.
 * Sequence s has queries query_start[s] to query_start[s + 1] - 1, its last
 * ones: with n of them and kv_len[s] cached tokens (their own K and V
 * included), query i attends to positions 0 to kv_len[s] - n + i. Query head h
 * reads KV head h / (num_heads / num_kv_heads). out = softmax(q * k^T * scale)
 * * v head_dim is 64, 128 or 256; num_heads is a multiple of num_kv_heads;
 * page_size is 1 to 65536. A block_table entry outside the cache reads page 0;
 * lengths are cut to the bounds; queries at negative positions and tokens of no
 * sequence get zeros.
 * Aliasing: out may be q.
 * Numerics: float32 scores, softmax and sums (half-precision probabilities feed
 * the tensor cores), one rounding. On CUDA, without TENON_FLAG_BATCH_INVARIANT,
 * how a long context is cut into parts depends on the number of queries. */
typedef struct tenon_attention_args {
  uint32_t struct_size;
  uint32_t flags;
  const DLTensor* q;       /* [tokens, num_heads, head_dim] float */
  const DLTensor* k_cache; /* [num_pages, page_size, num_kv_heads, head_dim],
                              dtype of q or float8_e4m3fn */
  const DLTensor* v_cache; /* like k_cache */
  const DLTensor* block_table; /* [num_seqs, max_pages] int32 */
  const DLTensor* query_start; /* [num_seqs + 1] int32 */
  const DLTensor* kv_len;      /* [num_seqs] int32 */
  const DLTensor* out;         /* like q */
  float scale;                 /* usually 1 / sqrt(head_dim); > 0, finite */
  float k_scale;               /* of float8 caches, > 0; otherwise 0 or 1 */
  float v_scale;
  int32_t max_kv_len;    /* upper bounds that the host knows: of kv_len; 0:
                            max_pages * page_size */
  int32_t max_query_len; /* of the queries of one sequence (1: decode alone); 0:
                            tokens */
  uint32_t reserved;
  void* workspace;
  uint64_t workspace_size; /* bytes */
} tenon_attention_args;

TENON_THREAD(any)
TENON_API int32_t tenon_attention_workspace_size(
    tenon_context context, const tenon_attention_args* args, uint64_t* bytes,
    tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_attention(tenon_context context,
                                  const tenon_attention_args* args,
                                  void* stream, tenon_error* error);

#define TENON_SCORING_SOFTMAX 0
#define TENON_SCORING_SIGMOID 1
#define TENON_GROUP_SCORE_MAX 0      /* a group's best expert */
#define TENON_GROUP_SCORE_TOP2_SUM 1 /* the sum of its best two */

/* Chooses top_k experts for each token.
 *   score  = softmax(logits) over all experts, or sigmoid(logits)
 *   choice = score + correction_bias
 *   with num_expert_groups > 1: keep the experts of the best
 *   num_selected_groups, by group_score over choice
 *   ids    = the top_k of choice, best first, ties to the lowest id
 *   weight = score (without bias) / their sum, if renormalize,
 *            * routed_scaling_factor
 *   then num_fused_shared_experts ids num_experts, num_experts + 1, ... with
 *   weight 1
 * num_experts is 1 to 1024, top_k 1 to 32.
 * Numerics: float32. A NaN logit scores 0 and counts as lower than any number:
 * ids are always valid and distinct. */
typedef struct tenon_moe_router_args {
  uint32_t struct_size;
  int32_t top_k;
  const DLTensor* logits;          /* [tokens, num_experts] float */
  const DLTensor* correction_bias; /* [num_experts] float32, optional */
  const DLTensor* topk_weights;    /* [tokens, top_k + num_fused_shared_experts]
                                      float32, out */
  const DLTensor* topk_ids;        /* the same shape, int32, out */
  int32_t scoring;                 /* TENON_SCORING_* */
  int32_t renormalize;             /* 0 or 1 */
  float routed_scaling_factor;     /* 0: 1 */
  int32_t num_expert_groups;       /* 0: 1; divides num_experts */
  int32_t num_selected_groups;     /* 0: 1 */
  int32_t group_score;             /* TENON_GROUP_SCORE_* */
  int32_t num_fused_shared_experts;
  uint32_t reserved;
} tenon_moe_router_args;

TENON_THREAD(any)
TENON_API int32_t tenon_moe_router(tenon_context context,
                                   const tenon_moe_router_args* args,
                                   void* stream, tenon_error* error);

/* Groups (token, choice) pairs by expert: slot s = token * top_k + choice
 * stands at sorted_slots[expert_offsets[e] ... expert_offsets[e + 1] - 1] of
 * its expert e, in ascending order of s. Ids outside 0 to num_experts - 1 ("not
 * on this rank") are skipped; unused entries of sorted_slots are -1. With
 * tiles, also the schedule of a grouped GEMM with tile_rows rows a tile:
 * (expert, tile within the expert, first position in sorted_slots), unused
 * entries with expert -1. */
typedef struct tenon_moe_align_args {
  uint32_t struct_size;
  int32_t num_experts;            /* 1 to 1024 */
  const DLTensor* topk_ids;       /* [tokens, top_k] int32 */
  const DLTensor* expert_offsets; /* [num_experts + 1] int32, out */
  const DLTensor* sorted_slots;   /* [tokens * top_k] int32, out */
  const DLTensor* tiles; /* [at least tenon_moe_max_tiles(), 3] int32, out,
                            optional */
  int32_t tile_rows;     /* with tiles: >= 1 */
  uint32_t reserved;
  void* workspace;
  uint64_t workspace_size; /* bytes */
} tenon_moe_align_args;

/* min(num_slots, ceil((num_slots + num_experts * (tile_rows - 1)) / tile_rows))
 * with num_slots = tokens * top_k; 0 for arguments out of range. */
TENON_THREAD(any)
TENON_API int64_t tenon_moe_max_tiles(int64_t num_slots, int32_t num_experts,
                                      int32_t tile_rows);
TENON_THREAD(any)
TENON_API int32_t tenon_moe_align_workspace_size(
    tenon_context context, const tenon_moe_align_args* args, uint64_t* bytes,
    tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_moe_align(tenon_context context,
                                  const tenon_moe_align_args* args,
                                  void* stream, tenon_error* error);

/* For every slot s of expert e in the CSR of tenon_moe_align:
 *   out[s] = (x[s / slots_per_row] * weights[e]^T + bias[e])
 *            * routing_weights[s]
 * slots_per_row is top_k for the up projection (a row of x for each token) and
 * 1 for the down projection (one for each slot). Rows of skipped slots become
 * zeros. Offsets are cut to the slots and made ascending; entries of
 * sorted_slots that are no slot are skipped; the row of a slot that stands
 * there twice, or not at all, is unspecified. out overlaps no other tensor.
 * Numerics: products and sums in float32, then bias, then the routing weight;
 * one rounding. */
typedef struct tenon_moe_grouped_matmul_args {
  uint32_t struct_size;
  uint32_t flags;
  const DLTensor* x;               /* [ceil(num_slots / slots_per_row), cols]
                                      float */
  const DLTensor* weights;         /* [num_experts, rows, cols], dtype of x or,
                                      since ABI 1.2, float8_e4m3fn */
  const DLTensor* expert_offsets;  /* [num_experts + 1] int32 */
  const DLTensor* sorted_slots;    /* [num_slots] int32 */
  const DLTensor* bias;            /* [num_experts, rows], dtype of x,
                                      optional */
  const DLTensor* routing_weights; /* [num_slots] float32, optional */
  const DLTensor* out;             /* [num_slots, rows], dtype of x */
  int32_t slots_per_row;           /* >= 1 */
  uint32_t reserved;
  void* workspace;
  uint64_t workspace_size; /* bytes */
  /* Since ABI 1.2. */
  const DLTensor* weight_scales; /* of float8_e4m3fn weights (see
                                    tenon_linear_args): float32 [num_experts,
                                    ceil(rows / 128), ceil(cols / 128)] or
                                    [num_experts, rows] */
} tenon_moe_grouped_matmul_args;

TENON_THREAD(any)
TENON_API int32_t tenon_moe_grouped_matmul_workspace_size(
    tenon_context context, const tenon_moe_grouped_matmul_args* args,
    uint64_t* bytes, tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_moe_grouped_matmul(
    tenon_context context, const tenon_moe_grouped_matmul_args* args,
    void* stream, tenon_error* error);

#define TENON_SWIGLU_BLOCKED 0     /* gate 0 .. N-1, then up N .. 2N-1 */
#define TENON_SWIGLU_INTERLEAVED 1 /* gate, up, gate, up, ... */

/* Without limit: out = round(silu(gate)) * up, silu(g) = g / (1 + exp(-g)).
 * With limit > 0 (GPT-OSS): gate = min(gate, limit), up = clamp(up, -limit,
 * limit), out = (up + 1) * gate * sigmoid(alpha * gate).
 * out does not overlap x.
 * Numerics: silu in float32, rounded, then multiplied by up and rounded again;
 * with limit float32 and one rounding. */
typedef struct tenon_moe_swiglu_args {
  uint32_t struct_size;
  int32_t layout;      /* TENON_SWIGLU_* */
  const DLTensor* x;   /* [rows, 2 N] float */
  const DLTensor* out; /* [rows, N], dtype of x */
  float limit;         /* 0: none */
  float alpha;         /* with limit: > 0 */
} tenon_moe_swiglu_args;

TENON_THREAD(any)
TENON_API int32_t tenon_moe_swiglu(tenon_context context,
                                   const tenon_moe_swiglu_args* args,
                                   void* stream, tenon_error* error);

/* out[t] = x[t, 0] + x[t, 1] + ..., in this order, in float32, rounded once.
 * Strides of all dimensions but the last are free. out does not overlap x. */
typedef struct tenon_moe_sum_reduce_args {
  uint32_t struct_size;
  uint32_t reserved;
  const DLTensor* x;   /* [tokens, top_k, hidden] float */
  const DLTensor* out; /* [tokens, hidden], dtype of x */
} tenon_moe_sum_reduce_args;

TENON_THREAD(any)
TENON_API int32_t tenon_moe_sum_reduce(tenon_context context,
                                       const tenon_moe_sum_reduce_args* args,
                                       void* stream, tenon_error* error);

/* The expert part of a mixture-of-experts layer in one call, from the router's
 * choice to the summed output:
 *   h[t, j] = silu(x[t] * gate[e]^T) * (x[t] * up[e]^T),  e = topk_ids[t, j]
 *   out[t]  = sum over j of topk_weights[t, j] * (h[t, j] * down[e]^T)
 * Experts packed as w13 [num_experts, 2 * intermediate, hidden] are given as
 * two views of it. An id outside 0 to num_experts - 1 contributes nothing.
 * num_experts is 1 to 1024, top_k 1 to 32. The workspace is bounded: many
 * tokens are processed in chunks. Aliasing: out may be x, and overlaps nothing
 * else. Numerics: both projections accumulate in float32; h is rounded once;
 * the down projection is multiplied by the routing weight and rounded; the
 * top_k rounded rows are summed in float32 in the order of j and rounded once.
 * fp8 experts (see tenon_linear_args): x is quantised once; h is quantised from
 * float32, with a scale for every 128 of intermediate, instead of rounded.
 * With router, tenon_moe_router(router) is part of the call: topk_weights and
 * topk_ids must be its outputs, and it must choose among num_experts experts,
 * num_fused_shared_experts included. */
typedef struct tenon_moe_args {
  uint32_t struct_size;
  uint32_t flags;
  const DLTensor* x;            /* [tokens, hidden] float */
  const DLTensor* topk_weights; /* [tokens, top_k] float32 */
  const DLTensor* topk_ids;     /* [tokens, top_k] int32 */
  const DLTensor* gate;         /* [num_experts, intermediate, hidden], dtype of
                                   x or, since ABI 1.2 and then up and down
                                   too, float8_e4m3fn */
  const DLTensor* up;           /* like gate */
  const DLTensor* down;         /* [num_experts, hidden, intermediate] */
  const DLTensor* out;          /* like x */
  void* workspace;
  uint64_t workspace_size; /* bytes */
  /* Since ABI 1.2. */
  const DLTensor* gate_scales;         /* of float8_e4m3fn experts: float32
                                          [num_experts, ceil(intermediate / 128),
                                          ceil(hidden / 128)] or [num_experts,
                                          intermediate] */
  const DLTensor* up_scales;           /* like gate_scales */
  const DLTensor* down_scales;         /* [num_experts, ceil(hidden / 128),
                                          ceil(intermediate / 128)] or [num_experts,
                                          hidden] */
  const tenon_moe_router_args* router; /* optional */
} tenon_moe_args;

TENON_THREAD(any)
TENON_API int32_t tenon_moe_workspace_size(tenon_context context,
                                           const tenon_moe_args* args,
                                           uint64_t* bytes, tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_moe(tenon_context context, const tenon_moe_args* args,
                            void* stream, tenon_error* error);

/* In which order filters see the distribution. Edits and masks come before all
 * of them, then top-n-sigma; mirostat is the last.
 *   SEQUENTIAL  temperature, top-k, top-p, min-p, typical-p, XTC, each on what
 *               the one before it kept
 *   JOINT       temperature; top-k, top-p and min-p all on the same; typical-p,
 *               XTC
 *   LLAMA_CPP   top-k, typical-p, top-p, min-p, XTC, temperature (since ABI
 *               1.3) */
#define TENON_FILTER_SEQUENTIAL 0
#define TENON_FILTER_JOINT 1
#define TENON_FILTER_LLAMA_CPP 2

/* Bits of tenon_sampling_params.flags (since ABI 1.3): the row of
 * tenon_sampler_args.bitmask applies; only ids whose edit has TENON_EDIT_ALLOW
 * can be drawn; mirostat goes on from mirostat_mu, in place of what was kept
 * (since ABI 1.4). */
#define TENON_SAMPLING_USE_BITMASK 1u
#define TENON_SAMPLING_ONLY_ALLOWED 2u
#define TENON_SAMPLING_SET_MIROSTAT_MU 4u

/* Since ABI 1.3. */
#define TENON_MAX_TOP_LOGPROBS 20

/* How one row is sampled. All zero is greedy. Of fixed size, without
 * struct_size: ops read arrays of it in device memory. */
typedef struct tenon_sampling_params {
  float temperature;    /* logits are divided by it; 0: greedy */
  int32_t top_k;        /* keep the k best; 0, -1 or >= vocab_size: off */
  float top_p;          /* keep the smallest set of the best with at least this
                           probability; 1: off, 0: the best alone */
  float min_p;          /* keep tokens of at least min_p times the best's
                           probability; 0: off */
  int32_t filter_order; /* TENON_FILTER_* */
  uint32_t reserved0;
  uint64_t seed;     /* of the request */
  uint64_t position; /* of the token in its sequence: one draw for each.
                        tenon_session_step sets it itself. */
  /* Since ABI 1.3. */
  float typical_p;       /* 0 or >= 1: off */
  float top_n_sigma;     /* 0: off */
  float xtc_probability; /* that XTC drops tokens at all; 0: off */
  float xtc_threshold;   /* of probability; above 0.5 XTC is off */
  float mirostat_tau;    /* target surprise in bits; 0: off */
  float mirostat_eta;    /* learning rate */
  /* Of the tokens that the row's edits count. */
  float repetition_penalty; /* 0 or 1: off */
  float frequency_penalty;
  float presence_penalty;
  /* DRY: for who makes a row's edits; tenon_sampler looks past them. */
  float dry_multiplier;       /* 0: off */
  float dry_base;             /* 0: 1.75 */
  int32_t dry_allowed_length; /* 0: 2 */
  int32_t dry_range;          /* last tokens to search; 0: all */
  uint32_t flags;             /* TENON_SAMPLING_* */
  int32_t num_top_logprobs;   /* best tokens to list, at most
                                 TENON_MAX_TOP_LOGPROBS */
  /* Since ABI 1.4. */
  float mirostat_mu; /* with TENON_SAMPLING_SET_MIROSTAT_MU */
  uint32_t reserved[6];
} tenon_sampling_params;

/* Writes {temperature 1, top_p 1, the rest 0}: the model's own distribution. At
 * most `size` bytes are written; size is sizeof(tenon_sampling_params). */
TENON_THREAD(any)
TENON_API int32_t tenon_sampling_params_init(tenon_sampling_params* params,
                                             size_t size, tenon_error* error);

/* TENON_INVALID_ARGUMENT naming a field that is out of range. Host memory. */
TENON_THREAD(any)
TENON_API int32_t tenon_sampling_params_validate(
    const tenon_sampling_params* params, tenon_error* error);

#define TENON_SAMPLE_OK 0
#define TENON_SAMPLE_NO_SUPPORT 1 /* all is -inf or masked; token -1 */
#define TENON_SAMPLE_NON_FINITE 2 /* a NaN that is not masked; token -1 */

/* Bits of tenon_logit_edit.state (since ABI 1.3), above the count of the id in
 * the output. */
#define TENON_EDIT_IN_PROMPT 0x20000000u /* for repetition_penalty */
#define TENON_EDIT_ALLOW 0x40000000u     /* see TENON_SAMPLING_ONLY_ALLOWED */
#define TENON_EDIT_BAN 0x80000000u       /* as if the logit were -inf */

/* What to do with one logit of a row (since ABI 1.3): bad words, allowed ids,
 * minimum tokens, biases, penalties, DRY. In this order: masks, + bias,
 * repetition, frequency and presence penalty, + offset. Of fixed size. */
typedef struct tenon_logit_edit {
  int32_t id;     /* outside the vocabulary: passed over */
  uint32_t state; /* TENON_EDIT_*, and how often the id is in the output */
  float bias;     /* added before the penalties */
  float offset;   /* added after them (DRY) */
} tenon_logit_edit;

/* Puts the edits of one row, host memory, in the order that tenon_sampler needs
 * (since ABI 1.3). TENON_INVALID_ARGUMENT for an id that is there twice.
 * Allocates nothing. */
TENON_THREAD(any)
TENON_API int32_t tenon_logit_edits_sort(tenon_logit_edit* edits, int64_t count,
                                         int64_t vocab_size,
                                         tenon_error* error);

/* Which distribution a logprob is of (since ABI 1.3). */
#define TENON_LOGPROB_UNFILTERED 0 /* edits, masks, temperature applied */
#define TENON_LOGPROB_RAW 1        /* the logits as they are */
#define TENON_LOGPROB_PROCESSED 2  /* what the token was drawn from */

/* What a draw is for (since ABI 1.3): streams of one seed are independent. */
#define TENON_STREAM_TARGET 0
#define TENON_STREAM_DRAFT 1 /* of a draft model */

/* Bits of tenon_sampler_args.flags (since ABI 1.3). FAST: CUDA may use its own
 * exponential, whose bits are those of the GPU's architecture. */
#define TENON_SAMPLER_FAST 1u

/* Draws one token for each row by inversion of the kept distribution's
 * cumulative sum in a fixed order with one Philox uniform keyed by (seed,
 * position): a token depends on logits, parameters, edits, mask, seed and
 * position alone, and is the same on CPU and CUDA. Ties go by (logit
 * descending, id ascending); at least one token is kept. Logits are not
 * modified. Parameters, edits and masks are device data and not checked here
 * (see tenon_sampling_params_validate); bad ones give some token of the
 * vocabulary. vocab_size is 1 to 2^20.
 * Numerics: float32 exponentials, sums in fixed orders or of integers. */
typedef struct tenon_sampler_args {
  uint32_t struct_size;
  uint32_t flags;         /* TENON_SAMPLER_*; 0 before ABI 1.3 */
  const DLTensor* logits; /* [rows, columns] float */
  const DLTensor* params; /* [rows, 128] uint8, compact, aligned to 8 bytes: an
                             array of tenon_sampling_params */
  const DLTensor* tokens; /* [rows] int32, out */
  const DLTensor* logprobs; /* [rows] float32, out, optional: of the tokens,
                               TENON_LOGPROB_UNFILTERED */
  const DLTensor* statuses; /* [rows] int32 TENON_SAMPLE_*, out */
  void* workspace;
  uint64_t workspace_size; /* bytes */
  /* Since ABI 1.3; all tensors are optional. */
  int64_t vocab_size;           /* columns past it are padding; 0: there is none
                                 */
  const DLTensor* edits;        /* [room, 16] uint8, compact, aligned to 16
                                   bytes: tenon_logit_edit, those of a row in the
                                   order of tenon_logit_edits_sort */
  const DLTensor* edit_offsets; /* [rows + 1] int32: the edits of row i are
                                   edit_offsets[i] to edit_offsets[i + 1] - 1;
                                   with edits */
  const DLTensor* bitmask;      /* [rows, at least ceil(vocab_size / 32)] int32:
                                   bit id % 32 of word id / 32 is 1 where the id
                                   may be drawn (XGrammar's layout); of rows with
                                   TENON_SAMPLING_USE_BITMASK */
  const DLTensor* mirostat_mu;  /* [rows] float32, in and out; begins with 2 *
                                   mirostat_tau; without it mirostat is off */
  const DLTensor* random_bits;  /* [rows] int64 in place of random numbers, for
                                   tests */
  const DLTensor* raw_logprobs; /* [rows] float32, out */
  const DLTensor* processed_logprobs; /* [rows] float32, out */
  const DLTensor* top_tokens;         /* [rows, n] int32, out; n at most
                                         TENON_MAX_TOP_LOGPROBS: the min(n,
                                         num_top_logprobs) best, best first, then
                                         -1 */
  const DLTensor* top_logprobs;  /* [rows, n] float32, out; with top_tokens */
  const DLTensor* probabilities; /* [rows, vocab_size] float32, out: what
                                    the token was drawn from */
  int32_t top_logprobs_kind;     /* TENON_LOGPROB_* */
  int32_t random_stream;         /* TENON_STREAM_* */
} tenon_sampler_args;

TENON_THREAD(any)
TENON_API int32_t tenon_sampler_workspace_size(tenon_context context,
                                               const tenon_sampler_args* args,
                                               uint64_t* bytes,
                                               tenon_error* error);
TENON_THREAD(any)
TENON_API int32_t tenon_sampler(tenon_context context,
                                const tenon_sampler_args* args, void* stream,
                                tenon_error* error);

/* Accepts or rejects the drafts of speculative decoding (since ABI 1.3): the
 * tokens that come out have exactly the target model's distribution. Either by
 * target_tokens, what tenon_sampler drew at each place: drafts are accepted
 * while they are equal, and the tokens are those of the same seed without
 * drafts. Or by target_probabilities, what tenon_sampler wrote at each place:
 * draft d with probability q is accepted where u * q < p(d), else the token is
 * drawn from max(0, p - q) (Leviathan et al. 2023); without
 * draft_probabilities q is 1.
 * At most 64 drafts; drafts outside the vocabulary are rejected. */
typedef struct tenon_speculative_args {
  uint32_t struct_size;
  uint32_t reserved;
  const DLTensor* draft_tokens;  /* [sequences, drafts] int32 */
  const DLTensor* num_drafts;    /* [sequences] int32, optional: all */
  const DLTensor* target_tokens; /* [sequences, drafts + 1] int32; or NULL with
                                    the next two */
  const DLTensor* target_probabilities; /* [sequences * (drafts + 1),
                                           vocab_size] float32 */
  const DLTensor* params; /* [sequences, 128] uint8, as of tenon_sampler; seed
                             and position, that of the first draft, count */
  const DLTensor* draft_probabilities; /* [sequences * drafts, vocab_size]
                                          float32, optional */
  const DLTensor* tokens;       /* [sequences, drafts + 1] int32, out: accepted
                                   drafts, one more token, -1 */
  const DLTensor* num_accepted; /* [sequences] int32, out */
  const DLTensor* statuses;     /* [sequences] int32 TENON_SAMPLE_*, out */
} tenon_speculative_args;

TENON_THREAD(any)
TENON_API int32_t tenon_speculative(tenon_context context,
                                    const tenon_speculative_args* args,
                                    void* stream, tenon_error* error);

/* ------------------------------------------------------------------ Engine */

#define TENON_DTYPE_FLOAT32 1
#define TENON_DTYPE_FLOAT16 2
#define TENON_DTYPE_BFLOAT16 3

/* Told now and then how many bytes of the weights are in place; on the thread
 * that loads. A return value other than 0 stops the load: TENON_CANCELLED. Must
 * not throw. */
typedef int32_t (*tenon_progress_fn)(void* user_data, int64_t bytes_done,
                                     int64_t bytes_total);

/* What becomes of a checkpoint's attention projections, experts and dense MLPs
 * that are float32, float16 or bfloat16 (since ABI 1.2). */
#define TENON_WEIGHTS_STORED 0 /* they stay what they are */
#define TENON_WEIGHTS_FP8 1    /* float8_e4m3fn with blocks of 128 x 128 */

typedef struct tenon_model_load_args {
  uint32_t struct_size;
  int32_t device_type; /* TENON_DEVICE_* */
  int32_t device_index;
  int32_t rank;       /* of a tensor-parallel group */
  int32_t world_size; /* 0: 1 */
  uint32_t reserved;
  const char* directory;      /* config.json and safetensors, as Hugging Face
                                 publishes them; UTF-8 */
  tenon_progress_fn progress; /* optional */
  void* progress_user_data;
  /* Since ABI 1.2. */
  int32_t weights; /* TENON_WEIGHTS_* */
  uint32_t reserved1;
} tenon_model_load_args;

/* Reads a checkpoint of Qwen3MoeForCausalLM or Qwen3ForCausalLM. On the CPU the
 * files stay mapped and must not change; on CUDA the weights are uploaded.
 * Since ABI 1.2 also fp8 ones, with the published elements and scales: blocks
 * of 128 x 128 (quantization_config "fp8", weight_scale_inv) or a scale per row
 * ("compressed-tensors", weight_scale).
 *   TENON_NOT_FOUND           a file or a tensor
 *   TENON_DATA_LOSS           a malformed file
 *   TENON_INVALID_ARGUMENT    a config or a tensor that does not fit
 *   TENON_UNIMPLEMENTED       an architecture or feature that is not covered
 *   TENON_RESOURCE_EXHAUSTED  memory, with the bytes needed
 *   TENON_CANCELLED           by progress */
TENON_THREAD(any)
TENON_API int32_t tenon_model_load(const tenon_model_load_args* args,
                                   tenon_model* model, tenon_error* error);

typedef struct tenon_model_random_args {
  uint32_t struct_size;
  int32_t device_type; /* TENON_DEVICE_* */
  int32_t device_index;
  int32_t rank;
  int32_t world_size; /* 0: 1 */
  int32_t dtype;      /* TENON_DTYPE_* */
  uint64_t seed;
  const char* config_json; /* the text of a config.json */
} tenon_model_random_args;

/* A model with random weights, made where they live, for benchmarks. Every
 * device makes the same bits from a seed. With a quantization_config (see
 * tenon_model_load) they are fp8 ones, and dtype is that of all else. */
TENON_THREAD(any)
TENON_API int32_t tenon_model_create_random(const tenon_model_random_args* args,
                                            tenon_model* model,
                                            tenon_error* error);

typedef struct tenon_model_info {
  uint32_t struct_size;
  int32_t device_type; /* out, from here on */
  int32_t device_index;
  int32_t rank;
  int32_t world_size;
  int32_t dtype; /* TENON_DTYPE_* */
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t max_position_embeddings;
  int32_t num_experts; /* 0: a dense model */
  int32_t num_experts_per_tok;
  int32_t bos_token_id; /* -1: none */
  int32_t num_eos_token_ids;
  int32_t eos_token_ids[8]; /* the first of them */
  uint32_t reserved;
  int64_t weight_bytes; /* of this rank */
} tenon_model_info;

TENON_THREAD(any)
TENON_API int32_t tenon_model_query(tenon_model model, tenon_model_info* info,
                                    tenon_error* error);

/* Sessions keep what they need of their model alive. */
TENON_THREAD(any)
TENON_API int32_t tenon_model_destroy(tenon_model model, tenon_error* error);

#define TENON_SESSION_BATCH_INVARIANT                                      \
  1u /* a sequence's tokens do not depend,                                 \
bit for bit, on how its prompt was cut into chunks nor on what else ran in \
its steps; costs some speed on CUDA */
#define TENON_SESSION_COUNT_EXPERTS \
  2u /* for tenon_step_args.distinct_experts */
#define TENON_SESSION_NO_CUDA_GRAPHS                                    \
  4u /* since ABI 1.3: decode steps are not captured, which saves their \
memory; no token depends on it */

#define TENON_SESSION_LOGIT_BITMASKS 8u /* rows may have one; since ABI 1.3 */

/* Since ABI 1.3. FLOAT8_E4M3 halves the memory of the KV cache and what
 * attention reads of it. */
#define TENON_KV_CACHE_MODEL_DTYPE 0
#define TENON_KV_CACHE_FLOAT8_E4M3 1

typedef struct tenon_session_options {
  uint32_t struct_size;
  uint32_t flags;        /* TENON_SESSION_* */
  int32_t max_sequences; /* alive at once, and rows in a step; 0: 32 */
  int32_t max_tokens;    /* new tokens of one step, all rows together; 0: 512 */
  int32_t max_context;   /* tokens of one sequence; 0: 2048, or the model's
                            max_position_embeddings if that is less */
  int32_t page_size;     /* tokens of a KV-cache page; 0: 16 */
  int64_t num_pages;     /* 0: enough for max_sequences full contexts */
  int32_t max_logit_rows; /* tokens whose logits one step computes; 0:
                             max_sequences */
  int32_t num_threads;    /* CPU; 0: one for each usable CPU */
  /* Since ABI 1.1. */
  int64_t kv_cache_bytes; /* instead of num_pages: as many pages as fit; 0: by
                             num_pages */
  /* Since ABI 1.3. */
  const char* moe_kernels_json; /* optional: what
                                   tenon_context_set_moe_kernels takes */
  int32_t kv_cache_dtype;       /* TENON_KV_CACHE_* */
  float kv_cache_k_scale; /* float8_e4m3fn: value = stored * scale; 0: 1 */
  float kv_cache_v_scale;
  int32_t max_logit_edits;  /* of all rows of a step; 0: rows have none */
  int32_t max_top_logprobs; /* that a row may ask for, at most
                               TENON_MAX_TOP_LOGPROBS */
  uint32_t reserved;
} tenon_session_options;

typedef struct tenon_session_info {
  uint32_t struct_size;
  uint32_t flags; /* out, from here on: the options as they are in force */
  int32_t max_sequences;
  int32_t max_tokens;
  int32_t max_context;
  int32_t page_size;
  int64_t num_pages;
  int32_t max_logit_rows;
  int32_t num_sequences; /* alive now */
  int64_t num_free_pages;
  uint64_t num_steps;  /* since the session was created */
  uint64_t num_tokens; /* processed by them */
  /* Since ABI 1.1. */
  int64_t kv_cache_bytes; /* of all pages */
  /* Since ABI 1.3. */
  int32_t kv_cache_dtype;
  int32_t max_logit_edits;
  int32_t max_top_logprobs;
  int32_t num_cuda_graphs;  /* captured */
  int64_t cuda_graph_bytes; /* of device memory that they took */
  /* Since ABI 1.4. */
  int32_t num_steps_in_flight; /* enqueued and not yet waited for */
  int32_t reserved;
} tenon_session_info;

/* Runs a model: owns the paged KV cache, the activations and a stream. All
 * device memory is allocated here. options may be NULL. If a device error
 * leaves a session unable to go on, every later call says so:
 * TENON_UNAVAILABLE.
 *   TENON_RESOURCE_EXHAUSTED  memory, with the bytes needed
 *   TENON_UNIMPLEMENTED       a model with a world_size above 1: nothing adds
 *                             up the ranks' parts */
TENON_THREAD(any)
TENON_API int32_t tenon_session_create(tenon_model model,
                                       const tenon_session_options* options,
                                       tenon_session* session,
                                       tenon_error* error);
TENON_THREAD(turns)
TENON_API int32_t tenon_session_query(tenon_session session,
                                      tenon_session_info* info,
                                      tenon_error* error);
TENON_THREAD(turns)
TENON_API int32_t tenon_session_destroy(tenon_session session,
                                        tenon_error* error);

/* An empty sequence. Errors of all functions of sequences: TENON_NOT_FOUND for
 * a sequence that was released or belongs to another session;
 * TENON_RESOURCE_EXHAUSTED for more than max_sequences. */
TENON_THREAD(turns)
TENON_API int32_t tenon_sequence_create(tenon_session session,
                                        tenon_sequence* sequence,
                                        tenon_error* error);
/* A second sequence with the same tokens so far. Pages of the KV cache are
 * shared until one of the two writes to them. */
TENON_THREAD(turns)
TENON_API int32_t tenon_sequence_fork(tenon_session session,
                                      tenon_sequence sequence,
                                      tenon_sequence* fork, tenon_error* error);
/* Forgets all tokens but the first num_tokens; mirostat's state (see
 * tenon_step_row) with the last one. */
TENON_THREAD(turns)
TENON_API int32_t tenon_sequence_truncate(tenon_session session,
                                          tenon_sequence sequence,
                                          int32_t num_tokens,
                                          tenon_error* error);
TENON_THREAD(turns)
TENON_API int32_t tenon_sequence_length(tenon_session session,
                                        tenon_sequence sequence,
                                        int32_t* num_tokens,
                                        tenon_error* error);
TENON_THREAD(turns)
TENON_API int32_t tenon_sequence_release(tenon_session session,
                                         tenon_sequence sequence,
                                         tenon_error* error);

#define TENON_LOGITS_NONE 0
#define TENON_LOGITS_LAST 1
#define TENON_LOGITS_ALL 2

/* Bits of tenon_step_row.flags, since ABI 1.4. CONTINUES: in place of `tokens`
 * (NULL, with num_tokens 1) the row has the token that the step before, waited
 * for or not, drew for its sequence; the device knows it before the host does.
 * Where that step drew none (status), results of the row mean nothing. */
#define TENON_ROW_CONTINUES 1u

/* What a step does with one sequence: appends tokens (one: decode; several: a
 * chunk of prefill) and, usually, draws the next one.
 *
 * Mirostat (since ABI 1.4): the session keeps mu of each sequence, 2 *
 * mirostat_tau at first, and moves it on with every row that has mirostat_tau
 * and draws a token. A fork begins with that of its parent. Who takes tokens
 * back with tenon_sequence_truncate gives the mu of the last one that is kept
 * (tenon_step_args.mirostat_mu) with TENON_SAMPLING_SET_MIROSTAT_MU. */
typedef struct tenon_step_row {
  uint32_t struct_size; /* the same in all rows of a call */
  int32_t num_tokens;   /* >= 1 */
  tenon_sequence sequence;
  const int32_t* tokens; /* [num_tokens]; may point into the results of the last
                            step */
  const tenon_sampling_params* sampling; /* NULL: no token is drawn, for a chunk
                                            with more of the prompt to come */
  float* logits;       /* out: [vocab_size] with TENON_LOGITS_LAST, [num_tokens,
                          vocab_size] with TENON_LOGITS_ALL */
  int32_t logits_mode; /* TENON_LOGITS_* */
  uint32_t flags;      /* TENON_ROW_*; 0 before ABI 1.4 */
  /* Since ABI 1.3; all optional, and read before the call returns. */
  const tenon_logit_edit* edits; /* [num_edits], aligned to 16 bytes, in the
                                    order of tenon_logit_edits_sort; penalties
                                    need them. See max_logit_edits. */
  const uint32_t* bitmask;       /* [ceil(vocab_size / 32)], see
                                    tenon_sampler_args; needs
                                    TENON_SESSION_LOGIT_BITMASKS */
  int32_t* top_tokens;           /* [sampling->num_top_logprobs], out: the best,
                                    best first, then -1; see max_top_logprobs */
  float* top_logprobs;           /* the same, out; NaN behind the last */
  int32_t num_edits;
  uint32_t reserved1;
} tenon_step_row;

/* All pointers are host memory. */
typedef struct tenon_step_args {
  uint32_t struct_size;
  int32_t num_rows;
  const tenon_step_row* rows;
  int32_t* tokens;   /* [num_rows], out; -1: none was drawn */
  float* logprobs;   /* [num_rows], out, optional; 0 where none was drawn */
  int32_t* statuses; /* [num_rows], out, optional; TENON_SAMPLE_* */
  int32_t* distinct_experts; /* [num_layers], out, optional: distinct experts
                                that each layer used, 0 for a dense layer; needs
                                TENON_SESSION_COUNT_EXPERTS */
  double* microseconds;      /* out, optional: of the whole step */
  /* Since ABI 1.4. */
  float* mirostat_mu; /* [num_rows], out, optional: mu after the draw; 0 for
                         rows without mirostat */
} tenon_step_args;

/* Runs the model over the new tokens of all rows in one pass. All or nothing:
 * every row is checked before any work, and after an error each sequence is as
 * it was. Returns when the results are there. Allocates nothing.
 *   TENON_INVALID_ARGUMENT    a token outside the vocabulary, no tokens, a
 *                             sequence in two rows, bad sampling parameters
 *   TENON_NOT_FOUND           a sequence
 *   TENON_RESOURCE_EXHAUSTED  more rows, tokens, logits, context or pages than
 *                             the session has
 *   TENON_FAILED_PRECONDITION  steps are in flight, see below */
TENON_THREAD(turns)
TENON_API int32_t tenon_session_step(tenon_session session,
                                     const tenon_step_args* args,
                                     tenon_error* error);

/* The same in two parts (since ABI 1.4), so that the next step is on its way to
 * the device before the host has read the tokens of the last one:
 *
 *   enqueue step 1
 *   enqueue step 2, its rows with TENON_ROW_CONTINUES    (at most 2 in flight)
 *   wait: the results of step 1
 *   enqueue step 3, wait: the results of step 2, ...
 *
 * Enqueuing checks the rows as tenon_session_step does and starts their step,
 * or does nothing at all. Of the arguments only num_rows and rows are given;
 * results, the rows' top_tokens and top_logprobs among them, are NULL:
 * tenon_session_wait_step has them. All that rows point to is read before the
 * call returns, but for `logits`, which are written until the step has been
 * waited for (with them this call may wait for its own step).
 *
 * Sequences are then as after all steps in flight. They may be created, forked,
 * truncated and released meanwhile: one whose token was the last may be
 * released at once though the step after it is under way, whose results for it
 * mean nothing. Destroying the session waits for its steps.
 *   TENON_FAILED_PRECONDITION  enqueue: TENON_MAX_STEPS_IN_FLIGHT are in
 *                              flight; wait: none is
 *   TENON_INVALID_ARGUMENT     enqueue: also a row that continues where the
 *                              step before drew no token for its sequence;
 *                              wait: another num_rows than that of the step
 *   TENON_UNAVAILABLE          wait: an error of the device; the session cannot
 *                              go on */
#define TENON_MAX_STEPS_IN_FLIGHT 2

/* What tenon_session_wait_step fills in; all pointers are host memory. */
typedef struct tenon_step_results {
  uint32_t struct_size;
  int32_t num_rows;          /* those of the step */
  int32_t* tokens;           /* [num_rows], out; -1: none was drawn */
  float* logprobs;           /* [num_rows], out, optional */
  int32_t* statuses;         /* [num_rows], out, optional; TENON_SAMPLE_* */
  float* mirostat_mu;        /* [num_rows], out, optional */
  int32_t* top_tokens;       /* [num_rows, top_columns], out, optional: the best
                                of each row, as many as its sampling asked for,
                                best first, then -1 */
  float* top_logprobs;       /* the same, out, optional; NaN behind the last */
  int32_t* distinct_experts; /* as in tenon_step_args */
  double* microseconds;      /* out, optional: since the step was enqueued */
  int32_t top_columns;       /* 1 to TENON_MAX_TOP_LOGPROBS, with top_tokens or
                                top_logprobs */
  uint32_t reserved;
} tenon_step_results;

TENON_THREAD(turns)
TENON_API int32_t tenon_session_enqueue_step(tenon_session session,
                                             const tenon_step_args* args,
                                             tenon_error* error);
/* Waits for the step that was enqueued first. */
TENON_THREAD(turns)
TENON_API int32_t tenon_session_wait_step(tenon_session session,
                                          const tenon_step_results* results,
                                          tenon_error* error);

#ifdef __cplusplus
}
#endif

#endif /* TENON_H_ */
