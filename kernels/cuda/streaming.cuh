// What the streaming kernels share: mbarriers, copies by TMA, wgmma with the weight on the M side, sums and outputs. sm_90a.
//
// A CTA has GROUPS warpgroups that multiply, 64 rows of the weight each, and one warp that copies: stages of 64 inputs (rows of
// 128 swizzled bytes) of TILE rows of the weight and, behind them, of ROWS rows of x. GATED: the first half of the TILE are rows
// of the gate, the second half those of up, both for the same outputs.
//
// Set by the compiler's command line: ROWS, TILE, FLOAT16, GATED.

#pragma once

#include "device.cuh"

struct alignas(64) TensorMap {
  u64 opaque[16];
};

enum Activation { SILU = 0, GELU_TANH = 1 };  // where GATED

constexpr int STEP_BYTES = 128;  // of a row in a stage: 64 numbers of K, the width of the swizzle
constexpr int STEP_INPUTS = 64;
constexpr int GROUPS = TILE / 64;
constexpr int CONSUMERS = GROUPS * 128;
constexpr int THREADS = CONSUMERS + 32;
constexpr int OUTPUTS = GATED ? TILE / 2 : TILE;
constexpr int WEIGHT_BYTES = TILE * STEP_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + ROWS * STEP_BYTES;
constexpr int SUMS = ROWS / 2;  // accumulators of a thread
constexpr int MAX_STAGES = 32;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// --- mbarriers

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// --- copies of boxes of a tensor map

__device__ __forceinline__ u64 read_once_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 read_often_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What lies outside the tensor is filled with zeros, and counts among the bytes that the barrier expects.
__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(target), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// --- tensor cores

// Rows of 128 swizzled bytes, groups of 8 rows 1024 bytes apart: (64 << 32), swizzle of 128 bytes: (1 << 62).
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
  return (1ull << 62) | (64ull << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

#if FLOAT16
#define INPUT "f16"
#else
#define INPUT "bf16"
#endif

#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define MULTIPLY(shape, names, a, b, outputs) \
  asm volatile( \
      "{\n" \
      ".reg .pred add;\n" \
      "setp.eq.u32 add, 0, 0;\n" \
      "wgmma.mma_async.sync.aligned." shape ".f32." INPUT "." INPUT " {" names "}, " a ", " b ", add, 1, 1, 0, 0;\n" \
      "}" \
      : outputs \
      : "l"(weight), "l"(x))

// sums += 64 rows of the weight x ROWS rows of x, 16 numbers of K.
__device__ __forceinline__ void multiply(float (&sums)[SUMS], u64 weight, u64 x) {
#if ROWS == 8
  MULTIPLY("m64n8k16", NAMES_4, "%4", "%5", SUMS_4(0));
#elif ROWS == 16
  MULTIPLY("m64n16k16", NAMES_8, "%8", "%9", SUMS_8(0));
#elif ROWS == 32
  MULTIPLY("m64n32k16", NAMES_16, "%16", "%17", SUMS_16(0));
#elif ROWS == 64
  MULTIPLY("m64n64k16", NAMES_32, "%32", "%33", SUMS_32(0));
#elif ROWS == 128
  MULTIPLY("m64n128k16", NAMES_64, "%64", "%65", SUMS_64(0));
#else
#error "ROWS must be 8, 16, 32, 64 or 128"
#endif
}

__device__ __forceinline__ void start_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups of products have not finished.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// --- CTAs

__device__ __forceinline__ void synchronize_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// --- sums and outputs

struct alignas(16) Four {
  float value[4];
};

__device__ __forceinline__ void keep(u32 address, const Four& four) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(four.value[0]), "f"(four.value[1]),
               "f"(four.value[2]), "f"(four.value[3])
               : "memory");
}

__device__ __forceinline__ Four load(u32 address) {
  Four four;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(four.value[0]), "=f"(four.value[1]), "=f"(four.value[2]), "=f"(four.value[3])
               : "r"(address)
               : "memory");
  return four;
}

// wgmma leaves a thread 2 rows of x (2 c and 2 c + 1, c = lane % 4) by 2 rows of the weight (r and r + 8, r = lane / 4). Four
// lanes trade theirs, so that each has 4 consecutive rows of the weight, of one row of x.
__device__ __forceinline__ Four gather_four(const float* sums, int lane) {
  constexpr u32 ALL = 0xffffffff;
  const bool is_odd = lane & 4, is_high = lane & 8;
  const float low = __shfl_xor_sync(ALL, is_odd ? sums[0] : sums[1], 4);
  const float high = __shfl_xor_sync(ALL, is_odd ? sums[2] : sums[3], 4);
  const float low_0 = is_odd ? low : sums[0], low_1 = is_odd ? sums[1] : low;
  const float high_0 = is_odd ? high : sums[2], high_1 = is_odd ? sums[3] : high;
  const float other_0 = __shfl_xor_sync(ALL, is_high ? low_0 : high_0, 8);
  const float other_1 = __shfl_xor_sync(ALL, is_high ? low_1 : high_1, 8);
  Four four;
  four.value[0] = is_high ? other_0 : low_0;
  four.value[1] = is_high ? other_1 : low_1;
  four.value[2] = is_high ? high_0 : other_0;
  four.value[3] = is_high ? high_1 : other_1;
  return four;
}

__device__ __forceinline__ float activate(float gate, float up, int activation) {
  // (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 z = sqrt(8 / pi) * (g + 0.044715 g^3)
  const float z = activation == SILU ? gate : 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
  return gate * (1.0f / (1.0f + __expf(-z))) * up;
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
  u64 bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = round_input(four.value[i]);
  if (whole) {
    *reinterpret_cast<u64*>(target) = bits[0] | bits[1] << 16 | bits[2] << 32 | bits[3] << 48;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (i < count) target[i] = static_cast<u16>(bits[i]);
  }
}
