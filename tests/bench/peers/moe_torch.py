"""The MoE layer in torch's own operations, logits to output: as a loop over
experts, as a batched product over gathered weights, and as grouped products."""

import torch
import torch.nn.functional as F


def route(logits, top_k):
    scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def dequantized(w):
    """fp8 weights as what they stand for, float32."""
    full = {}
    for name in ("gate", "up", "down"):
        m = w[name].float()
        if name + "_scales" in w:
            s = w[name + "_scales"]
            s = s.repeat_interleave(128, 1)[:, : m.shape[1]]
            m = m * s.repeat_interleave(128, 2)[:, :, : m.shape[2]]
        full[name] = m
    return full


def loop(logits, x, w, out, top_k):
    """Unfused, expert by expert; waits for the device to know their loads."""
    weights, ids = route(logits, top_k)
    out.zero_()
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        a = x[token]
        h = F.silu(F.linear(a, w["gate"][expert])) * F.linear(a, w["up"][expert])
        y = F.linear(h, w["down"][expert]) * weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def batched(logits, x, w, out, top_k):
    """A product per slot, of weights copied together: for very few tokens."""
    weights, ids = route(logits, top_k)
    flat = ids.reshape(-1)
    a = x.repeat_interleave(top_k, 0).unsqueeze(1)
    gate = torch.bmm(a, w["gate"][flat].transpose(1, 2))
    up = torch.bmm(a, w["up"][flat].transpose(1, 2))
    y = torch.bmm(F.silu(gate) * up, w["down"][flat].transpose(1, 2))
    y = y.view(x.shape[0], top_k, -1) * weights.to(x.dtype)[..., None]
    return torch.sum(y, 1, out=out)


def _sort(ids, num_experts):
    order = torch.argsort(ids.reshape(-1), stable=True)
    counts = torch.histc(ids.reshape(-1).float(), num_experts, 0, num_experts - 1)
    return order, torch.cumsum(counts, 0).to(torch.int32)


def _unsort_and_sum(y, order, weights, out):
    top_k = weights.shape[1]
    back = torch.empty_like(y)
    back[order] = y
    y = back.view(out.shape[0], top_k, -1) * weights.to(out.dtype)[..., None]
    return torch.sum(y, 1, out=out)


def grouped(logits, x, w, out, top_k):
    """w["gate_up"] [experts, 2 * intermediate, hidden]: gate, then up."""
    weights, ids = route(logits, top_k)
    order, offsets = _sort(ids, w["gate_up"].shape[0])
    a = x[order // top_k]
    gate_up = F.grouped_mm(a, w["gate_up"].transpose(1, 2), offs=offsets)
    gate, up = gate_up.chunk(2, dim=-1)
    h = F.silu(gate) * up
    y = F.grouped_mm(h, w["down"].transpose(1, 2), offs=offsets)
    return _unsort_and_sum(y, order, weights, out)


def _quantize_rows(x):
    amax = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10)
    q = (x.float() * (448.0 / amax)).to(torch.float8_e4m3fn)
    return q, (amax / 448.0).squeeze(-1)


def scaled_grouped(logits, x, w, out, top_k):
    """fp8 with a scale per token and per output channel, what torch has on
    Hopper: w["gate_up_channel"], w["down_channel"] are [experts, rows]."""
    weights, ids = route(logits, top_k)
    order, offsets = _sort(ids, w["gate_up"].shape[0])
    q, s = _quantize_rows(x)
    product = lambda a, sa, b, sb: torch._scaled_grouped_mm(
        a, b.transpose(1, 2), sa, sb, offs=offsets, out_dtype=torch.bfloat16,
        use_fast_accum=True)
    token = order // top_k
    # torch indexes no fp8.
    rows = q.view(torch.uint8)[token].view(torch.float8_e4m3fn)
    gate_up = product(rows, s[token], w["gate_up"], w["gate_up_channel"])
    gate, up = gate_up.chunk(2, dim=-1)
    h, s = _quantize_rows(F.silu(gate) * up)
    y = product(h, s, w["down"], w["down_channel"])
    return _unsort_and_sum(y, order, weights, out)


def balanced_products(a, w, h, y):
    """Both matrix products alone, all experts with as many tokens: a [experts,
    rows, hidden]. cuBLAS's batched product, a ceiling for bfloat16."""
    torch.bmm(a, w["gate_up"].transpose(1, 2), out=h)
    torch.bmm(h[..., : w["down"].shape[2]], w["down"].transpose(1, 2), out=y)
