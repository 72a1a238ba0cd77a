#ifndef TENON_EXAMPLES_CPP_VECTORS_HPP_
#define TENON_EXAMPLES_CPP_VECTORS_HPP_

// Reads the conformance vectors; tests/abi/conformance/README.md has the
// format.

#include <cstdint>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "tenon.hpp"

namespace conformance {

struct CaseTensor {
  DLDataType dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // empty: compact
  size_t byte_offset;
  std::vector<uint8_t> memory;
  std::vector<uint8_t> expected;  // the memory after the call
  int64_t ulps = 0;

  // Where memory is not as expected; empty where it is.
  std::string Difference() const;
};

class Case {
 public:
  std::string name;
  std::string op;
  std::map<std::string, std::string> args;
  std::map<std::string, CaseTensor> tensors;
  int32_t code = TENON_OK;  // what the call returns
  std::string word;         // of its message

  // Sets a field of the arguments if the case has it.
  void Get(const std::string& field, int32_t* value) const;
  void Get(const std::string& field, uint32_t* value) const;
  void Get(const std::string& field, int64_t* value) const;
  void Get(const std::string& field, uint64_t* value) const;
  void Get(const std::string& field, float* value) const;
  void Get(const std::string& field, const DLTensor** value);

 private:
  std::list<tenon::Tensor> views_;  // do not move in memory
};

// Throws std::runtime_error that names the line.
std::vector<Case> ReadCases(const std::string& path);

}  // namespace conformance

#endif  // TENON_EXAMPLES_CPP_VECTORS_HPP_
