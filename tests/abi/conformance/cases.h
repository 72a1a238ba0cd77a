#ifndef TENON_TESTS_ABI_CONFORMANCE_CASES_H_
#define TENON_TESTS_ABI_CONFORMANCE_CASES_H_

#include <string>

// The cases of the file, as text; inputs are chosen here, expected values come
// from tests/reference.

namespace tenon::conformance {

std::string EmbeddingCases();
std::string RmsNormCases();
std::string LinearCases();
std::string QuantizeFp8Cases();
std::string QkNormCases();
std::string AttentionCases();
std::string MoeRouterCases();
std::string MoeAlignCases();
std::string MoeGroupedMatmulCases();
std::string MoeSwigluCases();
std::string MoeSumReduceCases();
std::string MoeCases();
std::string SamplerCases();

// Texts of the model in this directory.
std::string GenerateCases(const std::string& model_directory);

}  // namespace tenon::conformance

#endif  // TENON_TESTS_ABI_CONFORMANCE_CASES_H_
