/* A client as its author wrote it against one version of the header, which
 * TENON_HEADER names. It opens whatever library there is and prints what ops
 * and the engine gave: the same for the clients of all versions.
 *
 * Usage: client LIBRARY CONFIG_JSON */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include TENON_HEADER

static void* library;
static tenon_error error = {sizeof(tenon_error), 0, ""};

/* FN(tenon_moe): the library's function, with the header's signature. */
#define FN(name) (*(__typeof__(&(name)))symbol(#name))

static void* symbol(const char* name) {
  void* address = dlsym(library, name);
  if (address == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  return address;
}

static void check(int32_t code) {
  if (code == TENON_OK) return;
  fprintf(stderr, "%s\n", error.message);
  exit(1);
}

static DLTensor tensor(void* data, DLDataType type, int64_t* shape,
                       int32_t ndim) {
  DLTensor out = {0};
  out.data = data;
  out.device.device_type = TENON_DL_CPU;
  out.dtype = type;
  out.shape = shape;
  out.ndim = ndim;
  return out;
}

static const DLDataType kFloat32 = {TENON_DL_FLOAT, 32, 1};
static const DLDataType kInt32 = {TENON_DL_INT, 32, 1};

static void print_floats(const char* name, const float* values, int count) {
  printf("%s", name);
  for (int i = 0; i < count; ++i) printf(" %.9g", values[i]);
  printf("\n");
}

static void run_ops(void) {
  float x[8] = {1, -2, 3, -4, 5, 0.5f, -0.25f, 8};
  float weight[4] = {1, 0.5f, 2, -1};
  float normed[8];
  int64_t matrix[2] = {2, 4}, row[1] = {4};
  DLTensor x_tensor = tensor(x, kFloat32, matrix, 2);
  DLTensor weight_tensor = tensor(weight, kFloat32, row, 1);
  DLTensor normed_tensor = tensor(normed, kFloat32, matrix, 2);
  tenon_rms_norm_args norm = {0};
  norm.struct_size = sizeof(norm);
  norm.x = &x_tensor;
  norm.weight = &weight_tensor;
  norm.out = &normed_tensor;
  norm.epsilon = 1e-6f;
  check(FN(tenon_rms_norm)(0, &norm, NULL, &error));
  print_floats("rms_norm", normed, 8);

  float weights[4];
  int32_t ids[4];
  int64_t chosen[2] = {2, 2};
  DLTensor weights_tensor = tensor(weights, kFloat32, chosen, 2);
  DLTensor ids_tensor = tensor(ids, kInt32, chosen, 2);
  tenon_moe_router_args router = {0};
  router.struct_size = sizeof(router);
  router.top_k = 2;
  router.logits = &x_tensor;
  router.topk_weights = &weights_tensor;
  router.topk_ids = &ids_tensor;
  router.renormalize = 1;
  check(FN(tenon_moe_router)(0, &router, NULL, &error));
  print_floats("moe_router", weights, 4);
  printf("ids %d %d %d %d\n", ids[0], ids[1], ids[2], ids[3]);
}

static char* read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  char* text = calloc(1, 65536);
  if (file == NULL || text == NULL || fread(text, 1, 65535, file) == 0) {
    perror(path);
    exit(1);
  }
  fclose(file);
  return text;
}

static void run_engine(const char* config_path) {
  char* config = read_file(config_path);
  tenon_model_random_args random = {0};
  random.struct_size = sizeof(random);
  random.device_type = TENON_DEVICE_CPU;
  random.dtype = TENON_DTYPE_FLOAT32;
  random.seed = 42;
  random.config_json = config;
  tenon_model model;
  check(FN(tenon_model_create_random)(&random, &model, &error));
  free(config);

  tenon_model_info info = {0};
  info.struct_size = sizeof(info);
  check(FN(tenon_model_query)(model, &info, &error));
  printf("model %d layers, %d tokens, %lld bytes\n", info.num_layers,
         info.vocab_size, (long long)info.weight_bytes);

  tenon_session_options options = {0};
  options.struct_size = sizeof(options);
  options.max_context = 64;
  tenon_session session;
  tenon_sequence sequence;
  check(FN(tenon_session_create)(model, &options, &session, &error));
  check(FN(tenon_sequence_create)(session, &sequence, &error));

  tenon_sampling_params sampling;
  check(FN(tenon_sampling_params_init)(&sampling, sizeof(sampling), &error));
  sampling.seed = 7;
  int32_t next[4] = {1, 2, 3, 4}, num_tokens = 4, token;
  float logprob;
  for (int step = 0; step < 8; ++step) {
    tenon_step_row row = {0};
    row.struct_size = sizeof(row);
    row.num_tokens = num_tokens;
    row.sequence = sequence;
    row.tokens = next;
    row.sampling = &sampling;
    tenon_step_args args = {0};
    args.struct_size = sizeof(args);
    args.num_rows = 1;
    args.rows = &row;
    args.tokens = &token;
    args.logprobs = &logprob;
    check(FN(tenon_session_step)(session, &args, &error));
    printf("token %d, logprob %.6g\n", token, logprob);
    next[0] = token;
    num_tokens = 1;
  }
  check(FN(tenon_sequence_release)(session, sequence, &error));
  check(FN(tenon_session_destroy)(session, &error));
  check(FN(tenon_model_destroy)(model, &error));
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const uint32_t oldest = (uint32_t)TENON_ABI_MAJOR << 16 | TENON_ABI_MINOR;
  const uint32_t version = FN(tenon_abi_version)();
  if (version < oldest || version >> 16 != TENON_ABI_MAJOR) {
    fprintf(stderr, "needs ABI %d.%d\n", TENON_ABI_MAJOR, TENON_ABI_MINOR);
    return 1;
  }
  run_ops();
  run_engine(argv[2]);
  return 0;
}
