// What the CUDA C++ kernels share: mbarriers, copies by TMA and cp.async, wgmma, roundings. sm_90a.
//
// Set by the compiler's command line: FLOAT16.

#pragma once

#include "device.cuh"

struct alignas(64) TensorMap {
  u64 opaque[16];
};

enum Activation { SILU = 0, GELU_TANH = 1 };  // where GATED

constexpr int STEP_BYTES = 128;  // of a row in a stage: 64 numbers of K, the width of the swizzle
constexpr int STEP_INPUTS = 64;

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
__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(target), "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// --- copies of scattered rows, 16 bytes at a time

// Asynchronous copy of 16 bytes to shared memory, or of 16 zeros.
__device__ __forceinline__ void copy_chunk(u32 target, const void* source, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(is_there ? 16 : 0) : "memory");
}

// One arrival at the barrier when all copies of this thread so far are there.
__device__ __forceinline__ void arrive_when_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What copy_chunk wrote is read by tensor cores.
__device__ __forceinline__ void show_copies_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Past L1, which need not have seen what another kernel wrote.
__device__ __forceinline__ int load_from_l2(const int* source) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

// --- eight numbers of 16 bits

struct alignas(16) Eight {
  u32 pairs[4];
};

__device__ __forceinline__ void keep_eight(u32 address, const Eight& eight) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(eight.pairs[0]), "r"(eight.pairs[1]),
               "r"(eight.pairs[2]), "r"(eight.pairs[3])
               : "memory");
}

__device__ __forceinline__ Eight load_eight(u32 address) {
  Eight eight;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "r"(address)
               : "memory");
  return eight;
}

// --- four numbers in shared memory

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

__device__ __forceinline__ float load_one(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// --- tensor cores

// Four 8 x 8 matrices of 16-bit numbers, in the layout of mma's inputs; a lane has the address of a row.
__device__ __forceinline__ void load_matrices(u32 (&bits)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(address)
               : "memory");
}

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
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_56 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_64 NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_80 NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_88 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_96 NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_24(i) SUMS_16(i), SUMS_8(i + 16)
#define SUMS_32(i) SUMS_24(i), SUMS_8(i + 24)
#define SUMS_40(i) SUMS_32(i), SUMS_8(i + 32)
#define SUMS_48(i) SUMS_40(i), SUMS_8(i + 40)
#define SUMS_56(i) SUMS_48(i), SUMS_8(i + 48)
#define SUMS_64(i) SUMS_56(i), SUMS_8(i + 56)
#define SUMS_72(i) SUMS_64(i), SUMS_8(i + 64)
#define SUMS_80(i) SUMS_72(i), SUMS_8(i + 72)
#define SUMS_88(i) SUMS_80(i), SUMS_8(i + 80)
#define SUMS_96(i) SUMS_88(i), SUMS_8(i + 88)
#define MULTIPLY(columns, num_sums, a, b) \
  if constexpr (COLUMNS == columns) { \
    asm volatile( \
        "{\n" \
        ".reg .pred add;\n" \
        "setp.eq.u32 add, 0, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." INPUT "." INPUT " {" NAMES_##num_sums "}, " a ", " b \
        ", add, 1, 1, 0, 0;\n" \
        "}" \
        : SUMS_##num_sums(0) \
        : "l"(weight), "l"(x)); \
  }

// sums += 64 rows of the weight x COLUMNS rows of x, 16 numbers of K. A thread has COLUMNS / 2 sums.
template <int COLUMNS, int NUM_SUMS>
__device__ __forceinline__ void multiply(float (&sums)[NUM_SUMS], u64 weight, u64 x) {
  static_assert((COLUMNS == 8 || COLUMNS % 16 == 0) && COLUMNS <= 192 && COLUMNS <= 2 * NUM_SUMS, "columns of a product");
  MULTIPLY(8, 4, "%4", "%5")
  MULTIPLY(16, 8, "%8", "%9")
  MULTIPLY(32, 16, "%16", "%17")
  MULTIPLY(48, 24, "%24", "%25")
  MULTIPLY(64, 32, "%32", "%33")
  MULTIPLY(80, 40, "%40", "%41")
  MULTIPLY(96, 48, "%48", "%49")
  MULTIPLY(112, 56, "%56", "%57")
  MULTIPLY(128, 64, "%64", "%65")
  MULTIPLY(144, 72, "%72", "%73")
  MULTIPLY(160, 80, "%80", "%81")
  MULTIPLY(176, 88, "%88", "%89")
  MULTIPLY(192, 96, "%96", "%97")
}

__device__ __forceinline__ void start_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most PENDING groups of products have not finished.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Where the weight and x of a step lie, for matrix descriptors.
struct Operands {
  u64 weight, x;
};

// sums = the products of `steps` steps of 64 inputs: BLOCKS times 64 rows of the weight by COLUMNS rows of x. acquire() waits for
// the next step and says where it lies; release() gives back the oldest that has not been: one step after its own, so there are
// two stages at least, unless there is but one step.
template <int COLUMNS, int BLOCKS, int NUM_SUMS, typename Acquire, typename Release>
__device__ __forceinline__ void multiply_steps(float (&sums)[BLOCKS][NUM_SUMS], int steps, Acquire acquire, Release release) {
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) sums[block][i] = 0.0f;
  }
  for (int step = 0; step < steps; ++step) {
    const Operands operands = acquire();
    start_multiplying();
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const u64 weight = operands.weight + block * 64 * STEP_BYTES / 16;  // 16 bytes are a unit of an address
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply<COLUMNS>(sums[block], weight + 2 * k, operands.x + 2 * k);
    }
    commit_products();
    wait_for_products<1>();
    if (step > 0) release();
  }
  wait_for_products<0>();
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(sums[block][i])::"memory");  // no sum is read before the wait
  }
  release();
}

// Where a role is in a ring of stages.
struct Place {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// --- clusters

__device__ __forceinline__ u32 address_in_rank(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Relaxed: before it come the initialised mbarriers, which have their own fence, and reads of shared memory that have finished.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Sends to another CTA's shared memory, whose barrier counts the bytes when they are there.
__device__ __forceinline__ void send(u32 remote_address, u32 remote_barrier, const Four& four) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote_address),
      "f"(four.value[0]), "f"(four.value[1]), "f"(four.value[2]), "f"(four.value[3]), "r"(remote_barrier)
      : "memory");
}

__device__ __forceinline__ void send_two(u32 remote_address, u32 remote_barrier, float first, float second) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(remote_address),
               "f"(first), "f"(second), "r"(remote_barrier)
               : "memory");
}

// For what other CTAs of the cluster have sent.
__device__ __forceinline__ void wait_for_peers(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// --- roundings

// Two numbers to 16 bits each, the first in the low half.
__device__ __forceinline__ u32 round_two(float first, float second) {
  u32 bits;
  asm("cvt.rn." INPUT "x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(first), "f"(second));
  return bits;
}

// 1 / (1 + exp(-z)); what is too small for float32 is 0.
__device__ __forceinline__ float sigmoid(float z) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * z));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

__device__ __forceinline__ float activate(float gate, float up, int activation) {
  // (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 z = sqrt(8 / pi) * (g + 0.044715 g^3)
  const float z = activation == SILU ? gate : 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
  return gate * sigmoid(z) * up;
}
