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
    "not measured yet: the sizes for other GPUs serve";
inline constexpr MoeKernelTable kMoeKernelsH100 = {
    {},
    {},
    {}};

inline constexpr char kMoeKernelsH200Device[] =
    "NVIDIA H200";
inline constexpr char kMoeKernelsH200Source[] =
    "not measured yet: the sizes for other GPUs serve";
inline constexpr MoeKernelTable kMoeKernelsH200 = {
    {},
    {},
    {}};

// clang-format on

}  // namespace tenon

#endif  // TENON_OPS_MOE_MOE_KERNEL_TABLE_H_
