/* conformance VECTORS MODEL_DIR [LIBTENON]: runs all conformance vectors
 * through libtenon.so on the CPU. Exit code 0: all passed. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader.h"
#include "ops.h"
#include "vectors.h"

static int report(const char* what, const tenon_library* library,
                  const tenon_error* error) {
  fprintf(stderr, "%s: %s: %s\n", what, library->status_name(error->code),
          error->message);
  return -1;
}

/* A model that is loaded, with a session for one sequence at a time. */
struct engine {
  tenon_model model;
  tenon_session session;
};

static int open_engine(const tenon_library* library, const char* directory,
                       struct engine* engine) {
  tenon_error error = {.struct_size = sizeof(error)};
  tenon_model_load_args load = {.struct_size = sizeof(load)};
  load.device_type = TENON_DEVICE_CPU;
  load.directory = directory;
  if (library->model_load(&load, &engine->model, &error) != TENON_OK) {
    return report(directory, library, &error);
  }
  tenon_session_options options = {.struct_size = sizeof(options)};
  options.max_sequences = 1;
  if (library->session_create(engine->model, &options, &engine->session,
                              &error) != TENON_OK) {
    return report("session", library, &error);
  }
  return 0;
}

static void close_engine(const tenon_library* library, struct engine* engine) {
  library->session_destroy(engine->session, NULL);
  library->model_destroy(engine->model, NULL);
}

/* Continues the prompt by `count` tokens: one step for the whole prompt, then
 * one for each token. */
static int32_t generate(const tenon_library* library, tenon_session session,
                        const tenon_sampling_params* sampling,
                        const int32_t* prompt, int32_t prompt_size,
                        int32_t* tokens, int64_t count, tenon_error* error) {
  tenon_sequence sequence;
  int32_t code = library->sequence_create(session, &sequence, error);
  if (code != TENON_OK) return code;
  tenon_step_row row = {.struct_size = sizeof(row)};
  row.sequence = sequence;
  row.tokens = prompt;
  row.num_tokens = prompt_size;
  row.sampling = sampling;
  tenon_step_args step = {.struct_size = sizeof(step)};
  step.num_rows = 1;
  step.rows = &row;
  for (int64_t i = 0; i < count && code == TENON_OK; ++i) {
    step.tokens = &tokens[i];
    code = library->session_step(session, &step, error);
    row.tokens = &tokens[i];
    row.num_tokens = 1;
  }
  library->sequence_release(session, sequence, NULL);
  return code;
}

/* The same with two steps in flight: tokens go from step to step without us. */
static int32_t generate_pipelined(const tenon_library* library,
                                  tenon_session session,
                                  const tenon_sampling_params* sampling,
                                  const int32_t* prompt, int32_t prompt_size,
                                  int32_t* tokens, int64_t count,
                                  tenon_error* error) {
  tenon_sequence sequence;
  int32_t code = library->sequence_create(session, &sequence, error);
  if (code != TENON_OK) return code;
  tenon_step_row row = {.struct_size = sizeof(row)};
  row.sequence = sequence;
  row.tokens = prompt;
  row.num_tokens = prompt_size;
  row.sampling = sampling;
  tenon_step_args step = {.struct_size = sizeof(step)};
  step.num_rows = 1;
  step.rows = &row;
  tenon_step_results results = {.struct_size = sizeof(results)};
  results.num_rows = 1;
  for (int64_t i = 0; i <= count && code == TENON_OK; ++i) {
    if (i < count) code = library->session_enqueue_step(session, &step, error);
    row.tokens = NULL;
    row.num_tokens = 1;
    row.flags = TENON_ROW_CONTINUES;
    if (i == 0 || code != TENON_OK) continue;
    results.tokens = &tokens[i - 1];
    code = library->session_wait_step(session, &results, error);
  }
  library->sequence_release(session, sequence, NULL);
  return code;
}

static void print_bytes(const int32_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] > 0) putchar(tokens[i]);
  }
}

static int32_t run_generate(const tenon_library* library,
                            const struct engine* engine,
                            const struct test_case* test, tenon_error* error) {
  tenon_sampling_params sampling = {0};
  sampling.temperature = case_float(test, "temperature");
  sampling.top_k = (int32_t)case_integer(test, "top_k");
  sampling.top_p = case_float(test, "top_p");
  sampling.min_p = case_float(test, "min_p");
  sampling.filter_order = (int32_t)case_integer(test, "filter_order");
  sampling.seed = case_unsigned(test, "seed");
  const DLTensor* const prompt = case_tensor(test, "prompt");
  const DLTensor* const tokens = case_tensor(test, "tokens");
  const int32_t prompt_size = (int32_t)prompt->shape[0];
  const int64_t count = tokens->shape[0];
  int32_t code = generate(library, engine->session, &sampling, prompt->data,
                          prompt_size, tokens->data, count, error);
  if (code != TENON_OK) return code;
  int32_t* const again = calloc((size_t)count, sizeof(*again));
  if (again == NULL) return TENON_RESOURCE_EXHAUSTED;
  code = generate_pipelined(library, engine->session, &sampling, prompt->data,
                            prompt_size, again, count, error);
  if (code == TENON_OK &&
      memcmp(again, tokens->data, (size_t)count * sizeof(*again)) != 0) {
    code = TENON_INTERNAL;
    snprintf(error->message, sizeof(error->message),
             "two steps in flight give other tokens");
  }
  free(again);
  if (code != TENON_OK) return code;
  printf("%s: ", test->name);
  print_bytes(prompt->data, prompt->shape[0]);
  print_bytes(tokens->data, tokens->shape[0]);
  printf("\n");
  return code;
}

static int run_case(const tenon_library* library, tenon_context context,
                    const struct engine* engine, const struct test_case* test) {
  tenon_error error = {.struct_size = sizeof(error)};
  const int32_t code = strcmp(test->op, "generate") == 0
                           ? run_generate(library, engine, test, &error)
                           : run_op(library, context, test, &error);
  if (code != test->code) {
    fprintf(stderr, "%s: returned %s, expected %s: %s\n", test->name,
            library->status_name(code), library->status_name(test->code),
            error.message);
    return -1;
  }
  if (test->word != NULL && strstr(error.message, test->word) == NULL) {
    fprintf(stderr, "%s: '%s' is not in the message: %s\n", test->name,
            test->word, error.message);
    return -1;
  }
  return case_check_tensors(test);
}

/* Returns the number of cases that passed, or -1 after the first that did not.
 */
static int run_all(const tenon_library* library, tenon_context context,
                   const struct engine* engine, struct vectors* vectors) {
  struct test_case test;
  char op[64] = "";
  int of_op = 0;
  int total = 0;
  int more;
  while ((more = vectors_next(vectors, &test)) == 1) {
    if (strcmp(op, test.op) != 0) {
      if (total > 0) printf("%s: %d cases\n", op, of_op);
      snprintf(op, sizeof(op), "%s", test.op);
      of_op = 0;
    }
    const int failed = run_case(library, context, engine, &test);
    case_clear(&test);
    if (failed) return -1;
    ++of_op;
    ++total;
  }
  if (total > 0) printf("%s: %d cases\n", op, of_op);
  return more == 0 ? total : -1;
}

/* Returns the exit code. */
static int run(const tenon_library* library, const char* model_directory,
               struct vectors* vectors) {
  tenon_error error = {.struct_size = sizeof(error)};
  tenon_context_options options = {.struct_size = sizeof(options)};
  options.device_type = TENON_DEVICE_CPU;
  tenon_context context = 0;
  if (library->context_create(&options, &context, &error) != TENON_OK) {
    report("context", library, &error);
    return 1;
  }
  struct engine engine = {0, 0};
  int passed = -1;
  if (open_engine(library, model_directory, &engine) == 0) {
    passed = run_all(library, context, &engine, vectors);
  }
  close_engine(library, &engine);
  library->context_destroy(context, NULL);
  if (passed <= 0) return 1;
  printf("%d cases passed\n", passed);
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: conformance VECTORS MODEL_DIR [LIBTENON]\n");
    return 2;
  }
  tenon_library library;
  char reason[1024];
  if (tenon_library_open(argc == 4 ? argv[3] : NULL, &library, reason,
                         sizeof(reason)) != 0) {
    fprintf(stderr, "conformance: %s\n", reason);
    return 1;
  }
  printf("libtenon %s\n", library.version_string());
  struct vectors vectors;
  int exit_code = 1;
  if (vectors_open(argv[1], &vectors) == 0) {
    exit_code = run(&library, argv[2], &vectors);
  }
  vectors_close(&vectors);
  tenon_library_close(&library);
  return exit_code;
}
