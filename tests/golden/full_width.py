#!/usr/bin/env python3
"""Compares logits at the full width of Qwen3-30B-A3B with transformers.

  full_width.py make --dir CHECKPOINT --reference FILE
  full_width.py compare --dir CHECKPOINT --reference FILE

"make" writes a 4-layer checkpoint of random bf16 weights, 6 GB in the published layout, and the
logits that transformers computes from it for 256 tokens: in fp32, taken as the truth, and in bf16.
Then it quantises the projections to fp8, and computes the same from the dequantised weights: in
fp32, and in bf16 with every projection's input quantised too.
"compare" then computes them with libtenon.so, through examples/python/tenon.py, with weights as
they are and quantised on load, and tells how far each is from its truth, in units of how far
transformers' bf16 ones are.
"make" wants a GPU with 40 GB; with --tiny it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POSITIONS = 256

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 4,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

TINY = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}


def layer_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Published tensor names of one layer."""
    hidden = config["hidden_size"]
    inner = config["moe_intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.q_norm.weight": (config["head_dim"],),
        "self_attn.k_norm.weight": (config["head_dim"],),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (config["num_experts"], hidden),
    }
    for expert in range(config["num_experts"]):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    return shapes


def write_checkpoint(config: dict, seed: int, device: str, directory: pathlib.Path) -> None:
    """One shard a layer, and one for what is outside the layers."""
    import torch
    from safetensors.torch import save_file

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, device=device)
        # Norms around one, projections as models are initialised: activations stay of order one.
        value = 1.0 + 0.1 * noise if len(shape) == 1 else 0.02 * noise
        return value.to(torch.bfloat16).cpu()

    layers = config["num_hidden_layers"]
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    shards = [
        {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(config).items()}
        for i in range(layers)
    ]
    shards.append(
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        }
    )
    weight_map: dict[str, str] = {}
    total = 0
    for i, shapes in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: draw(shape) for name, shape in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def quantize_weights(model: PreTrainedModel) -> None:
    """Replaces projections by what their fp8 form, 128 x 128 blocks with a scale, stands for."""
    import make_golden

    for name, parameter in model.named_parameters():
        if not make_golden.is_quantized(name):
            continue
        *_, rows, cols = parameter.shape
        rows //= 2 if "gate_up_proj" in name else 1  # two matrices, published apart
        for matrix in parameter.data.view(-1, rows, cols):
            values, scales = make_golden.quantize(
                matrix, make_golden.FP8_BLOCK, make_golden.FP8_BLOCK
            )
            matrix.copy_(make_golden.dequantize(values, scales))


def make(args: argparse.Namespace) -> None:
    import make_golden  # imports torch
    import torch
    import transformers

    began = time.monotonic()

    def report(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = {**CONFIG, **(TINY if args.tiny else {})}
    config["transformers_version"] = transformers.__version__
    torch.set_float32_matmul_precision("highest")  # no TF32 in the truth
    torch.backends.cudnn.allow_tf32 = False

    write_checkpoint(config, args.seed, device, args.dir)
    report(f"checkpoint written to {args.dir}")

    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(config["vocab_size"], (POSITIONS,), generator=generator)
    batch = tokens[None].to(device)
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(args.dir, dtype=torch.bfloat16)
        model = model.to(device).eval()
        report("loaded")
        # transformers' defaults, which are what its users get.
        bf16_logits = model(batch, use_cache=False).logits[0].float().cpu()
        report("bf16 logits")
        # The same weights, upcast exactly, through the implementations that are plainest to read.
        model.float()
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        fp32_logits = model(batch, use_cache=False).logits[0].cpu()
        assert fp32_logits.dtype == torch.float32
        report("fp32 logits")
        quantize_weights(model)
        fp8_truth = model(batch, use_cache=False).logits[0].cpu()
        for parameter in model.parameters():  # and no buffers: angles stay in fp32
            parameter.data = parameter.data.bfloat16()
        with make_golden.quantized_activations(model):
            fp8_logits = model(batch, use_cache=False).logits[0].float().cpu()
        report("the same in fp8")
    # Made in fp32 whatever the model's type; in bf16 the far positions would turn by wrong angles.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32

    tensors = {
        "tokens": tokens.int().numpy(),
        "fp32_logits": fp32_logits.numpy(),
        "bf16_logits": bf16_logits.numpy(),
        "fp8_truth": fp8_truth.numpy(),
        "fp8_logits": fp8_logits.numpy(),
    }
    metadata = {
        "seed": str(args.seed),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    safetensors.numpy.save_file(tensors, args.reference, metadata=metadata)
    report(f"reference written to {args.reference}")
    bf16 = distance(tensors["bf16_logits"], tensors["fp32_logits"])
    fp8 = distance(tensors["fp8_logits"], tensors["fp8_truth"])
    print(json.dumps({"bf16": bf16, "fp8": fp8}, indent=2))


def distance(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    error = np.empty(len(truth))
    norm = np.empty(len(truth))
    for i, (row, true_row) in enumerate(zip(logits, truth)):  # a row at a time: 1 MB in fp64
        true_row = true_row.astype(np.float64)
        error[i] = np.square(row - true_row).sum()
        norm[i] = np.square(true_row).sum()
    return {
        "relative_frobenius": float(np.sqrt(error.sum() / norm.sum())),
        # A token whose experts changed through rounding is far off in either precision, and a few
        # of them can decide the norm above; the median does not see them.
        "median_row": float(np.median(np.sqrt(error / norm))),
        "worst_row": float(np.sqrt(error / norm).max()),
        "argmax_agreement": float((logits.argmax(-1) == truth.argmax(-1)).mean()),
    }


def tenon_logits(
    directory: pathlib.Path, device: str, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of the weights as they are stored, and of these quantised to fp8 on load."""
    root = pathlib.Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(root / "examples/python"))
    if (library := root / "abi/libtenon.so.1").exists():  # of a bundle
        os.environ.setdefault("TENON_LIBRARY", str(library))
    import tenon  # finds its library when imported

    count = len(tokens)

    def logits(weights: int) -> np.ndarray:
        with tenon.Model.load(directory, device, weights=weights) as model, model.session(
            max_sequences=1, max_tokens=count, max_logit_rows=count, max_context=count
        ) as session, session.sequence() as sequence:
            row = tenon.StepRow(sequence, tokens.tolist(), logits=tenon.LOGITS_ALL)
            return np.asarray(session.step([row]).logits[0])

    return logits(tenon.WEIGHTS_STORED), logits(tenon.WEIGHTS_FP8)


def compare(args: argparse.Namespace) -> None:
    reference = safetensors.numpy.load_file(args.reference)
    bf16, fp8 = tenon_logits(args.dir, args.device, reference["tokens"])
    report = {}
    for name, logits, truth in (("bf16", bf16, "fp32_logits"), ("fp8", fp8, "fp8_truth")):
        ours = distance(logits, reference[truth])
        theirs = distance(reference[f"{name}_logits"], reference[truth])
        ratio = ours["relative_frobenius"] / theirs["relative_frobenius"]
        report[name] = {"ours": ours, "transformers": theirs, "ratio": ratio}
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("make", help="write the checkpoint and the reference logits")
    command.add_argument("--dir", type=pathlib.Path, required=True)
    command.add_argument("--reference", type=pathlib.Path, required=True)
    command.add_argument("--seed", type=int, default=30)
    command.add_argument("--tiny", action="store_true", help="small sizes, for trying the script")
    command.set_defaults(run=make)
    command = commands.add_parser("compare", help="print how far Tenon is from the reference")
    command.add_argument("--dir", type=pathlib.Path, required=True)
    command.add_argument("--reference", type=pathlib.Path, required=True)
    command.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    command.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
