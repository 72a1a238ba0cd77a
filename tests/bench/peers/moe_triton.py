"""A fused MoE layer in plain Triton, of the design that is common today: top-k,
slots sorted by expert into blocks, a grouped matrix product with SwiGLU, a
second one with the routing weights, a sum. bfloat16, or float8_e4m3 with scales
of 128 x 128 blocks of weights and 1 x 128 of activations."""

import torch
import triton
import triton.language as tl

GROUP = 128  # of scales


@triton.jit
def topk_kernel(logits, weights, ids, num_experts, EXPERTS: tl.constexpr,
                TOP_K: tl.constexpr):
    token = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    v = tl.load(logits + token * num_experts + e, mask=e < num_experts,
                other=float("-inf"))
    total = 0.0
    first = tl.max(v, axis=0)
    j = tl.arange(0, TOP_K)
    chosen = tl.zeros([TOP_K], tl.int32)
    scores = tl.zeros([TOP_K], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(v, axis=0)
        expert = tl.argmax(v, axis=0)
        score = tl.exp(best - first)
        total += score
        chosen = tl.where(j == k, expert, chosen)
        scores = tl.where(j == k, score, scores)
        v = tl.where(e == expert, float("-inf"), v)
    tl.store(weights + token * TOP_K + j, scores / total)
    tl.store(ids + token * TOP_K + j, chosen)


@triton.jit
def clear_kernel(counts, sorted_slots, num_counts, num_slots,
                 BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + i, tl.zeros([BLOCK], tl.int32), mask=i < num_counts)
    tl.store(sorted_slots + i, tl.full([BLOCK], -1, tl.int32),
             mask=i < num_slots)


@triton.jit
def count_kernel(ids, counts, num_slots, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_slots
    expert = tl.load(ids + i, mask=mask, other=0)
    tl.atomic_add(counts + expert, 1, mask=mask)


@triton.jit
def offsets_kernel(counts, cursor, block_experts, num_experts, num_blocks,
                   EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK: tl.constexpr):
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = tl.cumsum(padded, axis=0)
    if tl.program_id(0) == 0:
        tl.store(cursor + e, end - padded, mask=e < num_experts)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = block * BLOCK_M
    expert = tl.sum((at[:, None] >= end[None, :]).to(tl.int32), axis=1)
    expert = tl.where(expert < num_experts, expert, -1)
    tl.store(block_experts + block, expert, mask=block < num_blocks)


@triton.jit
def scatter_kernel(ids, cursor, sorted_slots, num_slots, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_slots
    expert = tl.load(ids + i, mask=mask, other=0)
    at = tl.atomic_add(cursor + expert, 1, mask=mask)
    tl.store(sorted_slots + at, i, mask=mask)


@triton.jit
def quantize_kernel(x, q, scales, cols, num_groups, GROUP: tl.constexpr,
                    ROWS: tl.constexpr, num_rows):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    col = group * GROUP + tl.arange(0, GROUP)
    mask = (row < num_rows)[:, None] & (col < cols)[None, :]
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(v), axis=1), 1e-10)
    tl.store(q + at, (v * (448.0 / amax)[:, None]).to(tl.float8e4nv), mask=mask)
    tl.store(scales + row * num_groups + group, amax / 448.0,
             mask=row < num_rows)


@triton.jit
def block_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Blocks in an order that finds weights and tokens in the L2."""
    in_group = GROUP_M * num_n
    first = pid // in_group * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit
def slots_of(ids, sorted_slots, block_experts, m, num_slots,
             BLOCK_M: tl.constexpr, DIRECT: tl.constexpr):
    """The expert of block m, and its slots; -1 where there is none. DIRECT: a
    block has one slot, as is best for a few."""
    rows = tl.arange(0, BLOCK_M)
    if DIRECT:
        expert = tl.load(ids + m)
        slots = tl.where(rows == 0, m, -1)
    else:
        expert = tl.load(block_experts + m)
        slots = tl.load(sorted_slots + m * BLOCK_M + rows)
    return expert, slots


@triton.jit
def gate_up_kernel(x, xs, gate, gs, up, us, h, ids, sorted_slots, block_experts,
                   num_slots, num_m, hidden, intermediate, top_k, depth_groups,
                   row_groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
                   FP8: tl.constexpr, GROUP: tl.constexpr,
                   DIRECT: tl.constexpr):
    m, n = block_of(tl.program_id(0), num_m, tl.cdiv(intermediate, BLOCK_N),
                    GROUP_M)
    expert, slots = slots_of(ids, sorted_slots, block_experts, m, num_slots,
                             BLOCK_M, DIRECT)
    if expert < 0:
        return
    valid = slots >= 0
    token = tl.where(valid, slots, 0) // top_k
    col = n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a = x + token.to(tl.int64)[:, None] * hidden + depth[None, :]
    first = expert.to(tl.int64) * intermediate * hidden
    b = first + col[None, :] * hidden + depth[:, None]
    in_cols = (col < intermediate)[None, :]
    acc_g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    scale_at = (expert * row_groups + col // GROUP) * depth_groups
    for k in range(0, hidden, BLOCK_K):
        in_depth = depth < hidden - k
        av = tl.load(a + k, mask=valid[:, None] & in_depth[None, :], other=0.0)
        mask = in_cols & in_depth[:, None]
        gv = tl.load(gate + b + k, mask=mask, other=0.0)
        uv = tl.load(up + b + k, mask=mask, other=0.0)
        if FP8:
            group = k // GROUP
            s = tl.load(xs + token * depth_groups + group)
            sg = tl.load(gs + scale_at + group, mask=col < intermediate,
                         other=0.0)
            su = tl.load(us + scale_at + group, mask=col < intermediate,
                         other=0.0)
            acc_g += tl.dot(av, gv) * (s[:, None] * sg[None, :])
            acc_u += tl.dot(av, uv) * (s[:, None] * su[None, :])
        else:
            acc_g = tl.dot(av, gv, acc_g)
            acc_u = tl.dot(av, uv, acc_u)
    out = acc_g * tl.sigmoid(acc_g) * acc_u
    to = h + slots.to(tl.int64)[:, None] * intermediate + col[None, :]
    tl.store(to, out.to(tl.bfloat16), mask=valid[:, None] & in_cols)


@triton.jit
def down_kernel(h, hs, down, ds, y, weights, ids, sorted_slots, block_experts,
                num_slots, num_m, hidden, intermediate, depth_groups,
                row_groups, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
                FP8: tl.constexpr, GROUP: tl.constexpr, DIRECT: tl.constexpr):
    m, n = block_of(tl.program_id(0), num_m, tl.cdiv(hidden, BLOCK_N), GROUP_M)
    expert, slots = slots_of(ids, sorted_slots, block_experts, m, num_slots,
                             BLOCK_M, DIRECT)
    if expert < 0:
        return
    valid = slots >= 0
    row = tl.where(valid, slots, 0)
    col = n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a = h + row.to(tl.int64)[:, None] * intermediate + depth[None, :]
    first = expert.to(tl.int64) * hidden * intermediate
    b = down + first + col[None, :] * intermediate + depth[:, None]
    in_cols = (col < hidden)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    scale_at = (expert * row_groups + col // GROUP) * depth_groups
    for k in range(0, intermediate, BLOCK_K):
        in_depth = depth < intermediate - k
        av = tl.load(a + k, mask=valid[:, None] & in_depth[None, :], other=0.0)
        bv = tl.load(b + k, mask=in_cols & in_depth[:, None], other=0.0)
        if FP8:
            group = k // GROUP
            s = tl.load(hs + row * depth_groups + group)
            sd = tl.load(ds + scale_at + group, mask=col < hidden, other=0.0)
            acc += tl.dot(av, bv) * (s[:, None] * sd[None, :])
        else:
            acc = tl.dot(av, bv, acc)
    w = tl.load(weights + row, mask=valid, other=0.0)
    to = y + row.to(tl.int64)[:, None] * hidden + col[None, :]
    tl.store(to, (acc * w[:, None]).to(tl.bfloat16),
             mask=valid[:, None] & in_cols)


@triton.jit
def sum_kernel(y, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(y + (token * TOP_K + j) * hidden + col, mask=mask,
                         other=0.0).to(tl.float32)
    tl.store(out + token * hidden + col, total.to(tl.bfloat16), mask=mask)


# BLOCK_M, BLOCK_N, BLOCK_K of gate_up, then of down; num_warps, num_stages.
# Several are tried for each number of tokens and the fastest counts. fp8 has
# one scale per 128 of the depth, so its BLOCK_K is 128.
def candidates(slots_per_expert, fp8):
    if slots_per_expert <= 8:
        sizes = [(16, 64, 128, 64, 4, 4), (16, 32, 128, 128, 4, 4),
                 (16, 128, 128, 128, 4, 3)]
    elif slots_per_expert <= 40:
        sizes = [(16, 64, 128, 128, 4, 4), (32, 64, 128, 128, 4, 4),
                 (64, 64, 128, 128, 4, 3)]
    elif slots_per_expert <= 100:
        sizes = [(64, 64, 64, 128, 4, 4), (64, 128, 64, 128, 8, 4),
                 (128, 64, 64, 128, 8, 4)]
    else:
        sizes = [(64, 128, 64, 128, 4, 4), (128, 64, 64, 128, 8, 4),
                 (128, 128, 64, 256, 8, 3)]
    return [
        dict(block_m=m, gate_up_n=n, down_n=dn, block_k=GROUP if fp8 else k,
             warps=w, stages=min(s, 3) if fp8 else s)
        for m, n, k, dn, w, s in sizes
    ]


def num_groups(size):
    return (size + GROUP - 1) // GROUP


class TritonMoe:
    """The layer for one number of tokens, with the memory that it needs.

    weights: dict of gate, up [experts, intermediate, hidden], down [experts,
    hidden, intermediate]; in fp8 also gate_scales, up_scales, down_scales.
    """

    def __init__(self, shape, tokens, fp8, config, device="cuda"):
        self.shape, self.tokens, self.fp8, self.config = shape, tokens, fp8, config
        slots, experts = tokens * shape.top_k, shape.num_experts
        block_m = config["block_m"]
        # So few slots that hardly two share an expert.
        self.direct = slots * 4 <= experts
        self.blocks = slots if self.direct else min(
            slots, (slots + experts * (block_m - 1)) // block_m)

        def empty(*size, dtype=torch.bfloat16):
            return torch.empty(size, dtype=dtype, device=device)

        self.weights = empty(slots, dtype=torch.float32)
        self.ids = empty(slots, dtype=torch.int32)
        self.counts = empty(experts, dtype=torch.int32)
        self.cursor = empty(experts, dtype=torch.int32)
        self.sorted_slots = empty(self.blocks * block_m, dtype=torch.int32)
        self.block_experts = empty(self.blocks, dtype=torch.int32)
        self.h = empty(slots, shape.intermediate)
        self.y = empty(slots, shape.hidden)
        if fp8:
            f8, f32 = torch.float8_e4m3fn, torch.float32
            self.xq = empty(tokens, shape.hidden, dtype=f8)
            self.xs = empty(tokens, num_groups(shape.hidden), dtype=f32)
            self.hq = empty(slots, shape.intermediate, dtype=f8)
            self.hs = empty(slots, num_groups(shape.intermediate), dtype=f32)

    def _align(self):
        slots, experts = self.tokens * self.shape.top_k, self.shape.num_experts
        padded = triton.next_power_of_2(experts)
        clear = max(self.sorted_slots.numel(), experts)
        clear_kernel[(triton.cdiv(clear, 1024),)](
            self.counts, self.sorted_slots, experts, self.sorted_slots.numel(),
            BLOCK=1024)
        grid = (triton.cdiv(slots, 256),)
        count_kernel[grid](self.ids, self.counts, slots, BLOCK=256)
        offsets_kernel[(triton.cdiv(self.blocks, 64),)](
            self.counts, self.cursor, self.block_experts, experts, self.blocks,
            EXPERTS=padded, BLOCK_M=self.config["block_m"], BLOCK=64)
        scatter_kernel[grid](self.ids, self.cursor, self.sorted_slots, slots,
                             BLOCK=256)

    def _quantize(self, x, q, scales):
        rows, cols = x.shape
        quantize_kernel[(triton.cdiv(rows, 4), num_groups(cols))](
            x, q, scales, cols, num_groups(cols), GROUP=GROUP, ROWS=4,
            num_rows=rows, num_warps=4)

    def __call__(self, logits, x, w, out):
        shape, c = self.shape, self.config
        slots = self.tokens * shape.top_k
        topk_kernel[(self.tokens,)](
            logits, self.weights, self.ids, shape.num_experts,
            EXPERTS=triton.next_power_of_2(shape.num_experts),
            TOP_K=shape.top_k, num_warps=1)
        if not self.direct:
            self._align()
        xs = hs = x  # never read
        scales = {n: x for n in ("gate_scales", "up_scales", "down_scales")}
        if self.fp8:
            self._quantize(x, self.xq, self.xs)
            x, xs, scales = self.xq, self.xs, w
        depth, rows = num_groups(shape.hidden), num_groups(shape.intermediate)
        common = dict(BLOCK_M=c["block_m"], BLOCK_K=c["block_k"], GROUP_M=8,
                      FP8=self.fp8, GROUP=GROUP, DIRECT=self.direct,
                      num_warps=c["warps"], num_stages=c["stages"])
        placing = (self.ids, self.sorted_slots, self.block_experts, slots,
                   self.blocks, shape.hidden, shape.intermediate)
        n = triton.cdiv(shape.intermediate, c["gate_up_n"])
        gate_up_kernel[(self.blocks * n,)](
            x, xs, w["gate"], scales["gate_scales"], w["up"],
            scales["up_scales"], self.h, *placing, shape.top_k, depth, rows,
            BLOCK_N=c["gate_up_n"], **common)
        h = self.h
        if self.fp8:
            self._quantize(h, self.hq, self.hs)
            h, hs = self.hq, self.hs
        n = triton.cdiv(shape.hidden, c["down_n"])
        down_kernel[(self.blocks * n,)](
            h, hs, w["down"], scales["down_scales"], self.y, self.weights,
            *placing, rows, depth, BLOCK_N=c["down_n"], **common)
        sum_kernel[(self.tokens, triton.cdiv(shape.hidden, 1024))](
            self.y, out, shape.hidden, TOP_K=shape.top_k, BLOCK=1024)
        return out
