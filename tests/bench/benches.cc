// All benchmark programs in one. Which of them it is comes from the name it is
// called by, such as that of a link to it, or else from its first argument.

#include <cstdio>
#include <cstring>

int attention_bench(int argc, char** argv);
int decode_bench(int argc, char** argv);
int embedding_bench(int argc, char** argv);
int linear_bench(int argc, char** argv);
int moe_bench(int argc, char** argv);
int moe_prepare_bench(int argc, char** argv);
int qk_norm_bench(int argc, char** argv);
int quantize_bench(int argc, char** argv);
int rms_norm_bench(int argc, char** argv);
int sampler_bench(int argc, char** argv);

namespace {

struct Program {
  const char* name;
  int (*main)(int argc, char** argv);
};

constexpr Program kPrograms[] = {
    {"attention_bench", attention_bench},
    {"decode_bench", decode_bench},
    {"embedding_bench", embedding_bench},
    {"linear_bench", linear_bench},
    {"moe_bench", moe_bench},
    {"moe_prepare_bench", moe_prepare_bench},
    {"qk_norm_bench", qk_norm_bench},
    {"quantize_bench", quantize_bench},
    {"rms_norm_bench", rms_norm_bench},
    {"sampler_bench", sampler_bench},
};

const Program* Find(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* name = slash == nullptr ? path : slash + 1;
  for (const Program& program : kPrograms) {
    if (std::strcmp(program.name, name) == 0) return &program;
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 0) {
    if (const Program* program = Find(argv[0]))
      return program->main(argc, argv);
  }
  if (argc > 1) {
    if (const Program* program = Find(argv[1])) {
      return program->main(argc - 1, argv + 1);
    }
  }
  std::fputs("usage: benches PROGRAM [flags], where PROGRAM is one of\n",
             stderr);
  for (const Program& program : kPrograms) {
    std::fprintf(stderr, "  %s\n", program.name);
  }
  return 2;
}
