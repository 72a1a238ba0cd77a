// conformance VECTORS MODEL_DIR [LIBTENON]: runs all conformance vectors
// through libtenon.so on the CPU. Exit code 0: all passed.

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "tenon.hpp"
#include "vectors.hpp"

namespace conformance {
namespace {

// The arguments of a case. Fields that it does not have keep their defaults.

void Fill(Case* c, tenon_embedding_args* args) {
  c->Get("ids", &args->ids);
  c->Get("table", &args->table);
  c->Get("out", &args->out);
}

void Fill(Case* c, tenon_rms_norm_args* args) {
  c->Get("rounding", &args->rounding);
  c->Get("x", &args->x);
  c->Get("residual", &args->residual);
  c->Get("weight", &args->weight);
  c->Get("out", &args->out);
  c->Get("epsilon", &args->epsilon);
}

void Fill(Case* c, tenon_linear_args* args) {
  c->Get("flags", &args->flags);
  c->Get("x", &args->x);
  c->Get("weight", &args->weight);
  c->Get("bias", &args->bias);
  c->Get("out", &args->out);
  c->Get("weight_scales", &args->weight_scales);
}

void Fill(Case* c, tenon_quantize_fp8_args* args) {
  c->Get("block_rows", &args->block_rows);
  c->Get("block_cols", &args->block_cols);
  c->Get("x", &args->x);
  c->Get("out", &args->out);
  c->Get("scales", &args->scales);
}

void Fill(Case* c, tenon_qk_norm_args* args) {
  c->Get("rounding", &args->rounding);
  c->Get("qkv", &args->qkv);
  c->Get("q_offset", &args->q_offset);
  c->Get("k_offset", &args->k_offset);
  c->Get("v_offset", &args->v_offset);
  c->Get("num_q_heads", &args->num_q_heads);
  c->Get("num_kv_heads", &args->num_kv_heads);
  c->Get("head_dim", &args->head_dim);
  c->Get("epsilon", &args->epsilon);
  c->Get("q", &args->q);
  c->Get("k", &args->k);
  c->Get("v", &args->v);
  c->Get("q_weight", &args->q_weight);
  c->Get("k_weight", &args->k_weight);
  c->Get("cos_sin", &args->cos_sin);
  c->Get("positions", &args->positions);
  c->Get("k_cache", &args->k_cache);
  c->Get("v_cache", &args->v_cache);
  c->Get("slot_mapping", &args->slot_mapping);
  c->Get("k_scale", &args->k_scale);
  c->Get("v_scale", &args->v_scale);
  c->Get("rotary_dim", &args->rotary_dim);
}

void Fill(Case* c, tenon_attention_args* args) {
  c->Get("flags", &args->flags);
  c->Get("q", &args->q);
  c->Get("k_cache", &args->k_cache);
  c->Get("v_cache", &args->v_cache);
  c->Get("block_table", &args->block_table);
  c->Get("query_start", &args->query_start);
  c->Get("kv_len", &args->kv_len);
  c->Get("out", &args->out);
  c->Get("scale", &args->scale);
  c->Get("k_scale", &args->k_scale);
  c->Get("v_scale", &args->v_scale);
  c->Get("max_kv_len", &args->max_kv_len);
  c->Get("max_query_len", &args->max_query_len);
}

void Fill(Case* c, tenon_moe_router_args* args) {
  c->Get("top_k", &args->top_k);
  c->Get("logits", &args->logits);
  c->Get("correction_bias", &args->correction_bias);
  c->Get("topk_weights", &args->topk_weights);
  c->Get("topk_ids", &args->topk_ids);
  c->Get("scoring", &args->scoring);
  c->Get("renormalize", &args->renormalize);
  c->Get("routed_scaling_factor", &args->routed_scaling_factor);
  c->Get("num_expert_groups", &args->num_expert_groups);
  c->Get("num_selected_groups", &args->num_selected_groups);
  c->Get("group_score", &args->group_score);
  c->Get("num_fused_shared_experts", &args->num_fused_shared_experts);
}

void Fill(Case* c, tenon_moe_align_args* args) {
  c->Get("num_experts", &args->num_experts);
  c->Get("topk_ids", &args->topk_ids);
  c->Get("expert_offsets", &args->expert_offsets);
  c->Get("sorted_slots", &args->sorted_slots);
  c->Get("tiles", &args->tiles);
  c->Get("tile_rows", &args->tile_rows);
}

void Fill(Case* c, tenon_moe_grouped_matmul_args* args) {
  c->Get("flags", &args->flags);
  c->Get("x", &args->x);
  c->Get("weights", &args->weights);
  c->Get("expert_offsets", &args->expert_offsets);
  c->Get("sorted_slots", &args->sorted_slots);
  c->Get("bias", &args->bias);
  c->Get("routing_weights", &args->routing_weights);
  c->Get("out", &args->out);
  c->Get("slots_per_row", &args->slots_per_row);
  c->Get("weight_scales", &args->weight_scales);
}

void Fill(Case* c, tenon_moe_swiglu_args* args) {
  c->Get("layout", &args->layout);
  c->Get("x", &args->x);
  c->Get("out", &args->out);
  c->Get("limit", &args->limit);
  c->Get("alpha", &args->alpha);
}

void Fill(Case* c, tenon_moe_sum_reduce_args* args) {
  c->Get("x", &args->x);
  c->Get("out", &args->out);
}

void Fill(Case* c, tenon_moe_args* args) {
  c->Get("flags", &args->flags);
  c->Get("x", &args->x);
  c->Get("topk_weights", &args->topk_weights);
  c->Get("topk_ids", &args->topk_ids);
  c->Get("gate", &args->gate);
  c->Get("up", &args->up);
  c->Get("down", &args->down);
  c->Get("out", &args->out);
  c->Get("gate_scales", &args->gate_scales);
  c->Get("up_scales", &args->up_scales);
  c->Get("down_scales", &args->down_scales);
}

void Fill(Case* c, tenon_sampler_args* args) {
  c->Get("logits", &args->logits);
  c->Get("params", &args->params);
  c->Get("tokens", &args->tokens);
  c->Get("logprobs", &args->logprobs);
  c->Get("statuses", &args->statuses);
}

template <class Args>
void Run(const tenon::Context& context, Args* args) {
  tenon::Workspace workspace;
  if constexpr (tenon::kTakesWorkspace<Args>) {
    workspace.Provide(context, args);
  }
  context.Run(*args);
}

template <class Args>
void RunOp(const tenon::Context& context, Case* c) {
  auto args = tenon::Make<Args>();
  Fill(c, &args);
  Run(context, &args);
}

void RunMoe(const tenon::Context& context, Case* c) {
  auto args = tenon::Make<tenon_moe_args>();
  Fill(c, &args);
  auto router = tenon::Make<tenon_moe_router_args>();
  c->Get("router.top_k", &router.top_k);
  c->Get("router.renormalize", &router.renormalize);
  c->Get("router.logits", &router.logits);
  router.topk_weights = args.topk_weights;
  router.topk_ids = args.topk_ids;
  if (router.logits != nullptr) args.router = &router;
  Run(context, &args);
}

// Continues the prompt: one step for all of it, then one for each token.
void Generate(tenon::Session* session, const tenon_sampling_params& sampling,
              const std::vector<int32_t>& prompt,
              std::vector<int32_t>* tokens) {
  const tenon::Sequence sequence(*session);
  auto row = tenon::Make<tenon_step_row>();
  row.sequence = sequence.get();
  row.tokens = prompt.data();
  row.num_tokens = static_cast<int32_t>(prompt.size());
  row.sampling = &sampling;
  auto step = tenon::Make<tenon_step_args>();
  step.num_rows = 1;
  step.rows = &row;
  for (int32_t& token : *tokens) {
    step.tokens = &token;
    session->Step(step);
    row.tokens = &token;
    row.num_tokens = 1;
  }
}

// The same with two steps in flight: tokens go from step to step without us.
void GeneratePipelined(tenon::Session* session,
                       const tenon_sampling_params& sampling,
                       const std::vector<int32_t>& prompt,
                       std::vector<int32_t>* tokens) {
  const tenon::Sequence sequence(*session);
  auto row = tenon::Make<tenon_step_row>();
  row.sequence = sequence.get();
  row.tokens = prompt.data();
  row.num_tokens = static_cast<int32_t>(prompt.size());
  row.sampling = &sampling;
  auto step = tenon::Make<tenon_step_args>();
  step.num_rows = 1;
  step.rows = &row;
  session->EnqueueStep(step);
  row.tokens = nullptr;
  row.num_tokens = 1;
  row.flags = TENON_ROW_CONTINUES;
  auto results = tenon::Make<tenon_step_results>();
  results.num_rows = 1;
  for (int32_t& token : *tokens) {
    if (&token != &tokens->back()) session->EnqueueStep(step);
    results.tokens = &token;
    session->WaitStep(results);
  }
}

std::vector<int32_t> Tokens(const CaseTensor& tensor) {
  std::vector<int32_t> tokens(tensor.memory.size() / sizeof(int32_t));
  std::memcpy(tokens.data(), tensor.memory.data(), tensor.memory.size());
  return tokens;
}

void RunGenerate(tenon::Session* session, Case* c) {
  tenon_sampling_params sampling = {};
  c->Get("temperature", &sampling.temperature);
  c->Get("top_k", &sampling.top_k);
  c->Get("top_p", &sampling.top_p);
  c->Get("min_p", &sampling.min_p);
  c->Get("filter_order", &sampling.filter_order);
  c->Get("seed", &sampling.seed);
  const std::vector<int32_t> prompt = Tokens(c->tensors.at("prompt"));
  std::vector<uint8_t>& memory = c->tensors.at("tokens").memory;
  std::vector<int32_t> tokens(memory.size() / sizeof(int32_t));
  Generate(session, sampling, prompt, &tokens);
  std::vector<int32_t> pipelined(tokens.size());
  GeneratePipelined(session, sampling, prompt, &pipelined);
  if (pipelined != tokens) {
    throw std::runtime_error("two steps in flight give other tokens");
  }
  std::memcpy(memory.data(), tokens.data(), memory.size());
  // Of this model a token is a byte; 0 begins a text.
  const std::string text = std::string(prompt.begin() + 1, prompt.end()) +
                           std::string(tokens.begin(), tokens.end());
  std::printf("%s: %s\n", c->name.c_str(), text.c_str());
}

using Runner = std::function<void(Case*)>;

std::map<std::string, Runner> Runners(const tenon::Context& context,
                                      tenon::Session* session) {
  const auto op = [&](auto run) {
    return [run, &context](Case* c) { run(context, c); };
  };
  return {
      {"embedding", op(RunOp<tenon_embedding_args>)},
      {"rms_norm", op(RunOp<tenon_rms_norm_args>)},
      {"linear", op(RunOp<tenon_linear_args>)},
      {"quantize_fp8", op(RunOp<tenon_quantize_fp8_args>)},
      {"qk_norm", op(RunOp<tenon_qk_norm_args>)},
      {"attention", op(RunOp<tenon_attention_args>)},
      {"moe_router", op(RunOp<tenon_moe_router_args>)},
      {"moe_align", op(RunOp<tenon_moe_align_args>)},
      {"moe_grouped_matmul", op(RunOp<tenon_moe_grouped_matmul_args>)},
      {"moe_swiglu", op(RunOp<tenon_moe_swiglu_args>)},
      {"moe_sum_reduce", op(RunOp<tenon_moe_sum_reduce_args>)},
      {"moe", op(RunMoe)},
      {"sampler", op(RunOp<tenon_sampler_args>)},
      {"generate", [session](Case* c) { RunGenerate(session, c); }},
  };
}

// Throws std::runtime_error where the result is not the expected one.
void Check(const Runner& run, Case* c) {
  int32_t code = TENON_OK;
  std::string message;
  try {
    run(c);
  } catch (const tenon::Error& error) {
    code = error.code();
    message = error.what();
  }
  if (code != c->code || message.find(c->word) == std::string::npos) {
    throw std::runtime_error(
        "returned " + std::to_string(code) + " '" + message + "', expected " +
        std::to_string(c->code) + " and the word '" + c->word + "'");
  }
  for (const auto& [field, tensor] : c->tensors) {
    const std::string difference = tensor.Difference();
    if (!difference.empty())
      throw std::runtime_error(field + ": " + difference);
  }
}

int Run(const std::string& vectors, const std::string& model_directory,
        const std::string& library_path) {
  const auto library = tenon::Library::Open(library_path);
  std::printf("libtenon %s\n", library->version_string());
  const tenon::Context context(library, TENON_DEVICE_CPU);
  auto options = tenon::Make<tenon_session_options>();
  options.max_sequences = 1;
  tenon::Session session(tenon::Model(library, model_directory), options);
  const std::map<std::string, Runner> runners = Runners(context, &session);

  std::vector<Case> cases = ReadCases(vectors);
  std::map<std::string, int> passed;
  for (Case& c : cases) {
    try {
      Check(runners.at(c.op), &c);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", c.name.c_str(), error.what());
      return 1;
    }
    ++passed[c.op];
  }
  for (const auto& [op, count] : passed) {
    std::printf("%s: %d cases\n", op.c_str(), count);
  }
  std::printf("%zu cases passed\n", cases.size());
  return cases.empty() ? 1 : 0;
}

}  // namespace
}  // namespace conformance

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: conformance VECTORS MODEL_DIR [LIBTENON]\n");
    return 2;
  }
  try {
    return conformance::Run(argv[1], argv[2],
                            argc == 4 ? argv[3] : "libtenon.so.1");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "conformance: %s\n", error.what());
    return 1;
  }
}
