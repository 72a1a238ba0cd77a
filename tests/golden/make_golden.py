#!/usr/bin/env python3
"""Makes the tiny checkpoints of this folder and what transformers computes from them.

CPU only, fp32, single thread, under a minute. Every checkpoint is read back from its files before
anything is computed, so the expected values belong to the bytes in the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

PROMPT_LENGTH = 96
GREEDY_LENGTH = 64

# A seed is taken only if greedy decoding does not hang on rounding: neither the chosen token nor
# the chosen experts may be close calls, and the continuation must not be a short cycle.
MIN_TOKEN_MARGIN = 5e-3
MIN_ROUTER_MARGIN = 3e-4
MIN_DISTINCT_TOKENS = 24

VOCAB = 131  # odd, so that no kernel may assume a round number of columns
BOS = 129
EOS = 130

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": transformers.__version__,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


@dataclasses.dataclass(frozen=True)
class Golden:
    name: str
    config: dict[str, object]
    # False keeps config.json as transformers 5 writes it, with its own key names.
    published_keys: bool
    max_shard_size: str = "1GB"


GOLDENS = (
    Golden(
        "qwen3_moe_tiny",
        {
            **COMMON,
            **MOE,
            "max_window_layers": 2,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        },
        published_keys=True,
    ),
    Golden(
        "qwen3_dense_tiny",
        {
            **COMMON,
            "architectures": ["Qwen3ForCausalLM"],
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
        },
        published_keys=True,
    ),
    Golden(
        "qwen3_moe_sharded",
        {
            **COMMON,
            **MOE,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        published_keys=False,
        max_shard_size="200KB",
    ),
)


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep every stage visible in the logits; none of the usual ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                value = 1.0 + 0.3 * noise  # norms
            elif "embed_tokens" in name or "lm_head" in name:
                value = 0.3 * noise  # logits with a deviation of about 2.4
            else:
                gain = 2.0 if name.endswith("mlp.gate.weight") else 1.5
                value = gain * parameter.shape[-1] ** -0.5 * noise
            parameter.copy_(value)


def write_checkpoint(golden: Golden, seed: int, directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    config_class = Qwen3MoeConfig if golden.config["model_type"] == "qwen3_moe" else Qwen3Config
    model = AutoModelForCausalLM.from_config(config_class(**golden.config))
    draw_weights(model, seed)
    model.to(getattr(torch, str(golden.config["torch_dtype"])))
    # Unlike the tensors, which get their published names, the keys of config.json are transformers
    # 5's own here: dtype, rope_parameters, num_local_experts.
    model.save_pretrained(directory, max_shard_size=golden.max_shard_size)
    if golden.published_keys:
        text = json.dumps(golden.config, indent=2, sort_keys=True) + "\n"
        (directory / "config.json").write_text(text)


def read_checkpoint(directory: pathlib.Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if hasattr(model, "num_experts"):
        model.set_experts_implementation("eager")
    return model.eval()


def router_margin(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, int]:
    """The least distance of the last expert taken to the first left out, and the least used."""
    if not hasattr(model, "num_experts"):
        return float("inf"), 1
    k = model.num_experts_per_tok
    margin, used = float("inf"), len(tokens)
    for logits in model(tokens[None], output_router_logits=True).router_logits:
        top = logits.softmax(-1).topk(k + 1, dim=-1)
        margin = min(margin, (top.values[:, k - 1] - top.values[:, k]).min().item())
        counts = top.indices[:, :k].flatten().bincount(minlength=model.num_experts)
        used = min(used, int(counts.min()))
    return margin, used


@torch.no_grad()
def expected(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor] | None:
    """What the checkpoint gives for a random prompt; None if it hangs on rounding."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(VOCAB, (PROMPT_LENGTH,), generator=generator)
    logits = model(prompt[None], use_cache=False).logits[0]

    # Without a cache: slower, and independent of how one is kept.
    tokens = prompt
    steps = []
    for _ in range(GREEDY_LENGTH):
        steps.append(model(tokens[None], use_cache=False).logits[0, -1])
        tokens = torch.cat([tokens, steps[-1].argmax()[None]])
    greedy = tokens[PROMPT_LENGTH:]
    greedy_logits = torch.stack(steps)
    top = greedy_logits.topk(2, dim=-1).values
    margins = top[:, 0] - top[:, 1]

    experts_margin, least_used = router_margin(model, tokens)
    if (
        margins.min() < MIN_TOKEN_MARGIN
        or experts_margin < MIN_ROUTER_MARGIN
        or least_used == 0
        or len(greedy.unique()) < MIN_DISTINCT_TOKENS
        or EOS in greedy
    ):
        return None
    print(
        f"  seed {seed}: logits deviation {logits.std():.2f},"
        f" least token margin {margins.min():.4f}, least router margin {experts_margin:.5f},"
        f" least used expert {least_used} of {len(tokens)} tokens,"
        f" {len(greedy.unique())} distinct tokens"
    )
    return {
        "prompt": prompt.int(),
        "logits": logits.contiguous(),
        "greedy": greedy.int(),
        "greedy_logits": greedy_logits,
        "greedy_margins": margins,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--dir", type=pathlib.Path, default=here, help="where to write the folders")
    parser.add_argument("--first-seed", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for golden in GOLDENS:
        directory = args.dir / golden.name
        print(golden.name)
        seed = args.first_seed
        while True:
            write_checkpoint(golden, seed, directory)
            tensors = expected(read_checkpoint(directory), seed)
            if tensors is not None:
                break
            seed += 1
        # One entry: safetensors writes several in an order that changes from run to run.
        origin = f"seed {seed}, torch {torch.__version__}, transformers {transformers.__version__}"
        save_file(tensors, directory / "expected.safetensors", metadata={"origin": origin})
        for path in directory.iterdir():
            path.chmod(0o644)  # the writers leave some readable by their owner alone


if __name__ == "__main__":
    main()
