#include "vectors.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
  const char* name;
  DLDataType dtype;
} kDtypes[] = {
    {"float32", {TENON_DL_FLOAT, 32, 1}},
    {"float16", {TENON_DL_FLOAT, 16, 1}},
    {"bfloat16", {TENON_DL_BFLOAT, 16, 1}},
    {"float8_e4m3fn", {TENON_DL_FLOAT8_E4M3FN, 8, 1}},
    {"int32", {TENON_DL_INT, 32, 1}},
    {"int64", {TENON_DL_INT, 64, 1}},
    {"uint8", {TENON_DL_UINT, 8, 1}},
};

int vectors_open(const char* path, struct vectors* vectors) {
  memset(vectors, 0, sizeof(*vectors));
  FILE* file = fopen(path, "rb");
  long size = -1;
  if (file != NULL && fseek(file, 0, SEEK_END) == 0) size = ftell(file);
  if (size >= 0) vectors->text = malloc((size_t)size + 1);
  if (vectors->text != NULL) {
    rewind(file);
    vectors->text[fread(vectors->text, 1, (size_t)size, file)] = '\0';
    vectors->next = vectors->text;
  }
  if (file != NULL) fclose(file);
  if (vectors->text != NULL) return 0;
  perror(path);
  return -1;
}

void vectors_close(struct vectors* vectors) {
  free(vectors->text);
  memset(vectors, 0, sizeof(*vectors));
}

/* Cuts the text up to a separator off; NULL at the end of the text. */
static char* cut(char** text, char separator) {
  char* const begin = *text;
  if (begin == NULL || *begin == '\0') return NULL;
  char* const end = strchr(begin, separator);
  *text = end == NULL ? NULL : end + 1;
  if (end != NULL) *end = '\0';
  return begin;
}

/* Returns the number of integers; "-" has none. */
static int parse_list(const char* text, int64_t values[MAX_DIMS]) {
  int count = 0;
  if (strcmp(text, "-") == 0) return 0;
  for (; count < MAX_DIMS; ++text) {
    char* end;
    values[count++] = strtoll(text, &end, 10);
    text = end;
    if (*text != ',') break;
  }
  return count;
}

static uint8_t* parse_hex(const char* text, size_t* num_bytes) {
  *num_bytes = strlen(text) / 2;
  uint8_t* const bytes = malloc(*num_bytes);
  for (size_t i = 0; bytes != NULL && i < *num_bytes; ++i) {
    const char digits[3] = {text[2 * i], text[2 * i + 1], '\0'};
    bytes[i] = (uint8_t)strtoul(digits, NULL, 16);
  }
  return bytes;
}

static int parse_tensor(char* words[6], struct test_case* test) {
  if (test->num_tensors == MAX_FIELDS) return -1;
  struct tensor* const t = &test->tensors[test->num_tensors++];
  t->field = words[0];
  for (size_t i = 0; i < sizeof(kDtypes) / sizeof(kDtypes[0]); ++i) {
    if (strcmp(words[1], kDtypes[i].name) == 0) t->dl.dtype = kDtypes[i].dtype;
  }
  t->memory = parse_hex(words[5], &t->num_bytes);
  t->expected = parse_hex(words[5], &t->num_bytes);
  t->dl.data = t->memory;
  t->dl.device.device_type = TENON_DL_CPU;
  t->dl.ndim = parse_list(words[2], t->shape);
  t->dl.shape = t->shape;
  t->dl.byte_offset = strtoull(words[4], NULL, 10);
  if (parse_list(words[3], t->strides) > 0) {
    t->dl.strides = t->strides;
  } else {
    int64_t stride = 1;
    for (int d = t->dl.ndim; d-- > 0; stride *= t->shape[d]) {
      t->strides[d] = stride;
    }
  }
  return t->dl.dtype.bits == 0 || t->memory == NULL || t->expected == NULL ? -1
                                                                           : 0;
}

static struct tensor* find_tensor(const struct test_case* test,
                                  const char* field) {
  for (int i = 0; i < test->num_tensors; ++i) {
    if (strcmp(test->tensors[i].field, field) == 0) {
      return (struct tensor*)&test->tensors[i];
    }
  }
  return NULL;
}

static int parse_expect(char* words[3], struct test_case* test) {
  struct tensor* const t = find_tensor(test, words[0]);
  if (t == NULL) return -1;
  const size_t num_bytes = t->num_bytes;
  free(t->expected);
  t->ulps = strtoll(words[1], NULL, 10);
  t->expected = parse_hex(words[2], &t->num_bytes);
  return t->expected == NULL || t->num_bytes != num_bytes ? -1 : 0;
}

/* One statement other than "end". */
static int parse_statement(char* line, struct test_case* test) {
  char* words[7];
  int count = 0;
  while (count < 7 && (words[count] = cut(&line, ' ')) != NULL) ++count;
  if (strcmp(words[0], "case") == 0 && count == 3) {
    test->name = words[1];
    test->op = words[2];
    return 0;
  }
  if (strcmp(words[0], "arg") == 0 && count == 3 &&
      test->num_args < MAX_FIELDS) {
    test->args[test->num_args].field = words[1];
    test->args[test->num_args++].value = words[2];
    return 0;
  }
  if (strcmp(words[0], "tensor") == 0 && count == 7) {
    return parse_tensor(words + 1, test);
  }
  if (strcmp(words[0], "expect") == 0 && count == 4) {
    return parse_expect(words + 1, test);
  }
  if (strcmp(words[0], "reject") == 0 && count == 3) {
    test->code = (int32_t)strtol(words[1], NULL, 10);
    test->word = words[2];
    return 0;
  }
  return -1;
}

int vectors_next(struct vectors* vectors, struct test_case* test) {
  memset(test, 0, sizeof(*test));
  while (vectors->next != NULL && *vectors->next != '\0') {
    char* const line = cut(&vectors->next, '\n');
    ++vectors->line;
    if (*line == '\0' || *line == '#') continue;
    if (strcmp(line, "end") == 0 && test->op != NULL) return 1;
    if (parse_statement(line, test) != 0) {
      fprintf(stderr, "line %d of the vectors is malformed\n", vectors->line);
      case_clear(test);
      return -1;
    }
  }
  if (test->op == NULL) return 0;
  fprintf(stderr, "%s: no end\n", test->name);
  case_clear(test);
  return -1;
}

void case_clear(struct test_case* test) {
  for (int i = 0; i < test->num_tensors; ++i) {
    free(test->tensors[i].memory);
    free(test->tensors[i].expected);
  }
  memset(test, 0, sizeof(*test));
}

static const char* value_of(const struct test_case* test, const char* field) {
  for (int i = 0; i < test->num_args; ++i) {
    if (strcmp(test->args[i].field, field) == 0) return test->args[i].value;
  }
  return "0";
}

int64_t case_integer(const struct test_case* test, const char* field) {
  return strtoll(value_of(test, field), NULL, 10);
}

uint64_t case_unsigned(const struct test_case* test, const char* field) {
  return strtoull(value_of(test, field), NULL, 10);
}

float case_float(const struct test_case* test, const char* field) {
  return strtof(value_of(test, field), NULL);
}

const DLTensor* case_tensor(const struct test_case* test, const char* field) {
  const struct tensor* const t = find_tensor(test, field);
  return t == NULL ? NULL : &t->dl;
}

/* The place of a floating-point element among all values of its dtype. */
static int64_t rank_of(const uint8_t* element, size_t size) {
  if (size == 2) {
    int16_t bits;
    memcpy(&bits, element, sizeof(bits));
    return bits >= 0 ? bits : -(bits & 0x7fff);
  }
  int32_t bits;
  memcpy(&bits, element, sizeof(bits));
  return bits >= 0 ? bits : -(int64_t)(bits & 0x7fffffff);
}

/* Copies the expected elements over those that are near enough. */
static void accept_near_elements(const struct tensor* t) {
  const size_t size = t->dl.dtype.bits / 8u;
  int64_t count = 1;
  for (int d = 0; d < t->dl.ndim; ++d) count *= t->shape[d];
  for (int64_t i = 0; i < count; ++i) {
    size_t at = t->dl.byte_offset;
    int64_t rest = i;
    for (int d = t->dl.ndim; d-- > 0; rest /= t->shape[d]) {
      at += (size_t)(rest % t->shape[d] * t->strides[d]) * size;
    }
    const int64_t distance =
        rank_of(t->memory + at, size) - rank_of(t->expected + at, size);
    if (llabs(distance) <= t->ulps) {
      memcpy(t->memory + at, t->expected + at, size);
    }
  }
}

int case_check_tensors(const struct test_case* test) {
  for (int i = 0; i < test->num_tensors; ++i) {
    const struct tensor* const t = &test->tensors[i];
    if (t->ulps > 0) accept_near_elements(t);
    for (size_t at = 0; at < t->num_bytes; ++at) {
      if (t->memory[at] == t->expected[at]) continue;
      fprintf(stderr, "%s: byte %zu of %s is %02x, expected %02x", test->name,
              at, t->field, t->memory[at], t->expected[at]);
      fprintf(stderr, " (%d-bit elements from byte %" PRIu64 " on)\n",
              t->dl.dtype.bits, t->dl.byte_offset);
      return -1;
    }
  }
  return 0;
}
