// y = the x of RANKS GPUs, which map each other's memory, one behind the other, bit by bit. sm_90a.
//
// Every rank sends x to all others (peers.cuh). x may hold anything, also what an empty slot holds, so each word is sent with a mark
// behind it, and both arrive together.
//
// Set by the compiler's command line: RANKS (2 to 8), UNITS (of a chunk, a thread).

#include "peers.cuh"

constexpr u32 MARK = 1;  // nothing of an empty slot

__device__ __forceinline__ bool has_no_marks(const Unit& unit) { return unit.word[1] != MARK || unit.word[3] != MARK; }

// Words 2 unit and, where there is one, 2 unit + 1, with their marks.
__device__ __forceinline__ Unit load_marked(const u32* x, u32 unit, u32 num_words) {
  if (num_words % 2 == 0) {
    const u64 both = reinterpret_cast<const u64*>(x)[unit];
    return {static_cast<u32>(both), MARK, static_cast<u32>(both >> 32), MARK};
  }
  return {x[2 * unit], MARK, 2 * unit + 1 < num_words ? x[2 * unit + 1] : 0, MARK};
}

__device__ __forceinline__ void store_unmarked(u32* y, u32 unit, u32 num_words, const Unit& marked) {
  if (num_words % 2 == 0) {
    reinterpret_cast<u64*>(y)[unit] = marked.word[0] | static_cast<u64>(marked.word[2]) << 32;
    return;
  }
  y[2 * unit] = marked.word[0];
  if (2 * unit + 1 < num_words) y[2 * unit + 1] = marked.word[2];
}

// x has num_words, 2 in each of total_units; y has RANKS times as many. Both begin at multiples of 8 bytes.
extern "C" __global__ void __launch_bounds__(1024, 1)
all_gather(const __grid_constant__ Buffers buffers, const u32* x, u32* y, State* state, u32* host_failed, u32 rank,
           u32 total_units, u32 chunk_units, u32 capacity_units, u64 limit_ns, u32 num_words) {
  let_next_start();
  wait_for_previous();
  Call call{buffers, state, host_failed, rank, total_units, chunk_units, capacity_units, limit_ns};

  Unit first[UNITS];  // of the CTA's first chunk, on their way while the state is
  for_units(call, blockIdx.x, [&](int i, u32 unit) { first[i] = load_marked(x, unit, num_words); });
  const u32 used_units = call.begin();
  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    for_units(call, chunk, [&](int i, u32 unit) {
      const Unit own = chunk == blockIdx.x ? first[i] : load_marked(x, unit, num_words);
      if (!call.has_failed) call.send_to_others(unit, own);
      store_unmarked(y + static_cast<u64>(rank) * num_words, unit, num_words, own);
    });
  }
  clear_previous(call, used_units);
  const u32 num_before = arrive(call);

  for (u32 chunk = blockIdx.x; chunk < num_chunks(call); chunk += gridDim.x) {
    for_units(call, chunk, [&](int, u32 unit) {
#pragma unroll
      for (u32 peer = 0; peer < RANKS; ++peer) {
        if (peer == rank) continue;
        const Unit part = call.wait_for(call.look(unit, peer), unit, peer, has_no_marks);
        store_unmarked(y + static_cast<u64>(peer) * num_words, unit, num_words, part);
      }
    });
  }
  advance(call, num_before);
}
