// y = the sum of x over RANKS GPUs that map each other's memory; NORM: then the residual is added and the row normalised. sm_90a.
//
// Every rank sends x to all others (peers.cuh) and adds what comes in float32, in the order of ranks, so that all ranks get equal
// bits, and rounds once.
//
// TWO_SHOT: chunk i belongs to rank i % RANKS. The others send it theirs only; it adds them and sends all the sum, into the slots
// that nobody else uses for this chunk. Less is sent where there are more than two ranks, in two trips.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (of a chunk, a thread), FLOAT16, NORM, TWO_SHOT.

#include "peers.cuh"

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

// As add_parts, of a chunk of rank `owner`, which sends the sum to all.
__device__ __forceinline__ Unit add_parts_in_two_shots(Call& call, u32 unit, const Unit& own, u32 owner) {
  if (owner != call.rank) return call.wait_for(call.look(unit, owner), unit, owner, has_minus_zero);
  const Unit sum = without_minus_zeros(call.add_parts(unit, own));
  if (!call.has_failed) call.send_to_others(unit, sum);
  return sum;
}

// The sum over the CTA's threads, on each. `parity` is the other one in the next call.
__device__ __forceinline__ float add_over_threads(float value, u32 parity) {
  __shared__ float sums[2][32];
  value = add_lanes(value);
  if (threadIdx.x % 32 == 0) sums[parity][threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? sums[parity][threadIdx.x % 32] : 0.0f;
  return add_lanes(value);
}

// x and y are total_units long. NORM: a chunk is a row. y may be x, new_residual may be residual.
extern "C" __global__ void __launch_bounds__(1024, 1)
all_reduce(const __grid_constant__ Buffers buffers, const Unit* x, Unit* y, const Unit* residual, Unit* new_residual,
           const Unit* weight, State* state, u32* host_failed, u32 rank, u32 total_units, u32 chunk_units, u32 capacity_units,
           u64 limit_ns, float eps) {
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
  const u32 used_units = call.begin();
  if (!call.has_failed) send_own(call, own);
  clear_previous(call, used_units);
  const u32 num_before = arrive(call);

  u32 parity = 0;
  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    Wide added[UNITS];
    float squares = 0.0f;
    for_units(call, chunk, [&](int i, u32 unit) {
      Unit rest;
      if (NORM) rest = residual[unit];  // on its way while this thread waits
      const Unit part = own.get(chunk, i, unit);
      const Unit sum = TWO_SHOT ? add_parts_in_two_shots(call, unit, part, chunk % RANKS) : call.add_parts(unit, part);
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
