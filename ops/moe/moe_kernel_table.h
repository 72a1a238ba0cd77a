#ifndef TENON_OPS_MOE_MOE_KERNEL_TABLE_H_
#define TENON_OPS_MOE_MOE_KERNEL_TABLE_H_

#include "ops/moe/moe_kernel_config.h"

// Sizes of the expert kernels, by GPU. tools/tune measures them and writes this
// file (--header); each table says where it comes from. A row:
//   max_hidden, max_intermediate, max_slots_per_expert,
//   {gate_up {token_tile, row_warpgroups, blocks_per_sm}, down {same},
//    mma_tile_rows}

namespace tenon {

// clang-format off

inline constexpr char kMoeKernelsOtherDevice[] =
    "any other GPU";
inline constexpr char kMoeKernelsOtherSource[] =
    "not measured: tiles about as tall as an expert's share of the slots";
inline constexpr MoeKernelRow kMoeKernelsOtherFloat32[] = {
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 12,
     {{128, 2, 1}, {128, 2, 1}, 16}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
};
inline constexpr MoeKernelRow kMoeKernelsOtherFloat16[] = {
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 128}},
};
inline constexpr MoeKernelRow kMoeKernelsOtherFloat8[] = {
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {MoeKernelRow::kAnySize, MoeKernelRow::kAnySize, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
};
inline constexpr MoeKernelTable kMoeKernelsOther = {
    {kMoeKernelsOtherFloat32, 2},
    {kMoeKernelsOtherFloat16, 5},
    {kMoeKernelsOtherFloat8, 4}};

inline constexpr char kMoeKernelsH100Device[] =
    "NVIDIA H100 80GB HBM3";
inline constexpr char kMoeKernelsH100Source[] =
    "tools/tune, 2026-11-22: qwen3-30b-a3b-tp1 bfloat16, qwen3-30b-a3b-tp4 "
    "bfloat16, qwen3-235b-a22b-tp4 bfloat16, glm-4.6-tp4 bfloat16, qwen3-30"
    "b-a3b-tp1 float8_e4m3, qwen3-30b-a3b-tp4 float8_e4m3, qwen3-235b-a22b-"
    "tp4 float8_e4m3, glm-4.6-tp4 float8_e4m3; tiles of 144 tokens: the mea"
    "surements in docs/kernels/moe.md (H100)";
inline constexpr MoeKernelRow kMoeKernelsH100Float16[] = {
    {2048, 192, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 0.25,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 192, 0.5,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {2048, 192, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 192, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 192, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 192, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
    {2048, 768, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 768, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 768, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 768, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 768, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {144, 2, 1}, 128}},
    {4096, 384, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 0.25,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {4096, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {4096, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {4096, 384, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {4096, 384, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
    {5120, 384, 0.05,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 0.2,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {5120, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {5120, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {5120, 384, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {5120, 384, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
};
inline constexpr MoeKernelRow kMoeKernelsH100Float8[] = {
    {2048, 192, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 4,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 192, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 192, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 192, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 768, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 768, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 768, 16,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 768, 32,
     {{128, 2, 1}, {32, 2, 1}, 64}},
    {2048, 768, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 768, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {144, 2, 1}, 64}},
    {4096, 384, 0.25,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {4096, 384, 0.5,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 2,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {4096, 384, 4,
     {{128, 2, 1}, {32, 2, 1}, 16}},
    {4096, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {4096, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {4096, 384, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {5120, 384, 0.2,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 0.8,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {5120, 384, 1.6,
     {{128, 2, 1}, {32, 2, 1}, 16}},
    {5120, 384, 3.2,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {5120, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {5120, 384, 12.8,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {5120, 384, 25.6,
     {{128, 2, 1}, {32, 2, 1}, 64}},
    {5120, 384, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
};
inline constexpr MoeKernelTable kMoeKernelsH100 = {
    {},
    {kMoeKernelsH100Float16, 27},
    {kMoeKernelsH100Float8, 27}};

inline constexpr char kMoeKernelsH200Device[] =
    "NVIDIA H200";
inline constexpr char kMoeKernelsH200Source[] =
    "tools/tune, 2026-11-22: qwen3-30b-a3b-tp1 bfloat16, qwen3-30b-a3b-tp4 "
    "bfloat16, qwen3-235b-a22b-tp4 bfloat16, glm-4.6-tp4 bfloat16, qwen3-30"
    "b-a3b-tp1 float8_e4m3, qwen3-30b-a3b-tp4 float8_e4m3, qwen3-235b-a22b-"
    "tp4 float8_e4m3, glm-4.6-tp4 float8_e4m3; tiles of 144 tokens: the mea"
    "surements in docs/kernels/moe.md (H100)";
inline constexpr MoeKernelRow kMoeKernelsH200Float16[] = {
    {2048, 192, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 0.25,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 192, 0.5,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {2048, 192, 1,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 4,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 192, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 192, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 192, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 192, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
    {2048, 768, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 768, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 768, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 768, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 768, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {144, 2, 1}, 128}},
    {4096, 384, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 0.25,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {4096, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {4096, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {4096, 384, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {4096, 384, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
    {5120, 384, 0.05,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 0.2,
     {{32, 2, 1}, {8, 1, 1}, 16}},
    {5120, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {5120, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {5120, 384, 192,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {5120, 384, MoeKernelRow::kAnyLoad,
     {{144, 2, 1}, {128, 2, 1}, 128}},
};
inline constexpr MoeKernelRow kMoeKernelsH200Float8[] = {
    {2048, 192, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 192, 4,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 192, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 192, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 192, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {2048, 768, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 768, 0.25,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 768, 1,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {2048, 768, 4,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {2048, 768, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {2048, 768, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {2048, 768, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {4096, 384, 0.0625,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {4096, 384, 4,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {4096, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {4096, 384, 24,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {4096, 384, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
    {5120, 384, 0.05,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 3.2,
     {{8, 1, 1}, {32, 2, 1}, 16}},
    {5120, 384, 4,
     {{8, 1, 1}, {8, 1, 1}, 16}},
    {5120, 384, 12,
     {{32, 2, 1}, {32, 2, 1}, 16}},
    {5120, 384, 25.6,
     {{32, 2, 1}, {32, 2, 1}, 64}},
    {5120, 384, MoeKernelRow::kAnyLoad,
     {{128, 2, 1}, {128, 2, 1}, 64}},
};
inline constexpr MoeKernelTable kMoeKernelsH200 = {
    {},
    {kMoeKernelsH200Float16, 28},
    {kMoeKernelsH200Float8, 23}};

// clang-format on

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_KERNEL_TABLE_H_
