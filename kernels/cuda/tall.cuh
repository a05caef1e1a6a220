// What products of many rows share: the weight is on the M side of wgmma, TILE of its rows an item, half of them for each of
// two warpgroups. Outputs leave by stmatrix.
//
// GATED: 8 rows of the gate and the 8 rows of up for the same outputs follow each other in a stage, which leaves a gate and its
// up in one thread. A weight is [expert, group of 8 rows, gate or up, row, input] then, otherwise [expert, 1, 1, row, input].
//
// Set by the compiler's command line: FLOAT16, GATED, ACTIVATION.

#pragma once

#include "hopper.cuh"

constexpr int GROUPS = 2;  // warpgroups that multiply
constexpr int BLOCKS = 2;  // of 64 rows of the weight, of a warpgroup
constexpr int GROUP_ROWS = BLOCKS * 64, GROUP_OUTPUTS = GROUP_ROWS / (GATED ? 2 : 1);
constexpr int TILE = GROUPS * GROUP_ROWS, OUTPUTS = GROUPS * GROUP_OUTPUTS;  // of an item
constexpr int CONSUMERS = GROUPS * 128;
constexpr int PASS_OUTPUTS = 64;  // of a warpgroup, that lie in shared memory at once: rows of 128 swizzled bytes
constexpr int PASSES = GROUP_OUTPUTS / PASS_OUTPUTS;

// The box of TILE rows of a weight, from that of `output` on.
__device__ __forceinline__ void load_weight(u32 target, const TensorMap& map, int input, int output, int expert, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(
          target),
      "l"(&map), "r"(input), "r"(GATED ? 0 : output), "r"(0), "r"(GATED ? output / 8 : 0), "r"(expert), "r"(barrier)
      : "memory");
}

// --- outputs

__device__ __forceinline__ void synchronize_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Four 8 x 8 matrices in the layout of wgmma's sums, each to 8 rows of 16 bytes, transposed; a lane has the address of a row.
__device__ __forceinline__ void store_transposed(u32 address, const u32 (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Where a lane's row of 16 bytes lies for store_transposed, of outputs of 16 rows of x: matrices 0 and 1 of the first 8, 2 and
// 3 of the others. GATED: 8 outputs of each block of 64 rows of the weight in turn; otherwise 16 of one block.
__device__ __forceinline__ u32 own_staged_row(u32 staging, int warp, int lane) {
  const int matrix = lane / 8, chunk = GATED ? matrix % 2 * 4 + warp : warp * 2 + matrix % 2;
  return staging + (matrix / 2 * 8 + lane % 8) * STEP_BYTES + (chunk ^ lane % 8) * 16;
}

// Two outputs from their gates and ups.
__device__ __forceinline__ u32 activate_two(const float* gates, const float* ups) {
  const u32 gate = round_two(gates[0], gates[1]), up = round_two(ups[0], ups[1]);
  return round_two(activate(widen_input(gate & 0xffff), widen_input(up & 0xffff), ACTIVATION),
                   activate(widen_input(gate >> 16), widen_input(up >> 16), ACTIVATION));
}
