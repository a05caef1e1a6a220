// Products of prefill_attention.cu: scores of queries and keys, sums of weighted values. sm_90a.
//
// Keys and values lie in a stage in groups of 8 keys x HEAD_DIM: HALVES times 8 rows of 128 swizzled bytes. Such groups follow
// each other evenly over all pages, as the products need it. A key is a row of the N side of the scores (K-major); of the
// products with values it is a step of K, and the HEAD_DIM numbers of a value are the N side (MN-major).
//
// Set by the compiler's command line: HEAD_DIM (64, 128), FLOAT16.

#pragma once

#include "hopper.cuh"

constexpr int HALVES = HEAD_DIM / 64;
constexpr int ATOM_BYTES = 8 * STEP_BYTES;             // 8 swizzled rows
constexpr int KEY_GROUP_BYTES = HALVES * ATOM_BYTES;   // 8 keys

#define SCORES(columns, num_sums, a, b, add) \
  if constexpr (COLUMNS == columns) { \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.ne.u32 add, " add ", 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." INPUT "." INPUT " {" NAMES_##num_sums "}, " a ", " b \
        ", add, 1, 1, 0, 0;\n" \
        "}" \
        : SUMS_##num_sums(0) \
        : "l"(queries), "l"(keys), "n"(ADD)); \
  }

// sums (+)= 64 rows of queries x COLUMNS keys, 16 numbers of each, both from shared memory, both K-major.
template <int COLUMNS, int ADD>
__device__ __forceinline__ void multiply_keys(float (&sums)[COLUMNS / 2], u64 queries, u64 keys) {
  static_assert(COLUMNS % 16 == 0 && (COLUMNS <= 96 || COLUMNS == 112 || COLUMNS == 128 || COLUMNS == 144 || COLUMNS == 160 ||
                                      COLUMNS == 176 || COLUMNS == 192), "keys of a product");
  SCORES(16, 8, "%8", "%9", "%10")
  SCORES(32, 16, "%16", "%17", "%18")
  SCORES(48, 24, "%24", "%25", "%26")
  SCORES(64, 32, "%32", "%33", "%34")
  SCORES(80, 40, "%40", "%41", "%42")
  SCORES(96, 48, "%48", "%49", "%50")
  SCORES(112, 56, "%56", "%57", "%58")
  SCORES(128, 64, "%64", "%65", "%66")
  SCORES(144, 72, "%72", "%73", "%74")
  SCORES(160, 80, "%80", "%81", "%82")
  SCORES(176, 88, "%88", "%89", "%90")
  SCORES(192, 96, "%96", "%97", "%98")
}

#define VALUES(columns, num_sums, a, b) \
  if constexpr (COLUMNS == columns) { \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.eq.u32 add, 0, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." INPUT "." INPUT " {" NAMES_##num_sums "}, {" a "}, " b \
        ", add, 1, 1, 1;\n" \
        "}" \
        : SUMS_##num_sums(0) \
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values)); \
  }

// sums += 64 rows of weights, of 16 keys, from registers x COLUMNS numbers of those keys' values, MN-major.
template <int COLUMNS>
__device__ __forceinline__ void multiply_values(float (&sums)[COLUMNS / 2], const u32* weights, u64 values) {
  VALUES(64, 32, "%32, %33, %34, %35", "%36")
  VALUES(128, 64, "%64, %65, %66, %67", "%68")
}

__device__ __forceinline__ u64 descriptor(u32 address, u32 leading_bytes, u32 stride_bytes) {
  return (1ull << 62) | (static_cast<u64>(stride_bytes / 16) << 32) | (leading_bytes / 16 << 16) | ((address & 0x3ffff) >> 4);
}

// N rows of 64 numbers a step, groups of 8 rows KEY_GROUP_BYTES apart; the leading offset is not used.
__device__ __forceinline__ u64 keys_descriptor(u32 address) { return descriptor(address, 16, KEY_GROUP_BYTES); }

// 64 numbers of N and the next are ATOM_BYTES apart, 8 keys and the next KEY_GROUP_BYTES.
__device__ __forceinline__ u64 values_descriptor(u32 address) { return descriptor(address, ATOM_BYTES, KEY_GROUP_BYTES); }

// What is read here is not moved before, nor written again: products have read or written it until the wait before.
template <int N>
__device__ __forceinline__ void settle(float (&numbers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(numbers[i])::"memory");
}

template <int N>
__device__ __forceinline__ void settle(u32 (&bits)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(bits[i])::"memory");
}

__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
