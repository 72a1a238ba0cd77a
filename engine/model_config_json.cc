#include <limits>

#include "engine/file.h"
#include "engine/json.h"
#include "engine/model_config.h"

namespace tenon {
namespace {

constexpr size_t kMaxConfigBytes = size_t{16} << 20;

// The fields of one object of the file. A reader stores the value where the key
// is there and not null, and leaves the default otherwise.
class Fields {
 public:
  Fields(const JsonValue& object, const std::string& source)
      : object_(object), source_(source) {}

  const JsonValue* Find(const char* key) const {
    const JsonValue* value = object_.Find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }

  Status Require(const char* key) const {
    if (Find(key) != nullptr) return Status();
    return InvalidArgumentError(source_, ": ", key, " is missing");
  }

  Status Get(const char* key, int32_t* out) const {
    const JsonValue* value = Find(key);
    return value == nullptr ? Status() : ToInt32(key, *value, out);
  }
  Status Get(const char* key, bool* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    const bool* boolean = value->boolean();
    if (boolean == nullptr) return WrongType(key, "true or false");
    *out = *boolean;
    return Status();
  }
  Status Get(const char* key, double* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr || value->ToDouble(out)) return Status();
    return WrongType(key, "a number");
  }
  Status Get(const char* key, std::string* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    const std::string* text = value->string();
    if (text == nullptr) return WrongType(key, "a string");
    *out = *text;
    return Status();
  }
  // One integer, or an array of them.
  Status Get(const char* key, std::vector<int32_t>* out) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return Status();
    out->clear();
    const JsonValue::Array* items = value->array();
    if (items == nullptr) {
      return ToInt32(key, *value, &out->emplace_back());
    }
    for (const JsonValue& item : *items) {
      TENON_RETURN_IF_ERROR(ToInt32(key, item, &out->emplace_back()));
    }
    return Status();
  }
  Status GetRequired(const char* key, int32_t* out) const {
    TENON_RETURN_IF_ERROR(Require(key));
    return Get(key, out);
  }

  Status WrongType(const char* key, const char* expected) const {
    return InvalidArgumentError(source_, ": ", key, " is not ", expected);
  }
  const std::string& source() const { return source_; }

 private:
  Status ToInt32(const char* key, const JsonValue& value, int32_t* out) const {
    const int64_t* wide = value.integer();
    if (wide == nullptr) return WrongType(key, "an integer");
    if (*wide < std::numeric_limits<int32_t>::min() ||
        *wide > std::numeric_limits<int32_t>::max()) {
      return InvalidArgumentError(source_, ": ", key, " is ", *wide,
                                  ", which does not fit 32 bits");
    }
    *out = static_cast<int32_t>(*wide);
    return Status();
  }

  const JsonValue& object_;
  const std::string& source_;
};

Status ReadArchitecture(const Fields& fields, ModelConfig* config) {
  TENON_RETURN_IF_ERROR(fields.Require("architectures"));
  const JsonValue::Array* list = fields.Find("architectures")->array();
  if (list == nullptr || list->empty() || list->front().string() == nullptr) {
    return fields.WrongType("architectures", "an array of names");
  }
  const std::string& name = *list->front().string();
  for (Architecture known : {Architecture::kQwen3Moe, Architecture::kQwen3}) {
    if (name == ArchitectureName(known)) {
      config->architecture = known;
      return Status();
    }
  }
  return UnimplementedError(fields.source(), ": architecture ", name,
                            " is not supported; supported are ",
                            ArchitectureName(Architecture::kQwen3Moe), " and ",
                            ArchitectureName(Architecture::kQwen3));
}

// What would change the results, and has no implementation.
Status RejectUnsupported(const Fields& fields) {
  const std::string& source = fields.source();
  for (const char* key : {"attention_bias", "use_sliding_window", "mlp_bias"}) {
    bool value = false;
    TENON_RETURN_IF_ERROR(fields.Get(key, &value));
    if (value) {
      return UnimplementedError(source, ": ", key, " true is not supported");
    }
  }
  std::string activation = "silu";
  TENON_RETURN_IF_ERROR(fields.Get("hidden_act", &activation));
  if (activation != "silu") {
    return UnimplementedError(source, ": hidden_act ", activation,
                              " is not supported, expected silu");
  }
  if (fields.Find("quantization_config") != nullptr) {
    return UnimplementedError(source,
                              ": quantization_config is not supported: the "
                              "weights must be bfloat16, float16 or float32");
  }
  if (const JsonValue* types = fields.Find("layer_types"); types != nullptr) {
    if (types->array() == nullptr) {
      return fields.WrongType("layer_types", "an array");
    }
    for (const JsonValue& type : *types->array()) {
      if (type.string() == nullptr || *type.string() != "full_attention") {
        return UnimplementedError(source,
                                  ": layer_types other than full_attention "
                                  "are not supported");
      }
    }
  }
  return Status();
}

// One of the objects that say how positions are encoded.
Status CheckRopeType(const Fields& fields, const char* key,
                     const JsonValue& object) {
  if (object.object() == nullptr) return fields.WrongType(key, "an object");
  const std::string source = StrCat(fields.source(), ": ", key);
  const Fields rope(object, source);
  for (const char* type_key : {"rope_type", "type"}) {
    std::string type = "default";
    TENON_RETURN_IF_ERROR(rope.Get(type_key, &type));
    if (type != "default") {
      return UnimplementedError(source, ": ", type_key, " ", type,
                                " is not supported, expected default");
    }
  }
  double rotated = 1.0;
  TENON_RETURN_IF_ERROR(rope.Get("partial_rotary_factor", &rotated));
  if (rotated != 1.0) {
    return UnimplementedError(source, ": partial_rotary_factor ", rotated,
                              " is not supported, expected 1");
  }
  return Status();
}

Status ReadRope(const Fields& fields, ModelConfig* config) {
  if (const JsonValue* scaling = fields.Find("rope_scaling");
      scaling != nullptr) {
    TENON_RETURN_IF_ERROR(CheckRopeType(fields, "rope_scaling", *scaling));
  }
  TENON_RETURN_IF_ERROR(fields.Get("rope_theta", &config->rope_theta));
  if (const JsonValue* object = fields.Find("rope_parameters");
      object != nullptr) {
    TENON_RETURN_IF_ERROR(CheckRopeType(fields, "rope_parameters", *object));
    const std::string source = StrCat(fields.source(), ": rope_parameters");
    double theta = config->rope_theta;
    TENON_RETURN_IF_ERROR(Fields(*object, source).Get("rope_theta", &theta));
    if (fields.Find("rope_theta") != nullptr && theta != config->rope_theta) {
      return InvalidArgumentError(source, ": rope_theta is ", theta, ", but ",
                                  config->rope_theta, " at the top");
    }
    config->rope_theta = theta;
  }
  if (config->rope_theta != 0.0) return Status();
  return fields.Require("rope_theta");
}

Status ReadMoe(const Fields& fields, ModelConfig* config) {
  const char* experts = fields.Find("num_experts") != nullptr
                            ? "num_experts"
                            : "num_local_experts";
  if (fields.Find(experts) == nullptr) return fields.Require("num_experts");
  TENON_RETURN_IF_ERROR(fields.Get(experts, &config->num_experts));
  TENON_RETURN_IF_ERROR(
      fields.GetRequired("num_experts_per_tok", &config->num_experts_per_tok));
  TENON_RETURN_IF_ERROR(fields.GetRequired("moe_intermediate_size",
                                           &config->moe_intermediate_size));
  TENON_RETURN_IF_ERROR(fields.Get("norm_topk_prob", &config->norm_topk_prob));
  TENON_RETURN_IF_ERROR(
      fields.Get("decoder_sparse_step", &config->decoder_sparse_step));
  return fields.Get("mlp_only_layers", &config->mlp_only_layers);
}

Status ReadConfig(const Fields& fields, ModelConfig* config) {
  TENON_RETURN_IF_ERROR(ReadArchitecture(fields, config));
  TENON_RETURN_IF_ERROR(RejectUnsupported(fields));
  TENON_RETURN_IF_ERROR(
      fields.GetRequired("hidden_size", &config->hidden_size));
  TENON_RETURN_IF_ERROR(
      fields.GetRequired("num_hidden_layers", &config->num_layers));
  TENON_RETURN_IF_ERROR(
      fields.GetRequired("num_attention_heads", &config->num_heads));
  TENON_RETURN_IF_ERROR(
      fields.GetRequired("num_key_value_heads", &config->num_kv_heads));
  TENON_RETURN_IF_ERROR(fields.GetRequired("head_dim", &config->head_dim));
  TENON_RETURN_IF_ERROR(fields.GetRequired("vocab_size", &config->vocab_size));
  TENON_RETURN_IF_ERROR(fields.GetRequired("max_position_embeddings",
                                           &config->max_position_embeddings));
  TENON_RETURN_IF_ERROR(
      fields.Get("intermediate_size", &config->intermediate_size));
  if (config->architecture == Architecture::kQwen3Moe) {
    TENON_RETURN_IF_ERROR(ReadMoe(fields, config));
  }
  double epsilon = 0.0;
  TENON_RETURN_IF_ERROR(fields.Require("rms_norm_eps"));
  TENON_RETURN_IF_ERROR(fields.Get("rms_norm_eps", &epsilon));
  config->rms_norm_eps = static_cast<float>(epsilon);
  TENON_RETURN_IF_ERROR(ReadRope(fields, config));
  TENON_RETURN_IF_ERROR(
      fields.Get("tie_word_embeddings", &config->tie_word_embeddings));
  TENON_RETURN_IF_ERROR(fields.Get("bos_token_id", &config->bos_token_id));
  return fields.Get("eos_token_id", &config->eos_token_ids);
}

StatusOr<JsonValue> ParseObject(std::string_view text,
                                const std::string& source) {
  StatusOr<JsonValue> root =
      ParseJson(text, source, StatusCode::kInvalidArgument);
  if (root.ok() && root->object() == nullptr) {
    return InvalidArgumentError(source, ": not a JSON object");
  }
  return root;
}

// Validate() with the name of the file in front.
Status ValidateFile(const ModelConfig& config, const std::string& source) {
  const Status status = config.Validate();
  if (status.ok()) return status;
  return Status(status.code(), StrCat(source, ": ", status.message()));
}

}  // namespace

StatusOr<ModelConfig> ParseModelConfig(std::string_view text,
                                       const std::string& source_name) {
  const StatusOr<JsonValue> root = ParseObject(text, source_name);
  if (!root.ok()) return root.status();
  ModelConfig config;
  TENON_RETURN_IF_ERROR(ReadConfig(Fields(*root, source_name), &config));
  TENON_RETURN_IF_ERROR(ValidateFile(config, source_name));
  return config;
}

StatusOr<ModelConfig> LoadModelConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  const StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  StatusOr<ModelConfig> config = ParseModelConfig(*text, path);
  if (!config.ok()) return config;

  const std::string generation_path = directory + "/generation_config.json";
  if (!FileExists(generation_path)) return config;
  const StatusOr<std::string> generation_text =
      ReadFile(generation_path, kMaxConfigBytes);
  if (!generation_text.ok()) return generation_text.status();
  const StatusOr<JsonValue> root =
      ParseObject(*generation_text, generation_path);
  if (!root.ok()) return root.status();
  TENON_RETURN_IF_ERROR(Fields(*root, generation_path)
                            .Get("eos_token_id", &config->eos_token_ids));
  TENON_RETURN_IF_ERROR(ValidateFile(*config, generation_path));
  return config;
}

}  // namespace tenon
