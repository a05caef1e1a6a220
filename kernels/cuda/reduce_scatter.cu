// y = the sum over RANKS GPUs, which map each other's memory, of the part of x that is this rank's. sm_90a.
//
// Every rank sends each other its part of x (peers.cuh), adds what comes in float32 in the order of ranks, and rounds once.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (of a chunk, a thread), FLOAT16.

#include "peers.cuh"

// x is RANKS parts of total_units, y is total_units long.
extern "C" __global__ void __launch_bounds__(1024, 1)
reduce_scatter(const __grid_constant__ Buffers buffers, const Unit* x, Unit* y, State* state, u32* host_failed, u32 rank,
               u32 total_units, u32 chunk_units, u32 capacity_units, u64 limit_ns) {
  let_next_start();
  wait_for_previous();
  Call call{buffers, state, host_failed, rank, total_units, chunk_units, capacity_units, limit_ns};
  const auto part = [&](u32 peer, u32 unit) { return x[static_cast<u64>(peer) * total_units + unit]; };

  Unit first[RANKS][UNITS];  // of the CTA's first chunk, on their way while the state is
#pragma unroll
  for (u32 peer = 0; peer < RANKS; ++peer) {
    for_units(call, blockIdx.x, [&](int i, u32 unit) { first[peer][i] = part(peer, unit); });
  }
  const u32 used_units = call.begin();
  for (u32 chunk = blockIdx.x; chunk < num_chunks(call) && !call.has_failed; chunk += gridDim.x) {
    for_units(call, chunk, [&](int i, u32 unit) {
#pragma unroll
      for (u32 peer = 0; peer < RANKS; ++peer) {
        if (peer == rank) continue;
        const Unit sent = chunk == blockIdx.x ? first[peer][i] : part(peer, unit);
        send(call.slot(peer, call.generation, rank) + unit, without_minus_zeros(sent));
      }
    });
  }
  clear_previous(call, used_units);
  const u32 num_before = arrive(call);

  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    for_units(call, chunk, [&](int, u32 unit) { y[unit] = call.add_parts(unit, without_minus_zeros(part(rank, unit))); });
  }
  advance(call, num_before);
}
