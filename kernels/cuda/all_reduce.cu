// y = the sum of x over RANKS GPUs that map each other's memory; NORM: then the residual is added and the row normalised. sm_90a.
//
// Lamport's way: the data is its own flag. Each rank has a receive buffer of 3 generations x RANKS slots. A call writes its x into
// its slot in every other rank's buffer (of the call's generation) and polls its own buffer until nothing there is minus zero,
// which stands for "not here yet": a sender makes its own minus zeros plus zeros. No flags, no fences, one trip over NVLink.
// Parts are added in float32 in the order of ranks, so all ranks get equal bits, and rounded once.
//
// Generations rotate by call. In call n a rank clears what call n - 1 received. The other ranks write there next in call n + 2,
// which they begin only after call n + 1, whose data this rank sends only after its call n has ended. The generation is in device
// memory and the kernel itself advances it, so that the kernel can be replayed by a CUDA graph.
//
// TWO_SHOT: chunk i belongs to rank i % RANKS. The others send it theirs only; it adds them and sends all the sum, into the slots
// that nobody else uses for this chunk. Less is sent where there are more than two ranks, in two trips.
//
// A poll ends after limit_ns. Then the missing rank's number + 1 is left in the state and in the host's memory, and this call and
// all later ones neither wait nor send: what they compute is of no use, and the host must look.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (of a chunk, a thread), FLOAT16, NORM, TWO_SHOT.

#include "device.cuh"

constexpr u32 MINUS_ZEROS = 0x80008000;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr u32 POLLS_BETWEEN_LOOKS = 256;  // at the clock

// 8 numbers: what is sent and polled at once. Only its halves need to arrive whole.
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
  u32 failed;      // 0, or 1 + the rank that did not come
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

__device__ __forceinline__ bool is_missing(const Unit& unit) {
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
  __device__ __forceinline__ Unit wait_for(Unit seen, u32 unit, u32 from) {
    while (is_missing(seen) && !has_failed) {
      seen = look(unit, from);
      if (++polls % POLLS_BETWEEN_LOOKS == 0) check_clock(from);
    }
    return seen;
  }

  __device__ void check_clock(u32 from) {
    const u64 now = now_ns();
    if (end_ns == 0) end_ns = now + limit_ns;
    if (now <= end_ns) return;
    has_failed = true;
    atomicCAS(&state->failed, 0, from + 1);
    tell_host(host_failed, from + 1);
  }

  // The sum over the ranks, of which `own` is this one's part.
  __device__ __forceinline__ Unit add_parts(u32 unit, const Unit& own) {
    Unit parts[RANKS];
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) parts[peer] = peer == rank ? own : look(unit, peer);
    Wide sum = {};
#pragma unroll
    for (u32 peer = 0; peer < RANKS; ++peer) {
      if (peer != rank) parts[peer] = wait_for(parts[peer], unit, peer);
      add(sum, widen(parts[peer]));
    }
    return round_all(sum);
  }

  // As add_parts, of a chunk of rank `owner`, which sends the sum to all.
  __device__ __forceinline__ Unit add_parts_in_two_shots(u32 unit, const Unit& own, u32 owner) {
    if (owner != rank) return wait_for(look(unit, owner), unit, owner);
    const Unit sum = without_minus_zeros(add_parts(unit, own));
    if (!has_failed) send_to_others(unit, sum);
    return sum;
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

// What this rank adds. The CTA's first chunk is loaded before the state is there.
struct Own {
  const Unit* x;
  Unit first[UNITS];

  __device__ __forceinline__ Own(const Call& call, const Unit* x) : x(x) {
    for_units(call, blockIdx.x, [&](int i, u32 unit) { first[i] = x[unit]; });
  }

  __device__ __forceinline__ Unit get(u32 chunk, int i, u32 unit) const {
    return without_minus_zeros(chunk == blockIdx.x ? first[i] : x[unit]);
  }
};

__device__ __forceinline__ void send_own(const Call& call, const Own& own) {
  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    const u32 owner = chunk % RANKS;
    if (TWO_SHOT && owner == call.rank) continue;
    for_units(call, chunk, [&](int i, u32 unit) {
      const Unit part = own.get(chunk, i, unit);
      if (TWO_SHOT) {
        send(call.slot(owner, call.generation, call.rank) + unit, part);
      } else {
        call.send_to_others(unit, part);
      }
    });
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

// The sum over the CTA's threads, on each. `parity` is the other one in the next call.
__device__ __forceinline__ float add_over_threads(float value, u32 parity) {
  __shared__ float sums[2][32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  if (threadIdx.x % 32 == 0) sums[parity][threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? sums[parity][threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

// Grid: CTAs that all run at once, each takes every gridDim.x-th chunk. x is total_units long, in chunks of chunk_units, of which
// a thread has UNITS; all ranks call with the same sizes. NORM: a chunk is a row. y may be x, new_residual may be residual.
extern "C" __global__ void __launch_bounds__(1024, 1)
all_reduce(const __grid_constant__ Buffers buffers, const Unit* x, Unit* y, const Unit* residual, Unit* new_residual,
           const Unit* weight, State* state, u32* host_failed, u32 rank, u32 total_units, u32 chunk_units, u32 capacity_units,
           float eps, u64 limit_ns) {
  let_next_start();
  Unit gain[UNITS];
  if (NORM) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const u32 column = threadIdx.x + i * blockDim.x;
      if (column < chunk_units) gain[i] = weight[column];
    }
  }
  wait_for_previous();

  Call call{buffers, state, host_failed, rank, total_units, chunk_units, capacity_units, limit_ns};
  const Own own(call, x);
  const State seen = load_state(state);
  call.generation = seen.generation;
  call.has_failed = seen.failed != 0;
  if (!call.has_failed) send_own(call, own);
  clear_previous(call, seen.used_units);
  const u32 num_before = arrive(call);

  u32 parity = 0;
  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    Wide added[UNITS];
    float squares = 0.0f;
    for_units(call, chunk, [&](int i, u32 unit) {
      Unit rest;
      if (NORM) rest = residual[unit];  // on its way while this thread waits
      const Unit part = own.get(chunk, i, unit);
      const Unit sum = TWO_SHOT ? call.add_parts_in_two_shots(unit, part, chunk % RANKS) : call.add_parts(unit, part);
      if (NORM) {
        Wide wide = widen(sum);
        add(wide, widen(rest));
        new_residual[unit] = round_all(wide);
        added[i] = widen(round_all(wide));
#pragma unroll
        for (int k = 0; k < 8; ++k) squares += added[i].value[k] * added[i].value[k];
      } else {
        y[unit] = sum;
      }
    });
    if (NORM) {
      const float scale = rsqrtf(add_over_threads(squares, parity) / static_cast<float>(8 * chunk_units) + eps);
      parity ^= 1;
      for_units(call, chunk, [&](int i, u32 unit) {
        const Wide gains = widen(gain[i]);
        Wide wide;
#pragma unroll
        for (int k = 0; k < 8; ++k) wide.value[k] = widen_input(round_input(added[i].value[k] * scale)) * gains.value[k];
        y[unit] = round_all(wide);
      });
    }
  }
  advance(call, num_before);
}
