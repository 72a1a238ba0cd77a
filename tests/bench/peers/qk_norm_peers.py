"""Times torch's copy and its norms at the shapes and token counts of
qk_norm_bench."""

import torch
import torch.nn.functional as F

import timing

OP = "qk_norm"
EPSILON = 1e-6


def norm(qkv, heads, kv_heads, dim, q_weight, k_weight):
    """Q and K of the packed rows, in place, by two calls each."""
    for first, count, weight in ((0, heads, q_weight), (heads, kv_heads, k_weight)):
        part = qkv[:, first * dim : (first + count) * dim].unflatten(1, (count, dim))
        part.copy_(F.rms_norm(part, (dim,), weight, EPSILON))


def run(shapes, tokens):
    timer = timing.Timer()
    results = []
    for shape in shapes:
        heads, kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        for n in tokens:
            moved = 2 * 2 * n * (heads + kv) * dim  # read and written
            sets = timing.num_sets(moved)

            def random(*size):
                return torch.randn(size, device="cuda").bfloat16()

            def add(who, call):
                results.append(dict(op=OP, shape=shape.name, tokens=n,
                                    dtype="bfloat16", note="", who=who,
                                    us=timer.graph(sets, call)))

            rows = [random(n, (heads + 2 * kv) * dim) for _ in range(sets)]
            weights = random(2, dim)
            add("torch rms_norm", lambda i: norm(rows[i], heads, kv, dim, *weights))
            pairs = [(random(n, (heads + kv) * dim), random(n, (heads + kv) * dim))
                     for _ in range(sets)]
            add("ceiling: torch copy_", lambda i: pairs[i][0].copy_(pairs[i][1]))
            del rows, pairs
            torch.cuda.empty_cache()
    return results
