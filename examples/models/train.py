#!/usr/bin/env python3
"""Trains the example model, a byte-level Qwen3-MoE, and writes it as a Hugging Face checkpoint.

Needs torch and transformers 5, and for useful speed a GPU with bf16. Data order, initial weights
and dropout follow from --seed; the GPU's own summation order is the only thing that may differ
between two runs.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

VOCAB = 256  # one token a byte
END_OF_TEXT = 0
MAX_POSITIONS = 2048
TOKENS_PER_STEP = 32768
# Short rows train the text's opening and long ones the far context; steps alternate between them.
ROW_LENGTHS = (512, MAX_POSITIONS)
VALIDATE_EVERY_NTH_CHAPTER = 20
EVAL_LENGTH = 1024
CALIBRATION_STEPS = (50, 200)
WARMUP_STEPS = 300


def published_config(args: argparse.Namespace) -> dict[str, object]:
    """config.json with the keys that published Qwen3-MoE models have.

    transformers 5 writes rope_parameters, dtype and num_local_experts instead of rope_theta,
    torch_dtype and num_experts; the first two appear here in both forms so that readers of either
    age are served.
    """
    rope_theta = 10000.0
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": END_OF_TEXT,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": END_OF_TEXT,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 3 * args.hidden_size,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": args.layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": args.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": args.experts,
        "num_experts_per_tok": args.experts_per_token,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    }


def load_text(path: pathlib.Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The training and the held-out bytes, both beginning with END_OF_TEXT."""
    chapters = path.read_bytes().split(bytes([END_OF_TEXT]))[:-1]
    parts: tuple[list[bytes], list[bytes]] = ([b""], [b""])
    for i, chapter in enumerate(chapters):
        held_out = i % VALIDATE_EVERY_NTH_CHAPTER == VALIDATE_EVERY_NTH_CHAPTER // 2
        parts[held_out].append(chapter)
    streams = [bytes([END_OF_TEXT]).join(part) + bytes([END_OF_TEXT]) for part in parts]
    train, held_out = (
        torch.frombuffer(bytearray(stream), dtype=torch.uint8).to(device) for stream in streams
    )
    return train, held_out


def dense_experts(
    module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, with weight 0 for those not routed to.

    At this size two large products beat sorting tokens by expert, and unlike the grouped product
    they follow autocast.
    """
    experts = module.num_experts
    scale = weight.new_zeros(hidden.shape[0], experts).scatter(1, index, weight)
    gate_up = F.linear(hidden, module.gate_up_proj.flatten(0, 1)).unflatten(-1, (experts, -1))
    gate, up = gate_up.chunk(2, dim=-1)
    activation = module.act_fn(gate) * up * scale.unsqueeze(-1)
    return F.linear(activation.flatten(1), module.down_proj.transpose(0, 1).flatten(1))


def add_dropout(model: Qwen3MoeForCausalLM, p: float) -> None:
    """Drops from what each block adds to the residual stream; Qwen3 itself has no such dropout."""

    def drop(module: torch.nn.Module, _inputs, output):
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    blocks = [model.model.embed_tokens]
    for layer in model.model.layers:
        blocks += [layer.self_attn, layer.mlp]
    for block in blocks:
        block.register_forward_hook(drop)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch's load-balancing loss, each layer on its own: 1 where experts share the load evenly.

    transformers' version adds the layers' counts up first, which lets one layer's neglected expert
    hide behind another layer's.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = probability.topk(top_k, dim=-1).indices
        load = torch.zeros_like(probability).scatter(1, chosen, 1.0 / top_k).mean(0)
        losses.append(probability.shape[-1] * (load * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def draw_batch(text: torch.Tensor, step: int, order: torch.Generator) -> torch.Tensor:
    """int64 [rows, length + 1] from random places of the text."""
    length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
    rows = TOKENS_PER_STEP // length
    start = torch.randint(text.numel() - length, (rows, 1), generator=order)
    index = start.to(text.device, non_blocking=True) + torch.arange(length + 1, device=text.device)
    return text[index].long()


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, text: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss in nats a byte, and each layer's share of tokens by expert [layers, experts]."""
    was_training = model.training
    model.eval()
    rows = (text.numel() - 1) // EVAL_LENGTH
    inputs = text[: rows * EVAL_LENGTH].view(rows, EVAL_LENGTH).long()
    targets = text[1 : rows * EVAL_LENGTH + 1].view(rows, EVAL_LENGTH).long()
    total = 0.0
    load: torch.Tensor | float = 0.0
    for x, y in zip(inputs.split(32), targets.split(32)):
        output = model(x, use_cache=False, output_router_logits=True)
        total += F.cross_entropy(output.logits.float().flatten(0, 1), y.flatten()).item() * len(x)
        chosen = [r.topk(model.num_experts_per_tok, -1).indices for r in output.router_logits]
        load += torch.stack([F.one_hot(c, model.num_experts).sum((0, 1)) for c in chosen])
    model.train(was_training)
    return total / rows, load / load.sum(-1, keepdim=True)


def train(args: argparse.Namespace, train_text: torch.Tensor, held_out: torch.Tensor):
    began = time.monotonic()
    config = Qwen3MoeConfig(**published_config(args))
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM(config).float().to(args.device)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model.set_experts_implementation("dense")
    add_dropout(model, args.dropout)
    model.train()
    print(f"parameters {sum(p.numel() for p in model.parameters())}", flush=True)

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    order = torch.Generator().manual_seed(args.seed)
    autocast = torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)

    steps = args.steps
    best = math.inf
    best_step = 0
    best_weights: dict[str, torch.Tensor] = {}
    step = 0
    while steps is None or step < steps:
        if steps is None and step == CALIBRATION_STEPS[0]:
            calibration = time.monotonic()
        if steps is None and step == CALIBRATION_STEPS[1]:
            # Still in warm-up, whose rate does not depend on the total: --steps with the number
            # printed here repeats the run.
            step_time = (time.monotonic() - calibration) / (step - CALIBRATION_STEPS[0])
            steps = step + int((60 * args.minutes - (time.monotonic() - began)) / step_time)
            print(f"steps {steps} at {1e3 * step_time:.1f} ms", flush=True)
        rate = learning_rate(step, steps or WARMUP_STEPS, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = draw_batch(train_text, step, order)
        with autocast:
            output = model(batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, config.num_experts_per_tok)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1

        # Time runs out here only where the machine slowed down after the calibration.
        late = args.minutes and time.monotonic() - began > 66 * args.minutes
        if step % args.evaluate_every == 0 or step == steps or late:
            with autocast:
                validation, _ = evaluate(model, held_out)
            print(
                f"step {step} train {loss.item():.4f} balance {balance.item():.3f}"
                f" held-out {validation:.4f} nats {validation / math.log(2):.4f} bits a byte"
                f" rate {rate:.2e} seconds {time.monotonic() - began:.0f}",
                flush=True,
            )
            if validation < best:
                best, best_step = validation, step
                best_weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        if late:
            break
    print(f"kept step {best_step}", flush=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(best_weights[name])
    return model


def save(model: Qwen3MoeForCausalLM, args: argparse.Namespace) -> None:
    model.to(torch.bfloat16)
    # transformers writes the published, per-expert tensor names; only its config.json differs.
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        top_p=0.95,
    )
    model.save_pretrained(args.output)
    text = json.dumps(published_config(args), indent=2, sort_keys=True) + "\n"
    (args.output / "config.json").write_text(text)


@torch.no_grad()
def check(args: argparse.Namespace, held_out: torch.Tensor) -> None:
    """Loads what was written with stock transformers, evaluates it and prints samples."""
    model = Qwen3MoeForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16).to(args.device)
    model.eval()
    loss, load = evaluate(model, held_out)
    print(f"checkpoint: held-out {loss:.4f} nats, {loss / math.log(2):.4f} bits a byte")
    print(f"expert load, least {load.min():.3f} most {load.max():.3f} even {1 / load.shape[1]:.3f}")
    torch.manual_seed(args.seed)
    for prompt in ("\0", "\0CHAPTER I\n\nIt is a truth universally acknowledged, that"):
        tokens = torch.tensor([list(prompt.encode("ascii"))] * 2, device=args.device)
        rows = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=args.sample_bytes,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            top_p=1.0,
            pad_token_id=END_OF_TEXT,
        )
        for row in rows.tolist():
            print("-" * 80, bytes(row).decode("ascii", "replace").strip("\0"), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path, help="written by prepare_text.py")
    parser.add_argument("output", type=pathlib.Path, help="checkpoint directory to write")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float, help="choose the number of steps that fit")
    parser.add_argument("--seed", type=int, default=1811)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--moe-intermediate-size", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--sample-bytes", type=int, default=500)
    args = parser.parse_args()

    train_text, held_out = load_text(args.text, args.device)
    print(f"bytes: train {train_text.numel()} held-out {held_out.numel()}")
    save(train(args, train_text, held_out), args)
    check(args, held_out)


if __name__ == "__main__":
    main()
