// Tiles of prefill_attention.cu, and the order in which they are taken. All functions are called by whole warps.
//
// Set by the compiler's command line: GROUP, KEYS, as there.

#pragma once

#include "hopper.cuh"

constexpr int ROWS = 128;
constexpr int QUERIES = ROWS / GROUP;  // of a tile

struct Tile {
  int row, head, query_start, first_query, query_len, context_len, num_steps;  // head: of the kv heads; no steps: the end

  __device__ __forceinline__ int first_position() const { return context_len - query_len + first_query; }
  __device__ __forceinline__ int num_keys() const { return min(context_len, first_position() + QUERIES); }  // that it sees
};

// All tiles of a kv head, in the order of their steps of KEYS keys, most first; those of equal steps by row. All lanes call.
struct Tiles {
  const int* query_starts;
  const int* context_lens;
  int num_rows, num_kv_heads, min_queries;

  // Tiles of the row that have `steps` steps or more, at least one. A tile ends at its last query's own key.
  __device__ __forceinline__ int of_row(int row, int steps) const {
    const int query_len = query_starts[row + 1] - query_starts[row], context_len = context_lens[row];
    const int keys = (steps - 1) * KEYS;  // that a tile has to exceed
    if (query_len < max(min_queries, 1) || context_len <= keys) return 0;
    return (query_len + QUERIES - 1) / QUERIES - max(keys - (context_len - query_len), 0) / QUERIES;
  }

  __device__ __forceinline__ int of_all(int steps, int lane) const {
    int count = 0;
    for (int row = lane; row < num_rows; row += 32) count += of_row(row, steps);
    return __reduce_add_sync(ALL_LANES, count);
  }

  __device__ __forceinline__ int most_steps(int lane) const {
    int most = 0;
    for (int row = lane; row < num_rows; row += 32) most = max(most, (context_lens[row] + KEYS - 1) / KEYS);
    return __reduce_max_sync(ALL_LANES, most);
  }

  // `most`: no tile from this index on has more steps; it becomes what this one has.
  __device__ __forceinline__ Tile find(int index, int& most, int lane) const {
    int least = 1;  // of_all(least) > index, of_all(most + 1) <= index
    while (least < most) {
      const int middle = (least + most + 1) / 2;
      if (of_all(middle, lane) > index) {
        least = middle;
      } else {
        most = middle - 1;
      }
    }
    int left = index - of_all(most + 1, lane);  // tiles of as many steps before this one
    for (int first = 0; first < num_rows; first += 32) {
      const int row = first + lane;
      const int longer = row < num_rows ? of_row(row, most + 1) : 0;
      const int own = row < num_rows ? of_row(row, most) - longer : 0;
      const int of_these = __reduce_add_sync(ALL_LANES, own);
      if (left >= of_these) {
        left -= of_these;
        continue;
      }
      int to_here = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, to_here, distance);
        if (lane >= distance) to_here += other;
      }
      const int lane_of_row = __ffs(__ballot_sync(ALL_LANES, to_here > left)) - 1;
      const int behind = __shfl_sync(ALL_LANES, longer + left - (to_here - own), lane_of_row);  // longer or earlier ones
      const int found = first + lane_of_row, query_start = query_starts[found];
      const int query_len = query_starts[found + 1] - query_start;
      const int tile = (query_len + QUERIES - 1) / QUERIES - 1 - behind;
      return Tile{found, 0, query_start, tile * QUERIES, query_len, context_lens[found], most};
    }
    return Tile{};
  }

  // Those of this CTA: every gridDim.x-th of all, by turns from the front and from the back.
  template <typename Visit>
  __device__ __forceinline__ void for_each(int lane, Visit visit) const {
    const int count = of_all(1, lane) * num_kv_heads;
    int most = most_steps(lane);
    for (int turn = 0;; ++turn) {
      const int item = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (item >= count) return;
      Tile tile = find(item / num_kv_heads, most, lane);
      tile.head = item % num_kv_heads;
      visit(tile);
    }
  }
};
