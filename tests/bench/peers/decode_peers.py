"""Times a whole decode step of Qwen3-30B-A3B in Hugging Face transformers, in a
CUDA graph, with random weights and a static cache: what decode_bench does."""

import sys

import torch
import transformers

OP = "decode"
SHAPE = "qwen3-30b-a3b/48L"
LAYERS = 48
REPLAYS = 15
WARM_UP = 3
# transformers' own ways to run the experts. The first copies each token's
# weights together: for very few of them.
EXPERTS = ("batched_mm", "grouped_mm")
MAX_BATCHED = 8


def make_model():
    config = transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=False, decoder_sparse_step=1,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, attn_implementation="sdpa")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16)
    model.to_empty(device="cuda").eval()
    # Not among the parameters, and not what to_empty left there.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02)
    return model


class Step:
    """One token of `batch` sequences with `context` tokens in the cache."""

    def __init__(self, model, batch, context):
        self.model = model
        self.context = context
        config = model.config
        length = context + 8 * (REPLAYS + WARM_UP)
        self.cache = transformers.StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(
            batch, config.num_key_value_heads, config.head_dim, torch.bfloat16,
            torch.device("cuda"))
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.ids = torch.randint(config.vocab_size, (batch, 1), device="cuda")
        self.positions = torch.full((batch, 1), context, device="cuda")
        # Given, so that none is made from lengths, which would wait for them.
        self.mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device="cuda")
        self.mask[..., : context + 1] = True
        self.rewind()

    def rewind(self):
        for layer in self.cache.layers:
            if torch.is_tensor(getattr(layer, "cumulative_length", None)):
                layer.cumulative_length.fill_(self.context)

    def _inputs(self):
        return dict(input_ids=self.ids, position_ids=self.positions,
                    attention_mask=self.mask, past_key_values=self.cache,
                    use_cache=True)

    def __call__(self):
        logits = self.model(**self._inputs()).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))

    def distinct_experts(self):
        """The mean over the layers, of one step."""
        # Without the head, which would go on to a loss of them.
        out = self.model.model(**self._inputs(), output_router_logits=True)
        logits = out.router_logits
        counts = [layer.topk(self.model.config.num_experts_per_tok, -1)
                  .indices.unique().numel() for layer in logits]
        self.rewind()
        return sum(counts) / len(counts)


def time_graph(step):
    """Microseconds of a step, replay by replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.rewind()
    times = []
    for repeat in range(WARM_UP + REPLAYS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


@torch.inference_mode()
def run(batches, context):
    model = make_model()
    results = []
    for batch in batches:
        for experts in EXPERTS:
            if experts == "batched_mm" and batch > MAX_BATCHED:
                continue
            model.config._experts_implementation = experts
            try:
                step = Step(model, batch, context)
                distinct = step.distinct_experts()
                us = time_graph(step)
            except Exception as error:  # one way failing must not hide the others
                print(f"transformers {experts}, batch {batch}: {error}",
                      file=sys.stderr)
                torch.cuda.empty_cache()
                continue
            print(f"transformers {experts}, batch {batch}: {us / 1e3:.3f} ms, "
                  f"{distinct:.1f} distinct experts a layer", file=sys.stderr)
            results.append(dict(op=OP, shape=SHAPE, tokens=batch, dtype="bfloat16",
                                note=f"context {context}",
                                who=f"transformers {experts}", us=us))
            del step
    return results
