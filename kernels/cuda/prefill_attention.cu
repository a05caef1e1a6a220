// Causal attention of rows with several queries over a paged cache, on sm_90a: copies, products and softmax side by side.
//
// A tile is ROWS / GROUP queries of one row and one kv head, times the GROUP query heads of that kv head, on the M side of wgmma.
// Three warps copy by TMA: queries of a tile, and stages of KEYS keys and of values, 16 keys of a page a box. Two warpgroups
// take 64 rows of the tile each: scores = q k^T from shared memory, weights = softmax in registers, out += weights v with the
// weights from registers. A warpgroup issues the scores of the next keys before the values of these, so that its softmax runs
// beside a product of its own; and the two issue by turns, so that the softmax of one runs beside products of the other. A CTA
// takes every gridDim.x-th tile, those with the most keys first, by turns from the front and from the back; they are one chain
// of steps: the first scores of a tile are computed beside the last values of the one before it.
//
// What lies behind a row's keys is not read, or not used: pages behind are zeros of TMA, keys of the last page behind the
// context are masked, and their values, which may be anything, are made zeros: zero times infinity would not be zero.
//
// Source: Shah et al. 2024, "FlashAttention-3". Set by the compiler's command line: HEAD_DIM (64, 128), GROUP (query heads of a
// kv head), KEYS (a multiple of 16), STAGES, FLOAT16.

#include "prefill_products.cuh"
#include "prefill_tiles.cuh"

constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int BOX_KEYS = 16, BOX_BYTES = 2 * KEY_GROUP_BYTES, BOXES = KEYS / BOX_KEYS;
constexpr int STAGE_BYTES = BOXES * BOX_BYTES;         // of keys, or of values
constexpr int QUERY_HALF_BYTES = ROWS * STEP_BYTES;    // 64 numbers of all rows
constexpr int QUERY_BYTES = HALVES * QUERY_HALF_BYTES;
constexpr int CHUNKS = HEAD_DIM / 8;                   // of 16 bytes, of a row of out
constexpr int SLOTS = 3;                               // tiles: to be stored, in work, on the way
constexpr float LOG2_E = 1.4426950408889634f;
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(KEYS % BOX_KEYS == 0 && KEYS <= 192 && BOXES <= 32 && GROUP <= ROWS, "sizes");

// --- copies

// Boxes of BOX_KEYS keys of a cache [page, group of 8 keys, 64 numbers, key of the group, number].
__device__ __forceinline__ void load_keys(u32 target, const TensorMap& map, int half, int key_group, int page, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(
          target),
      "l"(&map), "r"(0), "r"(0), "r"(half), "r"(key_group), "r"(page), "r"(barrier)
      : "memory");
}

// A box of QUERIES tokens of q [64 numbers, token, head of the group, number].
__device__ __forceinline__ void load_queries(u32 target, const TensorMap& map, int half, int token, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          target),
      "l"(&map), "r"(0), "r"(0), "r"(token), "r"(half), "r"(barrier)
      : "memory");
}

struct Pages {
  const int* tables;
  int stride_table, shift, count, head_stride;  // 16 << shift keys of a page; kv heads are head_stride times 64 numbers apart
};

// --- the warps that copy, each as far ahead as its ring lets it

// Where a ring of stages, or of slots, begins: its bytes, the barriers that say that a stage is full, and that it is empty.
struct Ring {
  u32 bytes, full, empty;
};

// Queries, and what is to be done: the tiles themselves, and a last one of no steps.
__device__ __forceinline__ void copy_queries(const Ring& ring, Tile* slots, const TensorMap& map, const Tiles& tiles, int lane) {
  Place place{0, 1};  // what nothing has been in is empty
  const auto begin = [&](const Tile& tile) {
    wait(ring.empty + 8 * place.stage, place.parity);
    if (lane == 0) slots[place.stage] = tile;
  };
  tiles.for_each(lane, [&](const Tile& tile) {
    const u32 full = ring.full + 8 * place.stage;
    begin(tile);
    if (lane == 0) {
      arrive_and_expect(full, HALVES * QUERIES * GROUP * STEP_BYTES);
      for (int half = 0; half < HALVES; ++half) {
        load_queries(ring.bytes + place.stage * QUERY_BYTES + half * QUERY_HALF_BYTES, map, tile.head * GROUP * HALVES + half,
                     tile.query_start + tile.first_query, full);
      }
    }
    __syncwarp();
    place.advance(SLOTS);
  });
  begin(Tile{});
  if (lane == 0) arrive(ring.full + 8 * place.stage);
}

// Keys, or values, of all steps: a box of each lane. Where it has no key that the tile sees, it is outside of the tensor.
__device__ __forceinline__ void copy_steps(const Ring& ring, const TensorMap& map, const Tiles& tiles, const Pages& pages,
                                           int lane) {
  Place place{0, 1};
  tiles.for_each(lane, [&](const Tile& tile) {
    const int* table = pages.tables + static_cast<long long>(tile.row) * pages.stride_table;
    for (int step = 0; step < tile.num_steps; ++step) {
      const int box = step * BOXES + lane;
      const bool is_there = lane < BOXES && box * BOX_KEYS < tile.num_keys();
      const int page = is_there ? table[box >> pages.shift] : pages.count;
      const int key_group = is_there ? (box & ((1 << pages.shift) - 1)) * 2 : 0;
      const u32 full = ring.full + 8 * place.stage;
      wait(ring.empty + 8 * place.stage, place.parity);
      if (lane == 0) arrive_and_expect(full, STAGE_BYTES);
      __syncwarp();
      const u32 target = ring.bytes + place.stage * STAGE_BYTES + lane * BOX_BYTES;
      if (lane < BOXES) load_keys(target, map, tile.head * pages.head_stride, key_group, page, full);
      place.advance(STAGES);
    }
  });
}

// --- the warpgroups that multiply

__device__ __forceinline__ void synchronize_consumers() { asm volatile("bar.sync 3, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ void synchronize_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 4) : "memory"); }

__device__ __forceinline__ void wait_for_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void give_turn(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}

// What a thread knows of its two rows, r and r + 8 of a warp's 16, r = lane / 4. `largest` is in units of a product.
struct Softmax {
  float largest[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f}, rescale[2];

  // What the sums of a tile are multiplied by; begins anew.
  __device__ __forceinline__ void finish(float (&factor)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] += __shfl_xor_sync(ALL_LANES, total[row], 1);
      total[row] += __shfl_xor_sync(ALL_LANES, total[row], 2);
      factor[row] = 1.0f / total[row];
      total[row] = 0.0f;
      largest[row] = MINUS_INFINITY;
    }
  }

  // Scores become weights. A thread has the keys 8 i + 2 c and 8 i + 2 c + 1 of both rows, c = lane % 4.
  template <bool MASKED>
  __device__ __forceinline__ void weigh(float (&scores)[KEYS / 2], float unit, const int (&last_key)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = largest[row];
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * i + 2 * row + j];
          if (MASKED && 8 * i + j > last_key[row]) score = MINUS_INFINITY;
          most = fmaxf(most, score);
        }
      }
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
      const float offset = most * unit;
      rescale[row] = power_of_two(largest[row] * unit - offset);
      largest[row] = most;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * i + 2 * row + j];
          score = power_of_two(score * unit - offset);
          sum += score;
        }
      }
      total[row] = total[row] * rescale[row] + sum;
    }
  }
};

// The sums of 16 keys are the operand of the next product: of rows r, r + 8, r, r + 8 and keys 2 c, 2 c, 2 c + 8, 2 c + 8.
__device__ __forceinline__ void round_weights(u32 (&weights)[KEYS / 4], const float (&scores)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i) weights[i] = round_two(scores[2 * i], scores[2 * i + 1]);
}

// Zeros for the values of a stage from `first` up to the end of its box, by all that multiply.
__device__ __forceinline__ void clear_values(u32 stage, int first) {
  const int count = BOX_KEYS - first % BOX_KEYS;
  for (int i = threadIdx.x; i < count * CHUNKS; i += CONSUMERS) {
    const int key = first + i / CHUNKS, chunk = i % CHUNKS;
    const u32 address = stage + key / 8 * KEY_GROUP_BYTES + chunk / 8 * ATOM_BYTES + key % 8 * STEP_BYTES + chunk % 8 * 16;
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
  }
}

__device__ __forceinline__ void store_matrices(u32 address, u32 first, u32 second, u32 third, u32 fourth) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(first), "r"(second),
               "r"(third), "r"(fourth)
               : "memory");
}

// A warp's 16 rows by way of where their queries were, in rows of 64 numbers whose chunks are exchanged.
__device__ __forceinline__ void store_out(u16* out, const float (&sums)[HEAD_DIM / 2], const float (&factor)[2], u32 queries,
                                          const Tile& tile, int first_row, int num_heads, int lane) {
  const auto address = [&](int row, int chunk) {
    return queries + chunk / 8 * QUERY_HALF_BYTES + (first_row + row) * STEP_BYTES + (chunk % 8 ^ (row & 7)) * 16;
  };
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
    const float* own = sums + 8 * i;
    store_matrices(address(lane % 16, 2 * i + lane / 16), round_two(own[0] * factor[0], own[1] * factor[0]),
                   round_two(own[2] * factor[1], own[3] * factor[1]), round_two(own[4] * factor[0], own[5] * factor[0]),
                   round_two(own[6] * factor[1], own[7] * factor[1]));
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = i % CHUNKS, query = tile.first_query + (first_row + row) / GROUP;
    if (first_row + row >= QUERIES * GROUP || query >= tile.query_len) continue;
    const Eight numbers = load_eight(address(row, chunk));
    const long long token = tile.query_start + query;
    const int head = tile.head * GROUP + (first_row + row) % GROUP;
    *reinterpret_cast<Eight*>(out + (token * num_heads + head) * HEAD_DIM + chunk * 8) = numbers;
  }
}

// What a thread's two rows see of a tile.
struct Sight {
  int num_steps, full_steps;  // those whose keys all rows see
  int last_key[2];            // that is seen, from this thread's first on

  __device__ __forceinline__ Sight(const Tile& tile, int row, int lane) : num_steps(tile.num_steps) {
    full_steps = (tile.first_position() + 1) / KEYS;
#pragma unroll
    for (int i = 0; i < 2; ++i) last_key[i] = tile.first_position() + (row + 8 * i) / GROUP - lane % 4 * 2;
  }
};

__device__ __forceinline__ void attend_tiles(const Ring& queries, const Ring& keys, const Ring& values, const Tile* tiles, u16* out,
                                             int num_heads, float unit, int group) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const u64 first_queries = matrix_descriptor(queries.bytes + 64 * group * STEP_BYTES);
  Place key_stage, value_stage, slot;  // slot: of the tile whose scores come next
  float scores[KEYS / 2], sums[HEAD_DIM / 2], factor[2];
  u32 weights[KEYS / 4];
  Softmax softmax;

  const auto see_tile = [&]() {
    wait(queries.full + 8 * slot.stage, slot.parity);
    return Sight(tiles[slot.stage], first_row + lane / 4, lane);
  };
  const auto start_scores = [&]() {
    const u64 first_keys = keys_descriptor(keys.bytes + key_stage.stage * STAGE_BYTES);
    start_multiplying();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k) {
      const u64 own_queries = first_queries + slot.stage * (QUERY_BYTES / 16) + k / 4 * (QUERY_HALF_BYTES / 16) + k % 4 * 2;
      const u64 own_keys = first_keys + k / 4 * (ATOM_BYTES / 16) + k % 4 * 2;
      if (k == 0) {
        multiply_keys<KEYS, 0>(scores, own_queries, own_keys);
      } else {
        multiply_keys<KEYS, 1>(scores, own_queries, own_keys);
      }
    }
    commit_products();
  };
  const auto start_values = [&]() {
    const u64 first_values = values_descriptor(values.bytes + value_stage.stage * STAGE_BYTES);
    start_multiplying();
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) multiply_values<HEAD_DIM>(sums, weights + 4 * k, first_values + k * (BOX_BYTES / 16));
    commit_products();
  };
  const auto wait_for_keys = [&]() { wait(keys.full + 8 * key_stage.stage, key_stage.parity); };
  const auto wait_for_values = [&]() { wait(values.full + 8 * value_stage.stage, value_stage.parity); };
  const auto release = [&](const Ring& ring, Place& place) {
    if (lane == 0) arrive(ring.empty + 8 * place.stage);
    place.advance(STAGES);
  };
  const auto weigh = [&](const Sight& sight, int step) {
    if (step < sight.full_steps) {
      softmax.weigh<false>(scores, unit, sight.last_key);
    } else {
      const int here[2] = {sight.last_key[0] - step * KEYS, sight.last_key[1] - step * KEYS};
      softmax.weigh<true>(scores, unit, here);
    }
  };
  const auto clear_behind_row = [&](const Tile& tile) {
    const int end = tile.context_len - (tile.num_steps - 1) * KEYS;  // of the row's keys in the last stage
    if (end >= KEYS || end % BOX_KEYS == 0) return;
    wait_for_values();
    clear_values(values.bytes + value_stage.stage * STAGE_BYTES, end);
    show_copies_to_tensor_cores();
    synchronize_consumers();
  };
  // Gives the slot back.
  const auto store_tile = [&](int stage) {
    synchronize_group(group);  // all have finished with the queries
    store_out(out, sums, factor, queries.bytes + stage * QUERY_BYTES, tiles[stage], first_row, num_heads, lane);
    show_copies_to_tensor_cores();
    __syncwarp();
    if (lane == 0) arrive(queries.empty + 8 * stage);
  };
  const auto begin_sums = [&]() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] = 0.0f;
  };

  if (group == 1) give_turn(group);
  Sight sight = see_tile();
  if (sight.num_steps > 0) {
    wait_for_keys();
    start_scores();
    wait_for_products<0>();
    settle(scores);
    release(keys, key_stage);
    weigh(sight, 0);  // every row sees key 0, so from here on `largest` is a number
    round_weights(weights, scores);
    begin_sums();

    int step = 0, finished;  // step: of these weights; finished: the slot of their tile
    while (true) {
      finished = slot.stage;
      const bool is_last = ++step == sight.num_steps;
      if (is_last) {
        clear_behind_row(tiles[finished]);
        slot.advance(SLOTS);
        sight = see_tile();
        step = 0;
        if (sight.num_steps == 0) break;
      }
      wait_for_keys();
      wait_for_turn(group);
      start_scores();
      wait_for_values();
      start_values();
      give_turn(group);
      if (is_last) softmax.finish(factor);
      wait_for_products<1>();
      settle(scores);
      release(keys, key_stage);
      weigh(sight, step);
      wait_for_products<0>();
      settle(sums);
      settle(weights);
      release(values, value_stage);
      if (is_last) {
        store_tile(finished);
        begin_sums();
      } else {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) sums[i] *= softmax.rescale[i / 2 % 2];
      }
      round_weights(weights, scores);
    }

    wait_for_values();
    start_values();
    softmax.finish(factor);
    wait_for_products<0>();
    settle(sums);
    store_tile(finished);
  }
  if (group == 0) wait_for_turn(group);  // the last that was given
}

// Grid: as many CTAs as run at once, or fewer. Maps: see load_queries and load_keys; a page has 16 << page_shift keys, and a kv
// head begins head_stride times 64 numbers behind the one before it. out is contiguous. Rows of fewer than min_queries queries
// are left out.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill_attention(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                  const __grid_constant__ TensorMap value_map, u16* out, const int* tables, const int* query_starts,
                  const int* context_lens, int num_rows, int stride_table, int num_kv_heads, int page_shift, int num_pages,
                  int head_stride, int min_queries, float scale) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * (SLOTS + 2 * STAGES)];
  __shared__ Tile slots[SLOTS];
  const u32 base = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 first = shared_address(barriers);
  const Ring queries{base, first, first + 8 * SLOTS};
  const Ring keys{base + SLOTS * QUERY_BYTES, first + 16 * SLOTS, first + 16 * SLOTS + 8 * STAGES};
  const Ring values{keys.bytes + STAGES * STAGE_BYTES, keys.full + 16 * STAGES, keys.empty + 16 * STAGES};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == CONSUMERS) {
    prefetch_map(query_map);
    prefetch_map(key_map);
    prefetch_map(value_map);
    const auto init = [](const Ring& ring, int stages) {
      for (int stage = 0; stage < stages; ++stage) {
        init_barrier(ring.full + 8 * stage, 1);
        init_barrier(ring.empty + 8 * stage, CONSUMERS / 32);
      }
    };
    init(queries, SLOTS);
    init(keys, STAGES);
    init(values, STAGES);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  let_next_start();
  wait_for_previous();
  __syncthreads();

  if (warp >= CONSUMERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const Tiles tiles{query_starts, context_lens, num_rows, num_kv_heads, min_queries};
    const Pages pages{tables, stride_table, page_shift, num_pages, head_stride};
    if (warp == CONSUMERS / 32) copy_queries(queries, slots, query_map, tiles, lane);
    if (warp == CONSUMERS / 32 + 1) copy_steps(keys, key_map, tiles, pages, lane);
    if (warp == CONSUMERS / 32 + 2) copy_steps(values, value_map, tiles, pages, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    attend_tiles(queries, keys, values, slots, out, num_kv_heads * GROUP, scale * LOG2_E, warp / 4);
  }
}
