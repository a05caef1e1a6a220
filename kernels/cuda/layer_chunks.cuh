// How the weights of between_attentions.cu are cut into chunks, which CTA has which, and the warp of each that copies them.
//
// A tile is two groups of 8 rows of a weight, in a gated product one of the gate and one of up. A chunk is some columns of a tile:
// for each group pieces of 8 rows by 64 columns, as a box of a tensor map leaves them.
//
// Set by the compiler's command line: HIDDEN, ATTENDED, INTERMEDIATE, OUT_SIZE, EXPERTS, CTAS; see between_attentions.cu.

#pragma once

#include "hopper.cuh"

constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 32;
constexpr int TEAMS = 4, MATES = WARPS / TEAMS;  // of warps that multiply, and warps of a team
constexpr int GROUP = 8, STEP = 64, PIECE_BYTES = GROUP * 2 * STEP;  // rows and columns of a piece, which is swizzled
constexpr int SLOTS = 32;                                            // chunks that are on their way or being read
constexpr int MAX_CHUNK = 16;                                        // steps of STEP columns

enum Products { OUTPUT, GATE_UP, DOWN, NEXT };

// Steps of a chunk. All teams have the same number of a tile's chunks; of experts, one after the other, each has some.
__device__ constexpr int chunk_of(int inputs, bool by_expert) {
  const int shares = by_expert ? 1 : TEAMS;
  int rounds = 1;
  while (inputs / STEP % (shares * rounds) != 0 || inputs / STEP / (shares * rounds) > MAX_CHUNK) ++rounds;
  return inputs / STEP / (shares * rounds);
}

template <int WHICH>
struct Product {
  static constexpr bool GATED = WHICH == GATE_UP, BY_EXPERT = WHICH == DOWN && EXPERTS > 0;
  static constexpr int INPUTS = WHICH == OUTPUT ? ATTENDED : WHICH == DOWN ? INTERMEDIATE : HIDDEN;
  static constexpr int OUTPUTS = WHICH == GATE_UP ? INTERMEDIATE : WHICH == NEXT ? OUT_SIZE : HIDDEN;  // of gate, and of up
  static constexpr int GROUPS = OUTPUTS / GROUP, ROWS_OF_EXPERT = GATED ? 2 * OUTPUTS : OUTPUTS;
  static constexpr int CHUNK = chunk_of(INPUTS, BY_EXPERT), CHUNKS = INPUTS / STEP / CHUNK;  // steps of a chunk; a tile's
  static constexpr u32 GROUP_BYTES = CHUNK * PIECE_BYTES;
  static_assert(!BY_EXPERT || TEAMS * CHUNKS <= SLOTS, "a team's next chunk is at most a round of the slots ahead");
};

// --- memory

// A group of rows, from `row` on, of a chunk's steps: pieces behind one another.
__device__ __forceinline__ void load_group(u32 target, const TensorMap& map, int row, int step, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;"
      ::"r"(target), "l"(&map), "r"(0), "r"(row), "r"(step), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_bulk(const u16* source, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// --- who has what

struct Range {
  int first, last;
};

__device__ __forceinline__ Range own_range(u32 num_groups) {
  return {static_cast<int>(num_groups * blockIdx.x / CTAS), static_cast<int>(num_groups * (blockIdx.x + 1) / CTAS)};
}

// A tile of a product: its first row within an expert, how many groups it has, and its experts.
struct Tile {
  int row, groups, first_expert, last_expert;
};

// Of a gated product the outputs of all experts are shared out as one, a group of the gate and one of up at a time.
template <int WHICH, typename Visit>
__device__ __forceinline__ void for_tiles(int num_experts, Visit visit) {
  using P = Product<WHICH>;
  const Range own = own_range(P::GATED ? num_experts * P::GROUPS : P::GROUPS);
#pragma unroll 1
  for (int group = own.first; group < own.last;) {
    if constexpr (P::GATED) {
      const int expert = group / P::GROUPS;
      visit(Tile{group % P::GROUPS * GROUP, 1, expert, expert + 1});
      ++group;
    } else {
      const int groups = min(own.last - group, 2);
      visit(Tile{group * GROUP, groups, 0, num_experts});
      group += groups;
    }
  }
}

// --- the warp that copies

struct Copier {
  u32 ring, ring_bytes, full, empty;
  u64 policy;
  int lane, max_in_flight;
  u32 tail = 0, start = 0;  // where the next chunk goes if there is room; where the chunk of this lane's slot begins
  int count = 0, oldest = 0;

  // A place for `bytes` behind the chunks that are there, which begin at the oldest one's; waits until it has been read.
  __device__ __forceinline__ u32 find_room(u32 bytes) {
    while (true) {
      if (count == oldest) return tail + bytes <= ring_bytes ? tail : 0;
      const u32 first = __shfl_sync(ALL_LANES, start, oldest % SLOTS);
      if (count - oldest < SLOTS) {
        if (tail > first) {
          if (tail + bytes <= ring_bytes) return tail;
          if (bytes <= first) return 0;
        } else if (tail + bytes <= first) {
          return tail;
        }
      }
      wait(empty + 8 * (oldest % SLOTS), oldest / SLOTS % 2);
      ++oldest;
    }
  }

  // `groups` of a chunk of CHUNK steps from `step` on, whose rows begin at `first` and `second`.
  template <int CHUNK>
  __device__ __forceinline__ void copy(const TensorMap& map, int first, int second, int groups, int step) {
    constexpr u32 GROUP_BYTES = CHUNK * PIECE_BYTES;
    const u32 bytes = groups * GROUP_BYTES, place = find_room(bytes), slot = count % SLOTS, barrier = full + 8 * slot;
    const int before = count - max_in_flight;
    if (before >= 0) wait(full + 8 * (before % SLOTS), before / SLOTS % 2);
    if (lane == 0) {
      arrive_and_expect(barrier, bytes);
      load_group(ring + place, map, first, step, barrier, policy);
      if (groups > 1) load_group(ring + place + GROUP_BYTES, map, second, step, barrier, policy);
    }
    __syncwarp();
    if (lane == static_cast<int>(slot)) start = place;
    tail = place + bytes;
    ++count;
  }

  template <int WHICH>
  __device__ __forceinline__ void copy_product(const TensorMap& map, const int* experts, int num_experts) {
    using P = Product<WHICH>;
    for_tiles<WHICH>(num_experts, [&](const Tile& tile) {
#pragma unroll 1
      for (int i = tile.first_expert; i < tile.last_expert; ++i) {
        const int first = experts[i] * P::ROWS_OF_EXPERT + tile.row;
#pragma unroll 1
        for (int step = 0; step < P::CHUNKS * P::CHUNK; step += P::CHUNK) {
          copy<P::CHUNK>(map, first, first + (P::GATED ? P::OUTPUTS : GROUP), P::GATED ? 2 : tile.groups, step);
        }
      }
    });
  }
};
