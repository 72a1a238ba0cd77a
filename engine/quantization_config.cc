#include "engine/quantization_config.h"

#include <vector>

namespace tenon {
namespace {

constexpr char kKey[] = "quantization_config";

Status Unsupported(const JsonFields& fields, const char* key,
                   const std::string& value, const char* expected) {
  return UnimplementedError(fields.source(), ": ", key, " ", value,
                            " is not supported, expected ", expected);
}

// A string that must be `expected`; it is that where there is none.
Status ExpectText(const JsonFields& fields, const char* key,
                  const char* expected) {
  std::string value = expected;
  TENON_RETURN_IF_ERROR(fields.Get(key, &value));
  if (value == expected) return Status();
  return Unsupported(fields, key, value, expected);
}

Status ExpectBool(const JsonFields& fields, const char* key, bool expected) {
  bool value = expected;
  TENON_RETURN_IF_ERROR(fields.Get(key, &value));
  if (value == expected) return Status();
  return Unsupported(fields, key, value ? "true" : "false",
                     expected ? "true" : "false");
}

Status ExpectAbsent(const JsonFields& fields, const char* key) {
  if (fields.Find(key) == nullptr) return Status();
  return UnimplementedError(fields.source(), ": ", key, " is not supported");
}

Status ExpectBlocks(const JsonFields& fields, const char* key) {
  if (fields.Find(key) == nullptr) {
    return UnimplementedError(fields.source(), ": ", key,
                              " is missing: one scale for a whole matrix is "
                              "not supported");
  }
  std::vector<int32_t> size;
  TENON_RETURN_IF_ERROR(fields.Get(key, &size));
  if (size == std::vector<int32_t>{kFp8BlockSize, kFp8BlockSize})
    return Status();
  std::string text = "[";
  for (size_t i = 0; i < size.size(); ++i) {
    text += StrCat(i > 0 ? ", " : "", size[i]);
  }
  return Unsupported(fields, key, text + "]", "[128, 128]");
}

// Lists of modules that are not quantised. Which ones are is what the files
// say: a matrix is quantised if it is float8_e4m3.
Status ExpectNames(const JsonFields& fields, const char* key) {
  const JsonValue* value = fields.Find(key);
  if (value == nullptr) return Status();
  if (value->array() == nullptr) return fields.WrongType(key, "an array");
  for (const JsonValue& name : *value->array()) {
    if (name.string() == nullptr) {
      return fields.WrongType(key, "an array of names");
    }
  }
  return Status();
}

// An object that must be there.
Status FindObject(const JsonFields& fields, const char* key,
                  const JsonValue** object) {
  TENON_RETURN_IF_ERROR(fields.Require(key));
  *object = fields.Find(key);
  if ((*object)->object() != nullptr) return Status();
  return fields.WrongType(key, "an object");
}

Status ReadFp8(const JsonFields& fields, ModelConfig* config) {
  TENON_RETURN_IF_ERROR(ExpectText(fields, "fmt", "e4m3"));
  TENON_RETURN_IF_ERROR(ExpectText(fields, "activation_scheme", "dynamic"));
  // Activations' scales that are powers of two.
  TENON_RETURN_IF_ERROR(ExpectAbsent(fields, "scale_fmt"));
  TENON_RETURN_IF_ERROR(ExpectBlocks(fields, "weight_block_size"));
  TENON_RETURN_IF_ERROR(ExpectNames(fields, "modules_to_not_convert"));
  config->fp8_scaling = Fp8Scaling::kBlocks;
  config->fp8_scale_suffix = "_scale_inv";
  return Status();
}

// What one group of a compressed-tensors config says of weights or activations.
Status ExpectFloat8(const JsonFields& fields, bool dynamic) {
  TENON_RETURN_IF_ERROR(fields.Require("type"));
  TENON_RETURN_IF_ERROR(ExpectText(fields, "type", "float"));
  int32_t bits = 0;
  TENON_RETURN_IF_ERROR(fields.GetRequired("num_bits", &bits));
  if (bits != 8) {
    return Unsupported(fields, "num_bits", StrCat(bits), "8");
  }
  TENON_RETURN_IF_ERROR(ExpectBool(fields, "symmetric", true));
  bool is_dynamic = false;
  TENON_RETURN_IF_ERROR(fields.Get("dynamic", &is_dynamic));
  if (is_dynamic == dynamic) return Status();
  return Unsupported(fields, "dynamic", is_dynamic ? "true" : "false",
                     dynamic ? "true" : "false");
}

Status ReadGroup(const JsonFields& group, ModelConfig* config) {
  const JsonValue* object = nullptr;
  TENON_RETURN_IF_ERROR(FindObject(group, "input_activations", &object));
  const std::string activations = StrCat(group.source(), ": input_activations");
  TENON_RETURN_IF_ERROR(ExpectFloat8({*object, activations}, true));
  TENON_RETURN_IF_ERROR(ExpectAbsent(group, "output_activations"));

  TENON_RETURN_IF_ERROR(FindObject(group, "weights", &object));
  const std::string source = StrCat(group.source(), ": weights");
  const JsonFields weights(*object, source);
  TENON_RETURN_IF_ERROR(ExpectFloat8(weights, false));
  std::string strategy;
  TENON_RETURN_IF_ERROR(weights.Require("strategy"));
  TENON_RETURN_IF_ERROR(weights.Get("strategy", &strategy));
  config->fp8_scale_suffix = "_scale";
  if (strategy == "channel") {
    config->fp8_scaling = Fp8Scaling::kChannels;
    return Status();
  }
  if (strategy != "block") {
    return Unsupported(weights, "strategy", strategy, "channel or block");
  }
  config->fp8_scaling = Fp8Scaling::kBlocks;
  return ExpectBlocks(weights, "block_structure");
}

Status ReadCompressedTensors(const JsonFields& fields, ModelConfig* config) {
  TENON_RETURN_IF_ERROR(ExpectText(fields, "format", "float-quantized"));
  TENON_RETURN_IF_ERROR(
      ExpectText(fields, "quantization_status", "compressed"));
  TENON_RETURN_IF_ERROR(ExpectAbsent(fields, "kv_cache_scheme"));
  TENON_RETURN_IF_ERROR(ExpectNames(fields, "ignore"));
  const JsonValue* groups = nullptr;
  TENON_RETURN_IF_ERROR(FindObject(fields, "config_groups", &groups));
  if (groups->object()->size() != 1) {
    return UnimplementedError(fields.source(), ": config_groups has ",
                              groups->object()->size(), " groups, expected 1");
  }
  const auto& [name, group] = *groups->object()->begin();
  const std::string source = StrCat(fields.source(), ": config_groups: ", name);
  if (group.object() == nullptr) {
    return InvalidArgumentError(source, " is not an object");
  }
  return ReadGroup({group, source}, config);
}

}  // namespace

Status ReadQuantization(const JsonFields& fields, ModelConfig* config) {
  if (fields.Find(kKey) == nullptr) return Status();
  const JsonValue* object = nullptr;
  TENON_RETURN_IF_ERROR(FindObject(fields, kKey, &object));
  const std::string source = StrCat(fields.source(), ": ", kKey);
  const JsonFields quantization(*object, source);
  std::string method;
  TENON_RETURN_IF_ERROR(quantization.Require("quant_method"));
  TENON_RETURN_IF_ERROR(quantization.Get("quant_method", &method));
  if (method == "fp8") return ReadFp8(quantization, config);
  if (method == "compressed-tensors") {
    return ReadCompressedTensors(quantization, config);
  }
  return Unsupported(quantization, "quant_method", method,
                     "fp8 or compressed-tensors");
}

}  // namespace tenon
