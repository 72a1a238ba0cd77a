#include "vectors.hpp"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace conformance {
namespace {

DLDataType ParseDType(const std::string& name) {
  static const std::map<std::string, DLDataType> dtypes = {
      {"float32", tenon::kFloat32},   {"float16", tenon::kFloat16},
      {"bfloat16", tenon::kBFloat16}, {"float8_e4m3fn", tenon::kFloat8E4M3},
      {"int32", tenon::kInt32},       {"int64", tenon::kInt64},
      {"uint8", tenon::kUInt8},
  };
  return dtypes.at(name);
}

std::vector<int64_t> ParseList(const std::string& text) {
  std::vector<int64_t> values;
  if (text == "-") return values;
  std::istringstream stream(text);
  for (std::string value; std::getline(stream, value, ',');) {
    values.push_back(std::stoll(value));
  }
  return values;
}

std::vector<uint8_t> ParseHex(const std::string& text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes.push_back(
        static_cast<uint8_t>(std::stoul(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

// One statement other than "case" and "end".
void Parse(const std::string& statement, std::istringstream& words, Case* c) {
  std::string field;
  if (statement == "arg") {
    words >> field;
    words >> c->args[field];
  } else if (statement == "tensor") {
    std::string dtype, shape, strides, memory;
    size_t byte_offset;
    words >> field >> dtype >> shape >> strides >> byte_offset >> memory;
    const std::vector<uint8_t> bytes = ParseHex(memory);
    c->tensors[field] = {ParseDType(dtype),
                         ParseList(shape),
                         ParseList(strides),
                         byte_offset,
                         bytes,
                         bytes};
  } else if (statement == "expect") {
    std::string memory;
    words >> field;
    CaseTensor& tensor = c->tensors.at(field);
    words >> tensor.ulps >> memory;
    tensor.expected = ParseHex(memory);
  } else if (statement == "reject") {
    words >> c->code >> c->word;
  } else {
    throw std::runtime_error("unknown statement " + statement);
  }
  if (words.fail()) throw std::runtime_error("a word is missing");
}

// The place of a floating-point element among all values of its dtype.
template <class Bits>
int64_t Rank(const uint8_t* element) {
  Bits bits;
  std::memcpy(&bits, element, sizeof(bits));
  constexpr int64_t kMagnitude = std::numeric_limits<Bits>::max();
  return bits >= 0 ? int64_t{bits} : -(bits & kMagnitude);
}

int64_t Distance(const uint8_t* a, const uint8_t* b, size_t size) {
  return size == 2 ? std::abs(Rank<int16_t>(a) - Rank<int16_t>(b))
                   : std::abs(Rank<int32_t>(a) - Rank<int32_t>(b));
}

// The first byte of every element.
std::vector<size_t> ElementOffsets(const CaseTensor& tensor) {
  std::vector<size_t> offsets = {tensor.byte_offset};
  size_t compact = tensor.dtype.bits / 8u;
  const size_t size = compact;
  for (size_t d = tensor.shape.size(); d-- > 0;) {
    const size_t stride = tensor.strides.empty()
                              ? compact
                              : static_cast<size_t>(tensor.strides[d]) * size;
    compact *= static_cast<size_t>(tensor.shape[d]);
    std::vector<size_t> all;
    for (int64_t i = 0; i < tensor.shape[d]; ++i) {
      for (size_t offset : offsets) {
        all.push_back(offset + static_cast<size_t>(i) * stride);
      }
    }
    offsets = std::move(all);
  }
  return offsets;
}

}  // namespace

std::string CaseTensor::Difference() const {
  std::vector<uint8_t> actual = memory;
  if (ulps > 0) {
    const size_t size = dtype.bits / 8u;
    for (size_t at : ElementOffsets(*this)) {
      if (Distance(&actual[at], &expected[at], size) <= ulps) {
        std::memcpy(&actual[at], &expected[at], size);
      }
    }
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    if (actual[i] == expected.at(i)) continue;
    std::ostringstream text;
    text << "byte " << i << " is " << std::hex << int{actual[i]}
         << ", expected " << int{expected[i]} << std::dec << " ("
         << int{dtype.bits} << "-bit elements from byte " << byte_offset
         << " on)";
    return text.str();
  }
  return "";
}

void Case::Get(const std::string& field, int64_t* value) const {
  const auto arg = args.find(field);
  if (arg != args.end()) *value = std::stoll(arg->second);
}

void Case::Get(const std::string& field, uint64_t* value) const {
  const auto arg = args.find(field);
  if (arg != args.end()) *value = std::stoull(arg->second);
}

void Case::Get(const std::string& field, int32_t* value) const {
  int64_t wide = *value;
  Get(field, &wide);
  *value = static_cast<int32_t>(wide);
}

void Case::Get(const std::string& field, uint32_t* value) const {
  uint64_t wide = *value;
  Get(field, &wide);
  *value = static_cast<uint32_t>(wide);
}

void Case::Get(const std::string& field, float* value) const {
  const auto arg = args.find(field);
  if (arg != args.end()) *value = std::stof(arg->second);
}

void Case::Get(const std::string& field, const DLTensor** value) {
  const auto found = tensors.find(field);
  if (found == tensors.end()) return;
  CaseTensor& t = found->second;
  views_.emplace_back(t.memory.data(), t.dtype, t.shape, t.strides,
                      t.byte_offset);
  *value = views_.back().get();
}

std::vector<Case> ReadCases(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<Case> cases;
  int number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.empty() || line[0] == '#' || line == "end") continue;
    std::istringstream words(line);
    std::string statement;
    words >> statement;
    try {
      if (statement == "case") {
        cases.emplace_back();
        words >> cases.back().name >> cases.back().op;
      } else {
        Parse(statement, words, &cases.at(cases.size() - 1));
      }
    } catch (const std::exception& error) {
      throw std::runtime_error(path + ":" + std::to_string(number) + ": " +
                               error.what());
    }
  }
  return cases;
}

}  // namespace conformance
