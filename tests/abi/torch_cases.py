"""What torch_test.py compares: the device and its shapes, the bounds, and each
op's inputs with what torch computes from them in float64."""

import argparse
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINDING = ROOT / "examples/python"
U32 = 2.0**-24


def find_library():
    for folder in ("abi", "bazel-bin/abi", "lib"):
        if (ROOT / folder / "libtenon.so.1").exists():
            return str(ROOT / folder / "libtenon.so.1")
    return "libtenon.so.1"


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--library", default=find_library())
    parser.add_argument("--filter", default="", help="part of a check's name")
    return parser.parse_args()


ARGS = parse_arguments()
os.environ["TENON_LIBRARY"] = os.path.abspath(ARGS.library)
sys.path.insert(0, str(BINDING))

import torch  # noqa: E402

import tenon  # noqa: E402

DEVICE = torch.device(ARGS.device)
CUDA = DEVICE.type == "cuda"
TOKENS = (0, 1, 13, 512) if CUDA else (0, 1, 13, 64)
DTYPES = (torch.bfloat16, torch.float32)

# Qwen3-30B-A3B; a quarter of its width on the CPU.
HIDDEN = 2048 if CUDA else 512
NUM_EXPERTS = 128 if CUDA else 32
INTERMEDIATE = 768 if CUDA else 192
TOP_K = 8
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = (32, 4, 128) if CUDA else (8, 2, 128)
VOCAB = 151936 if CUDA else 20000
PAGE_SIZE = 16
EPSILON = 1e-6


class CheckFailed(Exception):
    pass


def require(condition, message):
    if not condition:
        raise CheckFailed(message)


def unit(dtype):
    return torch.finfo(dtype).eps / 2


def within(actual, exact, bound):
    """|actual - exact| <= bound everywhere; the largest part of it used."""
    require(actual.shape == exact.shape, f"shape {tuple(actual.shape)}")
    if actual.numel() == 0:
        return "empty"
    require(bool(torch.isfinite(actual).all()), "not finite")
    error = (actual.double() - exact).abs()
    used = (error / bound.clamp_min(torch.finfo(actual.dtype).tiny)).max().item()
    require(used <= 1, f"an error of {used:.3g} times its bound")
    return f"{used:.0%} of the bound"


def no_worse(actual, exact, torchs):
    """The mean error is not larger than that of torch in the same dtype."""
    if actual.numel() == 0:
        return "empty"
    mine = (actual.double() - exact).square().mean().sqrt().item()
    theirs = (torchs.double() - exact).square().mean().sqrt().item()
    require(mine <= 1.02 * theirs, f"error {mine:.3g}, torch has {theirs:.3g}")
    return f"error {mine:.2g}, torch's {theirs:.2g}"


def same_bits(actual, expected, what):
    a, b = (t.contiguous().view(torch.uint8) for t in (actual, expected))
    require(torch.equal(a, b), f"{what}: other bits")


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)
    return (values * scale).to(dtype)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


class QkNorm:
    """A packed QKV row of Qwen3 with its rotary table and paged cache."""

    def __init__(self, dtype, tokens, seed=0):
        self.dtype, self.tokens = dtype, tokens
        heads = NUM_Q_HEADS + 2 * NUM_KV_HEADS
        self.qkv = normal(tokens, heads * HEAD_DIM, dtype=dtype, seed=seed)
        self.q_weight = normal(HEAD_DIM, dtype=dtype, seed=seed + 1)
        self.k_weight = normal(HEAD_DIM, dtype=dtype, seed=seed + 2)
        inverse = 1e6 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
        angles = torch.arange(4096, dtype=torch.float64)[:, None] * inverse
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1).float().to(DEVICE)
        self.positions = (torch.arange(tokens) * 7 % 4096).to(DEVICE)
        pages = (tokens + PAGE_SIZE - 1) // PAGE_SIZE + 1
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randperm(pages * PAGE_SIZE, generator=generator)[:tokens]
        self.slots = slots.to(DEVICE)
        shape = (2, pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.caches = torch.full(shape, 3.0, dtype=dtype, device=DEVICE)

    def heads(self):
        split = self.qkv.unflatten(1, (-1, HEAD_DIM))
        return split.split([NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)

    def run(self, **options):
        tenon.qk_norm_packed(
            self.qkv,
            self.q_weight,
            self.k_weight,
            num_q_heads=NUM_Q_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            epsilon=EPSILON,
            cos_sin=self.cos_sin,
            positions=self.positions,
            k_cache=self.caches[0],
            v_cache=self.caches[1],
            slot_mapping=self.slots,
            **options,
        )

    def run_strided(self):
        q, k, v = self.heads()
        tenon.qk_norm(
            q,
            k,
            self.q_weight,
            self.k_weight,
            v=v,
            epsilon=EPSILON,
            cos_sin=self.cos_sin,
            positions=self.positions,
            k_cache=self.caches[0],
            v_cache=self.caches[1],
            slot_mapping=self.slots,
        )

    def exact(self, x, weight):
        """The rotated heads in float64, and how far rounding may take them."""
        x = x.double()
        x = x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
        cos, sin = self.cos_sin[self.positions].double()[:, None].chunk(2, -1)
        a, b = x.chunk(2, -1)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        size = torch.cat(
            [(a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()], -1
        )
        u = unit(self.dtype) * 1.01
        return rotated, u * size + u * rotated.abs() + 8 * U32 * size


class Attention:
    """A ragged batch over a paged cache: decode rows and chunks of prefill."""

    def __init__(self, dtype, lengths, seed=0):
        self.lengths = lengths  # (queries, cached tokens) of each sequence
        starts = [0]
        for n, _ in lengths:
            starts.append(starts[-1] + n)
        pages = [(kv + PAGE_SIZE - 1) // PAGE_SIZE for _, kv in lengths]
        order = torch.randperm(
            sum(pages), generator=torch.Generator().manual_seed(seed)
        )
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for i, n in enumerate(pages):
            table[i, :n] = order[sum(pages[:i]) :][:n]
        shape = (2, sum(pages), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.cache = normal(*shape, dtype=dtype, seed=seed)
        self.q = normal(starts[-1], NUM_Q_HEADS, HEAD_DIM, dtype=dtype, seed=seed + 1)
        self.table = table.to(DEVICE)
        self.starts = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
        self.kv_len = torch.tensor(
            [n for _, n in lengths], dtype=torch.int32, device=DEVICE
        )

    def arguments(self):
        return (
            self.q,
            self.cache[0],
            self.cache[1],
            self.table,
            self.starts,
            self.kv_len,
        )

    def exact(self):
        """In float64, and the sum of |p v|."""
        out = torch.empty_like(self.q, dtype=torch.float64)
        size = torch.empty_like(out)
        repeats = NUM_Q_HEADS // NUM_KV_HEADS
        begin = 0
        for i, (n, kv) in enumerate(self.lengths):
            pages = self.table[i, : (kv + PAGE_SIZE - 1) // PAGE_SIZE].long()
            k, v = (
                c[pages].reshape(-1, NUM_KV_HEADS, HEAD_DIM)[:kv].double()
                for c in self.cache
            )
            k, v = (t.repeat_interleave(repeats, 1).transpose(0, 1) for t in (k, v))
            q = self.q[begin : begin + n].double().transpose(0, 1)
            scores = q @ k.transpose(1, 2) * HEAD_DIM**-0.5
            last = torch.arange(kv - n, kv, device=DEVICE)[:, None]
            future = torch.arange(kv, device=DEVICE) > last
            p = scores.masked_fill(future, -torch.inf).softmax(-1)
            out[begin : begin + n] = (p @ v).transpose(0, 1)
            size[begin : begin + n] = (p @ v.abs()).transpose(0, 1)
            begin += n
        return out, size


class Moe:
    """The expert part of a layer, its experts packed as w13 and w2."""

    weights = {}  # by dtype: the largest tensors here

    def __init__(self, dtype, tokens, seed=0):
        if dtype not in Moe.weights:
            Moe.weights.clear()
            w13 = normal(
                NUM_EXPERTS,
                2 * INTERMEDIATE,
                HIDDEN,
                dtype=dtype,
                seed=90,
                scale=HIDDEN**-0.5,
            )
            w2 = normal(
                NUM_EXPERTS,
                HIDDEN,
                INTERMEDIATE,
                dtype=dtype,
                seed=91,
                scale=INTERMEDIATE**-0.5,
            )
            Moe.weights[dtype] = w13, w2
        self.w13, self.w2 = Moe.weights[dtype]
        self.dtype = dtype
        self.x = normal(tokens, HIDDEN, dtype=dtype, seed=seed)
        logits = normal(tokens, NUM_EXPERTS, seed=seed + 1)
        self.topk_weights, self.topk_ids = tenon.moe_router(logits, TOP_K)

    def arguments(self):
        gate, up = self.w13[:, :INTERMEDIATE], self.w13[:, INTERMEDIATE:]
        return self.x, self.topk_weights, self.topk_ids, gate, up, self.w2

    def compute(self, dtype):
        """Expert by expert, as Hugging Face's module does, in a dtype; and the
        magnitude of what is summed."""
        out = torch.zeros(len(self.x), HIDDEN, dtype=dtype, device=DEVICE)
        size = torch.zeros_like(out)
        for e in range(NUM_EXPERTS):
            row, column = (self.topk_ids == e).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            gate, up = (self.x[row].to(dtype) @ self.w13[e].to(dtype).T).chunk(2, -1)
            h = torch.nn.functional.silu(gate) * up
            weight = self.topk_weights[row, column, None].to(dtype)
            w2 = self.w2[e].to(dtype).T
            out.index_add_(0, row, (h @ w2) * weight)
            size.index_add_(0, row, (h.abs() @ w2.abs()) * weight)
        return out, size


def packed(rows):
    memory = tenon.SamplingParams.pack(rows)
    return torch.frombuffer(memory, dtype=torch.uint8).view(-1, 128).to(DEVICE)


def filtered(logits, options):
    """Sequential filters: top-k, top-p of what it kept, min-p."""
    p, order = logits.softmax(-1).sort(descending=True)
    keep = torch.arange(len(p)) < (options.get("top_k") or len(p))
    p = torch.where(keep, p, 0.0) / p[keep].sum()
    keep &= p.cumsum(0) - p < options.get("top_p", 1.0)
    keep &= p >= options.get("min_p", 0.0) * p[0]
    p = torch.where(keep, p, 0.0)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


class Layer:
    """Calls of a layer's parts with nothing left to allocate."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.qk = QkNorm(torch.bfloat16, tokens)
        self.qkv_in = self.qk.qkv.clone()
        self.attention = Attention(torch.bfloat16, [(tokens, tokens + 100)])
        self.moe = Moe(torch.bfloat16, tokens)
        self.hidden = self.moe.x
        self.router_logits = normal(tokens, NUM_EXPERTS)
        self.logits = normal(tokens, VOCAB, dtype=torch.bfloat16)
        self.weight = normal(HIDDEN, dtype=torch.bfloat16)
        self.params = packed(
            [tenon.SamplingParams(seed=r, top_p=0.9, top_k=40) for r in range(tokens)]
        )
        self.normed = torch.empty_like(self.hidden)
        self.attended = torch.empty_like(self.attention.q)
        self.out = torch.empty_like(self.hidden)
        self.tokens_out = torch.empty(tokens, dtype=torch.int32, device=DEVICE)
        self.statuses = torch.empty_like(self.tokens_out)
        sizes = (
            tenon.attention_workspace_size(*self.attention.arguments()),
            tenon.moe_workspace_size(*self.moe.arguments()),
            tenon.sampler_workspace_size(self.logits, self.params),
        )
        self.workspace = torch.empty(max(sizes), dtype=torch.uint8, device=DEVICE)

    def randomise(self, seed):
        for i, t in enumerate(
            (self.qkv_in, self.hidden, self.router_logits, self.logits)
        ):
            t.copy_(normal(*t.shape, seed=100 * seed + i))
        self.attention.q.copy_(normal(*self.attention.q.shape, seed=100 * seed + 9))

    def run(self):
        self.qk.qkv.copy_(self.qkv_in)
        self.ops()

    def ops(self):
        w = self.workspace
        tenon.rms_norm(self.hidden, self.weight, out=self.normed)
        self.qk.run()
        tenon.attention(*self.attention.arguments(), out=self.attended, workspace=w)
        tenon.moe_router(
            self.router_logits,
            TOP_K,
            topk_weights=self.moe.topk_weights,
            topk_ids=self.moe.topk_ids,
        )
        tenon.moe(*self.moe.arguments(), out=self.out, workspace=w)
        tenon.sampler(
            self.logits,
            self.params,
            tokens=self.tokens_out,
            statuses=self.statuses,
            workspace=w,
        )

    def results(self):
        tensors = (
            self.normed,
            self.qk.qkv,
            self.qk.caches,
            self.attended,
            self.moe.topk_weights,
            self.moe.topk_ids,
            self.out,
            self.tokens_out,
            self.statuses,
        )
        return [t.clone() for t in tensors]
