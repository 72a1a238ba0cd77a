"""Times the MoE peers at the shapes, routings and token counts of moe_bench."""

import itertools
import sys

import torch

import inputs
import moe_torch
import moe_triton
import timing

OP = "moe_layer"
DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3"}


def logits_of(shape, tokens, routing, seed):
    """[tokens, experts] on the device, as moe_bench has them."""
    count = tokens * shape.num_experts
    f32 = dict(dtype=torch.float32, device="cuda")
    base = torch.tensor(inputs.base_logits(shape.num_experts, routing, seed), **f32)
    noise = torch.tensor(inputs.noise(routing, seed), **f32)
    noise = noise.repeat(count // noise.numel() + 1)[:count]
    return base + noise.view(tokens, shape.num_experts)


def weights_of(shape, fp8):
    """Random weights of one layer, gate and up side by side in one tensor."""
    e, h, i = shape.num_experts, shape.hidden, shape.intermediate

    def matrices(rows, cols):
        m = torch.empty((e, rows, cols), dtype=torch.bfloat16, device="cuda")
        m.normal_(0, 100 if fp8 else 0.02)
        if not fp8:
            return m
        out = torch.empty(m.shape, dtype=torch.float8_e4m3fn, device="cuda")
        for expert in range(e):  # bounds the memory of the conversion
            out[expert].copy_(m[expert].clamp_(-448, 448))
        return out

    def scales(*size):
        return torch.rand(size, device="cuda") * 1e-4 + 1.5e-4

    w = {"gate": matrices(i, h), "up": matrices(i, h), "down": matrices(h, i)}
    if fp8:
        groups = moe_triton.num_groups
        for name, rows, cols in (("gate", i, h), ("up", i, h), ("down", h, i)):
            w[name + "_scales"] = scales(e, groups(rows), groups(cols))
        w["gate_up_channel"], w["down_channel"] = scales(e, 2 * i), scales(e, h)
    return w


def packed(w):
    """The same layer for peers that want gate and up in one tensor."""
    raw = [w[n].view(torch.uint8) for n in ("gate", "up")]
    both = torch.cat(raw, 1).view(w["gate"].dtype)
    return dict(w, gate_up=both)


def expert_bytes(shape, fp8):
    return 3 * shape.hidden * shape.intermediate * (1 if fp8 else 2)


class Case:
    """One shape, dtype, routing and number of tokens."""

    def __init__(self, shape, fp8, routing, tokens, layers, timer):
        self.shape, self.fp8, self.routing, self.tokens = shape, fp8, routing, tokens
        self.layers, self.timer = layers, timer
        self.results = []
        distinct = self._distinct(logits_of(shape, tokens, routing, 0))
        sets = timing.num_sets(distinct * expert_bytes(shape, fp8))
        self.sets = []
        for seed in range(sets):
            logits = logits_of(shape, tokens, routing, seed)
            x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
            self.sets.append(
                (logits, x, layers[seed % len(layers)], torch.empty_like(x)))

    def _distinct(self, logits):
        return logits.topk(self.shape.top_k).indices.unique().numel()

    def add(self, who, us):
        result = dict(op=OP, shape=self.shape.name, tokens=self.tokens,
                      dtype=DTYPES["fp8" if self.fp8 else "bf16"],
                      note=self.routing, who=who, us=us)
        self.results.append(result)

    def run(self, who, call, eager=False):
        """call(logits, x, weights, out). A peer that cannot is said and left
        out."""
        try:
            time = self.timer.eager if eager else self.timer.graph
            self.add(who, time(len(self.sets), lambda i: call(*self.sets[i])))
        except Exception as error:  # torch raises many kinds
            print(f"{who} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()

    def triton(self, who, tries):
        per_expert = self.tokens * self.shape.top_k / self.shape.num_experts
        best = None
        for config in moe_triton.candidates(per_expert, self.fp8)[:tries]:
            layer = moe_triton.TritonMoe(self.shape, self.tokens, self.fp8, config)
            before = len(self.results)
            self.run(who, layer)
            for result in self.results[before:]:
                if best is None or result["us"] < best["us"]:
                    best = result
            del self.results[before:]
        self.results += [best] if best else []

    def ceiling(self):
        """cuBLAS's batched products of as many rows per expert."""
        shape = self.shape
        rows = self.tokens * shape.top_k // shape.num_experts
        if self.fp8 or rows < 1:
            return
        e = shape.num_experts

        def empty(cols):
            return torch.randn((e, rows, cols), device="cuda").bfloat16()

        a, y = empty(shape.hidden), empty(shape.hidden)
        h = empty(2 * shape.intermediate)
        self.run("ceiling: cublas bmm",
                 lambda l, x, w, o: moe_torch.balanced_products(a, w, h, y))


def run_case(case, tries, with_eager):
    top_k = case.shape.top_k
    case.triton("triton fused", tries)
    if case.fp8:
        case.run("torch scaled_grouped_mm",
                 lambda *a: moe_torch.scaled_grouped(*a, top_k))
        return case.results
    case.run("torch grouped_mm", lambda *a: moe_torch.grouped(*a, top_k))
    if case.tokens * top_k <= 64:
        case.run("torch batched_mm", lambda *a: moe_torch.batched(*a, top_k))
    if with_eager:
        case.run("torch loop", lambda *a: moe_torch.loop(*a, top_k), eager=True)
    case.ceiling()
    return case.results


def check(shape):
    """The Triton layer against the loop in float32."""
    for fp8, tokens in itertools.product((False, True), (1, 33)):
        w = weights_of(shape, fp8)
        logits = logits_of(shape, tokens, "uniform", 0)
        x = torch.randn(tokens, shape.hidden, device="cuda").bfloat16()
        out = torch.empty_like(x)
        config = moe_triton.candidates(tokens * shape.top_k / shape.num_experts, fp8)[0]
        moe_triton.TritonMoe(shape, tokens, fp8, config)(logits, x, w, out)
        expected = torch.empty(x.shape, device="cuda")
        moe_torch.loop(logits, x.float(), moe_torch.dequantized(w), expected,
                       shape.top_k)
        error = ((out.float() - expected).norm() / expected.norm()).item()
        # Quantised activations are off by 4 %, bfloat16 ones by 0.5 %.
        limit = 0.08 if fp8 else 0.02
        if not error < limit:
            raise SystemExit(f"the Triton layer is wrong: fp8 {fp8}, {tokens} "
                             f"tokens, relative error {error}")


def run(shapes, dtypes, routings, tokens, tries=3, with_eager=False):
    timer = timing.Timer()
    results = []
    check(shapes[0])
    for shape, dtype in itertools.product(shapes, dtypes):
        fp8 = dtype == "fp8"
        count = timing.num_sets(expert_bytes(shape, fp8) * shape.top_k)
        layers = [packed(weights_of(shape, fp8)) for _ in range(count)]
        for routing, n in itertools.product(routings, tokens):
            case = Case(shape, fp8, routing, n, layers, timer)
            results += run_case(case, tries, with_eager)
            del case
            torch.cuda.empty_cache()
        del layers
        torch.cuda.empty_cache()
    return results
