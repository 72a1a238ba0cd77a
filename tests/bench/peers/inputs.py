"""The router's logits of moe_bench: equal to tests/bench/router_logits.h."""

import math

ROUTINGS = ["uniform", "skewed", "all-to-one"]

_MASK = (1 << 64) - 1
_NOISE = (1 << 14) - 3


def _mix(v):
    v = (v + 0x9E3779B97F4A7C15) & _MASK
    v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & _MASK
    return v ^ (v >> 31)


def _uniforms(seed, first, count):
    start = _mix(seed)
    return [
        ((_mix((start + first + i) & _MASK) >> 40) + 0.5) / (1 << 24)
        for i in range(count)
    ]


def base_logits(num_experts, routing, seed):
    """What an expert's popularity adds to each of its logits."""
    order = _uniforms(seed, _NOISE, num_experts)
    by_rank = sorted(range(num_experts), key=lambda expert: order[expert])
    base = [0.0] * num_experts
    for rank, expert in enumerate(by_rank):
        if routing == "skewed":
            base[expert] = -math.log(rank + 1.0)
        elif routing == "all-to-one":
            base[expert] = -0.05 * rank
    return base


def noise(routing, seed):
    """What is added to the logits one after the other, over and over."""
    if routing == "all-to-one":
        return [0.0] * _NOISE
    return [-math.log(-math.log(u)) for u in _uniforms(seed, 0, _NOISE)]


def logit_rows(tokens, num_experts, routing, seed):
    """[tokens, num_experts] as nested lists; for more, see peers that tile."""
    base = base_logits(num_experts, routing, seed)
    table = noise(routing, seed)
    return [
        [
            base[e] + table[(t * num_experts + e) % _NOISE]
            for e in range(num_experts)
        ]
        for t in range(tokens)
    ]
