"""The shapes of tests/testing/shapes.h."""

import collections

Shape = collections.namedtuple(
    "Shape",
    "name hidden num_heads num_kv_heads head_dim num_experts top_k intermediate",
)

SHAPES = [
    Shape("qwen3-30b-a3b-tp1", 2048, 32, 4, 128, 128, 8, 768),
    Shape("qwen3-30b-a3b-tp4", 2048, 8, 1, 128, 128, 8, 192),
    Shape("qwen3-235b-a22b-tp4", 4096, 16, 1, 128, 128, 8, 384),
    Shape("glm-4.6-tp4", 5120, 24, 2, 128, 160, 8, 384),
]

TOKENS = [1, 8, 32, 64, 128, 256, 1024, 4096, 16384]
QK_NORM_TOKENS = [1, 8, 64, 128, 1024, 2048, 4096, 8192, 16384]


def select(text):
    return [shape for shape in SHAPES if text in shape.name]
