#ifndef TENON_EXAMPLES_C_VECTORS_H_
#define TENON_EXAMPLES_C_VECTORS_H_

/* Reads the conformance vectors; tests/abi/conformance/README.md has the
 * format. */

#include <tenon/tenon.h>

#define MAX_DIMS 4
#define MAX_FIELDS 16

struct argument {
  const char* field;
  const char* value;
};

struct tensor {
  const char* field;
  DLTensor dl;
  int64_t shape[MAX_DIMS];
  int64_t strides[MAX_DIMS]; /* always set; dl.strides may be NULL */
  size_t num_bytes;
  uint8_t* memory;
  uint8_t* expected; /* the memory after the call */
  int64_t ulps;
};

struct test_case {
  const char* name;
  const char* op;
  struct argument args[MAX_FIELDS];
  int num_args;
  struct tensor tensors[MAX_FIELDS];
  int num_tensors;
  int32_t code;     /* that the call must return */
  const char* word; /* that its message must contain; NULL: none */
};

struct vectors {
  char* text; /* of the whole file; cases point into it */
  char* next;
  int line; /* for messages */
};

/* These return 0, or print what is wrong and return -1. */
int vectors_open(const char* path, struct vectors* vectors);
/* Returns 1 if there was another case. Cases are released by case_clear(). */
int vectors_next(struct vectors* vectors, struct test_case* test);
void vectors_close(struct vectors* vectors);
void case_clear(struct test_case* test);

/* Fields of the arguments; absent ones are 0 and NULL. */
int64_t case_integer(const struct test_case* test, const char* field);
uint64_t case_unsigned(const struct test_case* test, const char* field);
float case_float(const struct test_case* test, const char* field);
const DLTensor* case_tensor(const struct test_case* test, const char* field);

/* Compares the memory of all tensors, and prints the first difference. */
int case_check_tensors(const struct test_case* test);

#endif /* TENON_EXAMPLES_C_VECTORS_H_ */
