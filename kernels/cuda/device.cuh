// What all kernels share: names of types, 16-bit inputs, sums over lanes, the early start of dependent_launch.py.
//
// Set by the compiler's command line: FLOAT16 (inputs are float16, else bfloat16).

#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u16 round_input(float value) {
  u16 bits;
#if FLOAT16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ float widen_input(u16 bits) {
#if FLOAT16
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return __uint_as_float(static_cast<u32>(bits) << 16);
#endif
}

// --- the lanes of a warp

constexpr u32 ALL_LANES = 0xffffffff;

// The sum over all lanes, on each of them.
__device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}
