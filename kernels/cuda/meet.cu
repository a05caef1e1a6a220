// Ends on each of RANKS GPUs, which map each other's memory, once all of them have come to it. sm_90a.
//
// What a rank's stream did before is done, and seen by whatever any rank's stream does next. One warp of few registers and no
// shared memory, which finds room beside almost any product. It is launched without the early start: what lies between two of
// these is the work of copy engines.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (1).

#include "peers.cuh"

constexpr u32 HERE = 1;  // nothing of an empty slot

__device__ __forceinline__ bool is_not_here(const Unit& unit) { return unit.word[1] != HERE || unit.word[3] != HERE; }

// total_units and chunk_units are 1.
extern "C" __global__ void __launch_bounds__(32)
meet(const __grid_constant__ Buffers buffers, State* state, u32* host_failed, u32 rank, u32 total_units, u32 chunk_units,
     u32 capacity_units, u64 limit_ns) {
  Call call{buffers, state, host_failed, rank, total_units, chunk_units, capacity_units, limit_ns};
  const u32 used_units = call.begin();
  __threadfence_system();
  for_units(call, 0, [&](int, u32 unit) {
    if (!call.has_failed) call.send_to_others(unit, {HERE, HERE, HERE, HERE});
  });
  clear_previous(call, used_units);
  const u32 num_before = arrive(call);
  for_units(call, 0, [&](int, u32 unit) {
    for (u32 peer = 0; peer < RANKS; ++peer) {
      if (peer != rank) call.wait_for(call.look(unit, peer), unit, peer, is_not_here);
    }
  });
  __threadfence_system();
  advance(call, num_before);
}
