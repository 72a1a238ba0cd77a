#!/usr/bin/env python3
"""Makes the tiny checkpoints of this folder and what transformers computes from them.

CPU only, fp32, single thread, a few minutes. Every checkpoint is read back from its files before
anything is computed, so the expected values belong to the bytes in the repository.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import torch
import transformers
from safetensors.torch import load_file, save_file
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


@dataclasses.dataclass(frozen=True)
class Fp8Golden:
    name: str
    source: Golden  # drawn anew, or one of GOLDENS that is on disk already
    published: bool  # quant_method fp8, 128 x 128 blocks; else compressed-tensors, channels
    dtype: torch.dtype  # of what is not quantised


FP8_GOLDENS = (
    Fp8Golden(
        "qwen3_moe_fp8",
        Golden(
            "",
            {
                **COMMON,
                **MOE,
                "hidden_size": 192,
                "intermediate_size": 320,
                "max_window_layers": 2,
                "mlp_only_layers": [1],
                "moe_intermediate_size": 192,
                "norm_topk_prob": True,
                "num_experts": 4,
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
        published=True,
        dtype=torch.float32,
    ),
    Fp8Golden("qwen3_moe_tiny_fp8", GOLDENS[0], published=True, dtype=torch.bfloat16),
    Fp8Golden("qwen3_dense_tiny_fp8", GOLDENS[1], published=False, dtype=torch.bfloat16),
)

FP8_BLOCK = 128
FP8_MAX = 448.0
PUBLISHED_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
FLOAT8 = {"num_bits": 8, "symmetric": True, "type": "float"}
CHANNEL_QUANTIZATION = {
    "config_groups": {
        "group_0": {
            "input_activations": {**FLOAT8, "dynamic": True, "strategy": "token"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {**FLOAT8, "dynamic": False, "strategy": "channel"},
        }
    },
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


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


def quantize(
    x: torch.Tensor, block_rows: int, block_cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x as float8_e4m3 and a scale for each block, those at the edges partial."""
    rows, cols = x.shape
    block_rows, block_cols = min(block_rows, rows), min(block_cols, cols)
    padded = torch.nn.functional.pad(x, (0, -cols % block_cols, 0, -rows % block_rows))
    blocks = padded.view(
        padded.shape[0] // block_rows, block_rows, padded.shape[1] // block_cols, block_cols
    )
    amax = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-10)
    inverse = torch.full_like(amax, FP8_MAX) / amax  # a number / amax is two roundings
    values = (blocks * inverse[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.view(padded.shape)[:rows, :cols].contiguous(), amax / FP8_MAX


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, cols = values.shape
    if len(scales) == rows:  # of channels
        return values.float() * scales
    whole = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return values.float() * whole[:rows, :cols]


def is_quantized(name: str) -> bool:
    return "_proj" in name


def write_fp8_checkpoint(golden: Fp8Golden, source: pathlib.Path, directory: pathlib.Path) -> None:
    """The checkpoint in `source`, quantised, in the published layout."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if not is_quantized(name):
            tensors[name] = value.to(golden.dtype)
        elif golden.published:
            tensors[name], scales = quantize(value, FP8_BLOCK, FP8_BLOCK)
            tensors[name + "_scale_inv"] = scales
        else:
            tensors[name], scales = quantize(value, 1, value.shape[1])
            tensors[name + "_scale"] = scales
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        **golden.source.config,
        "torch_dtype": str(golden.dtype).removeprefix("torch."),
        "quantization_config": PUBLISHED_QUANTIZATION if golden.published else CHANNEL_QUANTIZATION,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_fp8_checkpoint(golden: Fp8Golden, directory: pathlib.Path) -> PreTrainedModel:
    """The model with dequantised weights, in fp32, which holds them to its last bit."""
    suffix = "_scale_inv" if golden.published else "_scale"
    tensors = load_file(directory / "model.safetensors")
    plain = {
        name: dequantize(value, tensors[name + suffix]) if is_quantized(name) else value.float()
        for name, value in tensors.items()
        if not name.endswith(suffix)
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(plain, pathlib.Path(folder) / "model.safetensors", metadata={"format": "pt"})
        config = {**golden.source.config, "torch_dtype": "float32"}
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        return read_checkpoint(pathlib.Path(folder))


@contextlib.contextmanager
def quantized_activations(model: PreTrainedModel) -> Iterator[None]:
    """What goes into a quantised matrix is quantised first, a scale for each 128 columns."""
    quantized = {
        parameter.untyped_storage().data_ptr()
        for name, parameter in model.named_parameters()
        if is_quantized(name)
    }
    linear = torch.nn.functional.linear

    def quantizing_linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() in quantized and x.numel() > 0:
            rows = x.reshape(-1, x.shape[-1])
            values, scales = quantize(rows.float(), 1, FP8_BLOCK)
            whole = scales.repeat_interleave(FP8_BLOCK, 1)[:, : rows.shape[1]]
            x = (values.float() * whole).reshape(x.shape).to(x.dtype)
        return linear(x, weight, bias)

    torch.nn.functional.linear = quantizing_linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


@torch.no_grad()
def fp8_expected(model: PreTrainedModel, seed: int, robust: bool) -> dict[str, torch.Tensor] | None:
    """As expected(), of quantised activations; and the logits of exact ones."""
    with quantized_activations(model):
        if robust:
            tensors = expected(model, seed)
            if tensors is None:
                return None
        else:
            generator = torch.Generator().manual_seed(seed)
            prompt = torch.randint(VOCAB, (PROMPT_LENGTH,), generator=generator)
            tensors = {"prompt": prompt.int(), "logits": model(prompt[None]).logits[0].contiguous()}
    tensors["quantized_logits"] = tensors.pop("logits")
    tensors["logits"] = model(tensors["prompt"].long()[None]).logits[0].contiguous()
    change = (tensors["quantized_logits"] - tensors["logits"]).norm(dim=1)
    share = (change / tensors["logits"].norm(dim=1)).median()
    print(f"  quantised activations change the median row of logits by {share:.4f}")
    return tensors


def make_fp8(golden: Fp8Golden, root: pathlib.Path, seed: int) -> None:
    directory = root / golden.name
    print(golden.name)
    if golden.source.name:
        write_fp8_checkpoint(golden, root / golden.source.name, directory)
        tensors = fp8_expected(read_fp8_checkpoint(golden, directory), seed, robust=False)
    else:
        while True:
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(golden.source, seed, pathlib.Path(folder) / "source")
                write_fp8_checkpoint(golden, pathlib.Path(folder) / "source", directory)
            tensors = fp8_expected(read_fp8_checkpoint(golden, directory), seed, robust=True)
            if tensors is not None:
                break
            seed += 1
    save_expected(tensors, seed, directory)


def save_expected(tensors: dict[str, torch.Tensor], seed: int, directory: pathlib.Path) -> None:
    # One entry: safetensors writes several in an order that changes from run to run.
    origin = f"seed {seed}, torch {torch.__version__}, transformers {transformers.__version__}"
    save_file(tensors, directory / "expected.safetensors", metadata={"origin": origin})
    for path in directory.iterdir():
        path.chmod(0o644)  # the writers leave some readable by their owner alone


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
        save_expected(tensors, seed, directory)
    for fp8 in FP8_GOLDENS:
        make_fp8(fp8, args.dir, args.first_seed)


if __name__ == "__main__":
    main()
