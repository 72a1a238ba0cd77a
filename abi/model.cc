#include "abi/model.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "abi/call.h"
#include "abi/context.h"
#include "abi/handles.h"

namespace tenon::abi {
namespace {

// Device and shard, which both ways to get a model have.
template <class Args>
Status ReadPlace(const Args& args, Device* device, Shard* shard) {
  TENON_RETURN_IF_ERROR(
      ReadDevice("", args.device_type, args.device_index, device));
  shard->rank = args.rank;
  shard->world_size = args.world_size == 0 ? 1 : args.world_size;
  return Status();
}

Status ReadDType(int32_t code, DType* dtype) {
  switch (code) {
    case TENON_DTYPE_FLOAT32:
      *dtype = DType::kFloat32;
      return Status();
    case TENON_DTYPE_FLOAT16:
      *dtype = DType::kFloat16;
      return Status();
    case TENON_DTYPE_BFLOAT16:
      *dtype = DType::kBFloat16;
      return Status();
    default:
      return InvalidArgumentError(
          "dtype is ", code,
          ", expected 1 (float32), 2 (float16) or 3 (bfloat16)");
  }
}

int32_t DTypeCode(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return TENON_DTYPE_FLOAT32;
    case DType::kFloat16:
      return TENON_DTYPE_FLOAT16;
    default:
      return TENON_DTYPE_BFLOAT16;
  }
}

Status Publish(StatusOr<std::shared_ptr<const Model>> model,
               tenon_model* handle) {
  TENON_RETURN_IF_ERROR(model.status());
  auto object = std::make_unique<ModelObject>();
  object->model = *std::move(model);
  const StatusOr<uint64_t> added = AddHandle(std::move(object));
  TENON_RETURN_IF_ERROR(added.status());
  *handle = *added;
  return Status();
}

Status LoadModel(const tenon_model_load_args* from, tenon_model* handle) {
  tenon_model_load_args args;
  TENON_RETURN_IF_ERROR(ReadStruct("args", from, &args));
  TENON_RETURN_IF_ERROR(CheckPresent("model", handle));
  TENON_RETURN_IF_ERROR(CheckReserved("reserved", args.reserved));
  TENON_RETURN_IF_ERROR(CheckReserved("reserved1", args.reserved1));
  TENON_RETURN_IF_ERROR(CheckPresent("directory", args.directory));
  Device device;
  LoadOptions options;
  TENON_RETURN_IF_ERROR(ReadPlace(args, &device, &options.shard));
  if (args.weights != TENON_WEIGHTS_STORED &&
      args.weights != TENON_WEIGHTS_FP8) {
    return InvalidArgumentError("weights is ", args.weights,
                                ", expected 0 (as stored) or 1 (fp8)");
  }
  options.quantize_fp8 = args.weights == TENON_WEIGHTS_FP8;
  if (args.progress != nullptr) {
    options.progress = [tell = args.progress, data = args.progress_user_data](
                           int64_t done, int64_t total) {
      return tell(data, done, total) == 0;
    };
  }
  return Publish(Model::Load(args.directory, device, options), handle);
}

Status CreateRandomModel(const tenon_model_random_args* from,
                         tenon_model* handle) {
  tenon_model_random_args args;
  TENON_RETURN_IF_ERROR(ReadStruct("args", from, &args));
  TENON_RETURN_IF_ERROR(CheckPresent("model", handle));
  TENON_RETURN_IF_ERROR(CheckPresent("config_json", args.config_json));
  Device device;
  Shard shard;
  DType dtype = DType::kInvalid;
  TENON_RETURN_IF_ERROR(ReadPlace(args, &device, &shard));
  TENON_RETURN_IF_ERROR(ReadDType(args.dtype, &dtype));
  const StatusOr<ModelConfig> config =
      ParseModelConfig(args.config_json, "config_json");
  TENON_RETURN_IF_ERROR(config.status());
  return Publish(Model::Random(*config, dtype, device, args.seed, shard),
                 handle);
}

tenon_model_info Describe(const Model& model) {
  const ModelConfig& config = model.config;
  tenon_model_info info = {};
  info.device_type = DeviceTypeCode(model.device.type);
  info.device_index = model.device.index;
  info.rank = model.shard.rank;
  info.world_size = model.shard.world_size;
  info.dtype = DTypeCode(model.weights.dtype);
  info.vocab_size = config.vocab_size;
  info.hidden_size = config.hidden_size;
  info.num_layers = config.num_layers;
  info.num_heads = config.num_heads;
  info.num_kv_heads = config.num_kv_heads;
  info.head_dim = config.head_dim;
  info.max_position_embeddings = config.max_position_embeddings;
  info.num_experts = config.num_experts;
  info.num_experts_per_tok = config.num_experts_per_tok;
  info.bos_token_id = config.bos_token_id;
  const std::vector<int32_t>& eos = config.eos_token_ids;
  info.num_eos_token_ids = static_cast<int32_t>(eos.size());
  std::copy_n(eos.begin(), std::min(eos.size(), std::size(info.eos_token_ids)),
              info.eos_token_ids);
  info.weight_bytes = model.weights.bytes;
  return info;
}

Status QueryModel(tenon_model handle, tenon_model_info* to) {
  Pin<ModelObject> model;
  TENON_RETURN_IF_ERROR(PinHandle("model", handle, &model));
  return WriteStruct("info", Describe(*model->model), to);
}

}  // namespace
}  // namespace tenon::abi

int32_t tenon_model_load(const tenon_model_load_args* args, tenon_model* model,
                         tenon_error* error) {
  return tenon::abi::Call(__func__, error,
                          [&] { return tenon::abi::LoadModel(args, model); });
}

int32_t tenon_model_create_random(const tenon_model_random_args* args,
                                  tenon_model* model, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::CreateRandomModel(args, model);
  });
}

int32_t tenon_model_query(tenon_model model, tenon_model_info* info,
                          tenon_error* error) {
  return tenon::abi::Call(__func__, error,
                          [&] { return tenon::abi::QueryModel(model, info); });
}

int32_t tenon_model_destroy(tenon_model model, tenon_error* error) {
  return tenon::abi::Call(__func__, error, [&] {
    return tenon::abi::DestroyHandle("model", tenon::abi::HandleKind::kModel,
                                     model);
  });
}
