// What kernels over the ranks of one machine share: how a rank's numbers come into the memory of others, and when they are there.
//
// Lamport's way: the data is its own flag. Each rank has a receive buffer of 3 generations x RANKS slots. A call writes into its
// slot in every other rank's buffer (of the call's generation) and polls its own buffer until nothing there is what an empty slot
// holds, minus zeros: who sends 16-bit numbers makes its minus zeros plus zeros, who sends other things puts marks between them.
// No fences, one trip over NVLink.
//
// Generations rotate by call. In call n a rank clears what call n - 1 received. The other ranks write there next in call n + 2,
// which they begin only after call n + 1, whose data this rank sends only after its call n has ended. The generation is in device
// memory and the kernels themselves advance it, so that they can be replayed by a CUDA graph.
//
// A poll ends after limit_ns; then the missing rank's number + 1 is left in the state and in the host's memory. It ends too when the
// host leaves a number there. From then on this call and all later ones neither wait nor send: what they compute is of no use, and
// the host must look.
//
// A kernel: let_next_start; wait_for_previous; load what it sends first; call.begin; send; clear_previous; arrive; wait; advance.
// Grid: CTAs that all run at once, each takes every gridDim.x-th chunk. A slot gets total_units, in chunks of chunk_units, of which
// a thread has UNITS. All ranks make the same calls with the same sizes.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (of a chunk, a thread), FLOAT16.

#pragma once

#include "device.cuh"

constexpr u32 MINUS_ZEROS = 0x80008000;
constexpr u32 POLLS_BETWEEN_LOOKS = 4096;  // at the clock and at what the host says: some milliseconds

// What is sent and polled at once: 8 numbers, each of which arrives whole, or 2 words with marks, each pair of which does.
struct alignas(16) Unit {
  u32 word[4];
};

// Each rank's receive buffer, as this process maps it.
struct Buffers {
  u64 address[RANKS];
};

// This rank's own, between calls.
struct alignas(16) State {
  u32 generation;  // of the next call
  u32 used_units;  // of each slot, by the call before
  u32 failed;      // 0, or 1 + the rank that did not come, or what the host said
  u32 arrived;     // CTAs of the running call
};

// --- memory that other GPUs write or read

__device__ __forceinline__ void send(Unit* target, const Unit& unit) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(unit.word[0]), "r"(unit.word[1]),
               "r"(unit.word[2]), "r"(unit.word[3])
               : "memory");
}

__device__ __forceinline__ Unit poll(const Unit* source) {
  Unit unit;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.word[0]), "=r"(unit.word[1]), "=r"(unit.word[2]), "=r"(unit.word[3])
               : "l"(source)
               : "memory");
  return unit;
}

__device__ __forceinline__ State load_state(const State* state) {
  State seen;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(seen.generation), "=r"(seen.used_units), "=r"(seen.failed), "=r"(seen.arrived)
               : "l"(state)
               : "memory");
  return seen;
}

__device__ __forceinline__ u32 hear_host(const u32* word) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void tell_host(u32* word, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ u64 now_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// --- minus zero

// The sign bits of those of the two halves that are minus zero.
__device__ __forceinline__ u32 minus_zeros(u32 word) {
  const u32 difference = word ^ MINUS_ZEROS;
  return ~(((difference & 0x7fff7fff) + 0x7fff7fff) | difference) & MINUS_ZEROS;
}

__device__ __forceinline__ bool has_minus_zero(const Unit& unit) {
  return minus_zeros(unit.word[0]) | minus_zeros(unit.word[1]) | minus_zeros(unit.word[2]) | minus_zeros(unit.word[3]);
}

__device__ __forceinline__ Unit without_minus_zeros(Unit unit) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unit.word[i] ^= minus_zeros(unit.word[i]);
  return unit;
}

// --- numbers

struct Wide {
  float value[8];
};

__device__ __forceinline__ Wide widen(const Unit& unit) {
  Wide wide;
#pragma unroll
  for (int i = 0; i < 8; ++i) wide.value[i] = widen_input(static_cast<u16>(unit.word[i / 2] >> (i % 2 * 16)));
  return wide;
}

__device__ __forceinline__ Unit round_all(const Wide& wide) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 low = round_input(wide.value[2 * i]), high = round_input(wide.value[2 * i + 1]);
    unit.word[i] = low | high << 16;
  }
  return unit;
}

__device__ __forceinline__ void add(Wide& sum, const Wide& part) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.value[i] += part.value[i];
}

// --- one call of one rank

struct Call {
  const Buffers& buffers;
  State* state;
  u32* host_failed;
  u32 rank, total_units, chunk_units, capacity_units;
  u64 limit_ns;
  u32 generation = 0;
  bool has_failed = false;
  // Of this thread, once it has waited for a while.
  u64 end_ns = 0;
  u32 polls = 0;

  // Reads the state; the units of each slot that the call before used.
  __device__ __forceinline__ u32 begin() {
    const State seen = load_state(state);
    generation = seen.generation;
    has_failed = seen.failed != 0;
    return seen.used_units;
  }

  // Where rank `owner` receives what rank `from` sends.
  __device__ __forceinline__ Unit* slot(u32 owner, u32 generation, u32 from) const {
    return reinterpret_cast<Unit*>(buffers.address[owner]) + (static_cast<u64>(generation) * RANKS + from) * capacity_units;
  }

  __device__ __forceinline__ void send_to_others(u32 unit, const Unit& content) const {
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) {
      if (peer != rank) send(slot(peer, generation, rank) + unit, content);
    }
  }

  __device__ __forceinline__ Unit look(u32 unit, u32 from) const { return poll(slot(rank, generation, from) + unit); }

  // `seen` is what a first look has seen.
  template <typename IsMissing>
  __device__ __forceinline__ Unit wait_for(Unit seen, u32 unit, u32 from, IsMissing is_missing) {
    while (is_missing(seen) && !has_failed) {
      seen = look(unit, from);
      if (++polls % POLLS_BETWEEN_LOOKS == 0) check_whether_to_wait(from);
    }
    return seen;
  }

  __device__ void check_whether_to_wait(u32 from) {
    const u32 said = hear_host(host_failed);
    const u64 now = now_ns();
    if (end_ns == 0) end_ns = now + limit_ns;
    if (said == 0 && now <= end_ns) return;
    has_failed = true;
    atomicCAS(&state->failed, 0, said != 0 ? said : from + 1);
    if (said == 0) tell_host(host_failed, from + 1);
  }

  // The sum over the ranks, of which `own` is this one's part.
  __device__ __forceinline__ Unit add_parts(u32 unit, const Unit& own) {
    Unit parts[RANKS];
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) parts[peer] = peer == rank ? own : look(unit, peer);
    Wide sum = {};
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) {
      if (peer != rank) parts[peer] = wait_for(parts[peer], unit, peer, has_minus_zero);
      add(sum, widen(parts[peer]));
    }
    return round_all(sum);
  }
};

__device__ __forceinline__ u32 num_chunks(const Call& call) {
  return (call.total_units + call.chunk_units - 1) / call.chunk_units;
}

// Calls what(i, unit) for each of this thread's units of a chunk.
template <typename What>
__device__ __forceinline__ void for_units(const Call& call, u32 chunk, What what) {
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const u32 column = threadIdx.x + i * blockDim.x, unit = chunk * call.chunk_units + column;
    if (column < call.chunk_units && unit < call.total_units) what(i, unit);
  }
}

// What this rank received in the call before.
__device__ __forceinline__ void clear_previous(const Call& call, u32 used_units) {
  const u32 previous = call.generation == 0 ? 2 : call.generation - 1;
  const Unit nothing = {MINUS_ZEROS, MINUS_ZEROS, MINUS_ZEROS, MINUS_ZEROS};
  for (u32 unit = blockIdx.x * blockDim.x + threadIdx.x; unit < used_units; unit += gridDim.x * blockDim.x) {
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) {
      if (peer != call.rank) send(call.slot(call.rank, previous, peer) + unit, nothing);
    }
  }
}

// How many CTAs have come before this one, in thread 0; all threads of this CTA have read the state. What comes back is looked at
// late, for it takes a while.
__device__ __forceinline__ u32 arrive(const Call& call) {
  __syncthreads();
  return threadIdx.x == 0 ? atomicAdd(&call.state->arrived, 1) : 0;
}

// The CTA that came last makes the state that of the next call.
__device__ __forceinline__ void advance(const Call& call, u32 num_before) {
  if (threadIdx.x != 0 || num_before != gridDim.x - 1) return;
  call.state->arrived = 0;
  call.state->used_units = call.total_units;
  call.state->generation = call.generation == 2 ? 0 : call.generation + 1;
}
