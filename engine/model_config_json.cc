#include "engine/file.h"
#include "engine/json.h"
#include "engine/json_fields.h"
#include "engine/model_config.h"
#include "engine/quantization_config.h"

namespace tenon {
namespace {

constexpr size_t kMaxConfigBytes = size_t{16} << 20;

Status ReadArchitecture(const JsonFields& fields, ModelConfig* config) {
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
Status RejectUnsupported(const JsonFields& fields) {
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
Status CheckRopeType(const JsonFields& fields, const char* key,
                     const JsonValue& object) {
  if (object.object() == nullptr) return fields.WrongType(key, "an object");
  const std::string source = StrCat(fields.source(), ": ", key);
  const JsonFields rope(object, source);
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

Status ReadRope(const JsonFields& fields, ModelConfig* config) {
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
    TENON_RETURN_IF_ERROR(
        JsonFields(*object, source).Get("rope_theta", &theta));
    if (fields.Find("rope_theta") != nullptr && theta != config->rope_theta) {
      return InvalidArgumentError(source, ": rope_theta is ", theta, ", but ",
                                  config->rope_theta, " at the top");
    }
    config->rope_theta = theta;
  }
  if (config->rope_theta != 0.0) return Status();
  return fields.Require("rope_theta");
}

Status ReadMoe(const JsonFields& fields, ModelConfig* config) {
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

Status ReadConfig(const JsonFields& fields, ModelConfig* config) {
  TENON_RETURN_IF_ERROR(ReadArchitecture(fields, config));
  TENON_RETURN_IF_ERROR(RejectUnsupported(fields));
  TENON_RETURN_IF_ERROR(ReadQuantization(fields, config));
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
  TENON_RETURN_IF_ERROR(ReadConfig(JsonFields(*root, source_name), &config));
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
  TENON_RETURN_IF_ERROR(JsonFields(*root, generation_path)
                            .Get("eos_token_id", &config->eos_token_ids));
  TENON_RETURN_IF_ERROR(ValidateFile(*config, generation_path));
  return config;
}

}  // namespace tenon
