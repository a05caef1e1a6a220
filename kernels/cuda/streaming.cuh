// What the streaming kernels share: the sizes of their tiles, sums and outputs. sm_90a; the weight is on the M side of wgmma.
//
// A CTA has GROUPS warpgroups that multiply, 64 rows of the weight each, and warps that copy: stages of 64 inputs (rows of 128
// swizzled bytes) of TILE rows of the weight and of ROWS rows of x. GATED: the first half of the TILE are rows of the gate, the
// second half those of up, both for the same outputs.
//
// Set by the compiler's command line: ROWS, TILE, FLOAT16, GATED.

#pragma once

#include "hopper.cuh"

constexpr int GROUPS = TILE / 64;
constexpr int CONSUMERS = GROUPS * 128;
constexpr int OUTPUTS = GATED ? TILE / 2 : TILE;
constexpr int WEIGHT_BYTES = TILE * STEP_BYTES;
constexpr int X_BYTES = ROWS * STEP_BYTES;
constexpr int SUMS = ROWS / 2;  // accumulators of a thread
constexpr int MAX_STAGES = 32;

__device__ __forceinline__ void synchronize_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// --- sums and outputs

// wgmma leaves a thread 2 rows of x (2 c and 2 c + 1, c = lane % 4) by 2 rows of the weight (r and r + 8, r = lane / 4). Four
// lanes trade theirs, so that each has 4 consecutive rows of the weight, of one row of x.
__device__ __forceinline__ Four gather_four(const float* sums, int lane) {
  const bool is_odd = lane & 4, is_high = lane & 8;
  const float low = __shfl_xor_sync(ALL_LANES, is_odd ? sums[0] : sums[1], 4);
  const float high = __shfl_xor_sync(ALL_LANES, is_odd ? sums[2] : sums[3], 4);
  const float low_0 = is_odd ? low : sums[0], low_1 = is_odd ? sums[1] : low;
  const float high_0 = is_odd ? high : sums[2], high_1 = is_odd ? sums[3] : high;
  const float other_0 = __shfl_xor_sync(ALL_LANES, is_high ? low_0 : high_0, 8);
  const float other_1 = __shfl_xor_sync(ALL_LANES, is_high ? low_1 : high_1, 8);
  Four four;
  four.value[0] = is_high ? other_0 : low_0;
  four.value[1] = is_high ? other_1 : low_1;
  four.value[2] = is_high ? high_0 : other_0;
  four.value[3] = is_high ? high_1 : other_1;
  return four;
}

__device__ __forceinline__ void store(void* y, u64 index, const Four& four, int count, bool is_float32, bool whole) {
  if (is_float32) {
    float* target = static_cast<float*>(y) + index;
    if (whole) {
      *reinterpret_cast<Four*>(target) = four;
      return;
    }
    for (int i = 0; i < 4; ++i) {
      if (i < count) target[i] = four.value[i];
    }
    return;
  }
  u16* target = static_cast<u16*>(y) + index;
  const u32 low = round_two(four.value[0], four.value[1]), high = round_two(four.value[2], four.value[3]);
  if (whole) {
    *reinterpret_cast<u64*>(target) = low | static_cast<u64>(high) << 32;
    return;
  }
  const u32 bits[4] = {low & 0xffff, low >> 16, high & 0xffff, high >> 16};
  for (int i = 0; i < 4; ++i) {
    if (i < count) target[i] = static_cast<u16>(bits[i]);
  }
}

// activation(gate) * up of four outputs, both rounded before.
__device__ __forceinline__ Four activate_four(const Four& gate, const Four& up, int activation) {
  Four result;
  for (int i = 0; i < 4; i += 2) {
    const u32 gates = round_two(gate.value[i], gate.value[i + 1]), ups = round_two(up.value[i], up.value[i + 1]);
    result.value[i] = activate(widen_input(gates & 0xffff), widen_input(ups & 0xffff), activation);
    result.value[i + 1] = activate(widen_input(gates >> 16), widen_input(ups >> 16), activation);
  }
  return result;
}
