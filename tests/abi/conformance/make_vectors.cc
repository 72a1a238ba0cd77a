// make_vectors OUTPUT [MODEL_DIR]: writes the conformance vectors that
// README.md describes.

#include <cstdio>
#include <string>

#include "tests/abi/conformance/cases.h"
#include "tests/abi/conformance/vector_file.h"

int main(int argc, char** argv) {
  using namespace tenon::conformance;
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: make_vectors OUTPUT [MODEL_DIR]\n");
    return 2;
  }
  const std::string text =
      "# Conformance vectors of libtenon.so, ABI 1.2. Written by make_vectors; "
      "README.md describes the format.\n" +
      EmbeddingCases() + RmsNormCases() + LinearCases() + QuantizeFp8Cases() +
      QkNormCases() + AttentionCases() + MoeRouterCases() + MoeAlignCases() +
      MoeGroupedMatmulCases() + MoeSwigluCases() + MoeSumReduceCases() +
      MoeCases() + SamplerCases() +
      GenerateCases(argc == 3 ? argv[2] : "examples/models/austen");
  std::FILE* file = std::fopen(argv[1], "wb");
  Require(file != nullptr, "cannot write the output");
  const size_t written = std::fwrite(text.data(), 1, text.size(), file);
  Require(std::fclose(file) == 0 && written == text.size(),
          "cannot write the output");
  return 0;
}
