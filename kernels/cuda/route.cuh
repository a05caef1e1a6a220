// What norm_and_route.cu and between_attentions.cu share: what reads and computes eights, a row's norm, products of few tokens,
// and the choice of experts.
//
// Set by the compiler's command line: FLOAT16, EXPERTS (0 where there is nothing to choose).

#pragma once

#include "hopper.cuh"

// Of what no kernel writes while the model runs; not after what follows it.
__device__ __forceinline__ Eight load_constant(const u16* source) {
  Eight eight;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "l"(source)
               : "memory");
  return eight;
}

__device__ __forceinline__ float low(u32 pair) { return widen_input(static_cast<u16>(pair & 0xffff)); }

__device__ __forceinline__ float high(u32 pair) { return widen_input(static_cast<u16>(pair >> 16)); }

// Of two pairs of 16-bit numbers, rounded once. That is what float32 and its rounding to 16 bits give: a product is whole in float32,
// and so is all of a sum that can decide how it is rounded.
__device__ __forceinline__ u32 add_pairs(u32 first, u32 second) {
  u32 result;
  asm("add.rn." INPUT "x2 %0, %1, %2;" : "=r"(result) : "r"(first), "r"(second));
  return result;
}

__device__ __forceinline__ u32 multiply_pairs(u32 first, u32 second) {
  u32 result;
  asm("mul.rn." INPUT "x2 %0, %1, %2;" : "=r"(result) : "r"(first), "r"(second));
  return result;
}

// y of 8 inputs.
__device__ __forceinline__ void norm(Eight& values, const Eight& gains, float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values.pairs[i] = multiply_pairs(round_two(low(values.pairs[i]) * scale, high(values.pairs[i]) * scale), gains.pairs[i]);
  }
}

// sums[i] of 16 rows of a weight by 8 tokens: those of rows g, g and g + 8, g + 8, tokens 2 q, 2 q + 1, 2 q and 2 q + 1 of lane
// 4 g + q.
__device__ __forceinline__ void multiply(float* sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." INPUT "." INPUT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if EXPERTS
constexpr int KEYS = EXPERTS / 32;  // of a lane of the warp that chooses
constexpr int NO_KEY = -2147483647 - 1;

// An integer that orders experts as they are chosen. Logits of 16 bits leave 13 bits of a float32 for the id.
__device__ __forceinline__ int key_of(float logit, int expert) {
  const int bits = logit == 0.0f ? 0 : __float_as_int(logit);  // -0 equals 0
  const int order = bits ^ ((bits >> 31) & 0x7fffffff);
  return (order & -0x2000) | (0x1fff - expert);
}

__device__ __forceinline__ float logit_of(int key) { return __int_as_float((key ^ ((key >> 31) & 0x7fffffff)) & -0x2000); }

// By one warp, from the logits of all experts: weights and experts of one token.
__device__ __forceinline__ void choose(const float* logits, float* weights, int* experts, int top_k, bool renormalize, int lane) {
  int keys[KEYS], chosen = NO_KEY;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) keys[i] = key_of(logits[32 * i + lane], 32 * i + lane);
  for (int c = 0; c < top_k; ++c) {
    int best = NO_KEY;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(ALL_LANES, best);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) keys[i] = keys[i] == best ? NO_KEY : keys[i];
    if (lane == c) chosen = best;
  }
  const float largest = __shfl_sync(ALL_LANES, logit_of(chosen), 0);
  const float weight = lane < top_k ? expf(logit_of(chosen) - largest) : 0.0f;
  float part = weight;  // of the sum over all experts: it cancels when the chosen ones' weights are divided by theirs
  if (!renormalize) {
    part = 0.0f;
#pragma unroll
    for (int i = 0; i < KEYS; ++i) part += expf(logits[32 * i + lane] - largest);
  }
  const float total = add_lanes(part);
  if (lane < top_k) {
    weights[lane] = weight / total;
    experts[lane] = 0x1fff - (chosen & 0x1fff);
  }
}
#endif
