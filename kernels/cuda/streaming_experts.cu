// y[pair] = x[row of the pair] @ weight[expert of the pair]^T for the pairs of each expert, on sm_90a: the weights of the experts
// that have pairs flow through shared memory at the rate of DRAM.
//
// Pairs are sorted by expert (moe_sort.py): those of expert e are pairs[expert_starts[e] .. expert_starts[e + 1]). The weight is on
// the M side of wgmma (64 of its rows a warpgroup), up to ROWS pairs on the N side; an expert with more takes several passes.
// An item is TILE rows of one expert's weight. A CTA takes every gridDim.x-th item, and one warp copies ahead of the others through
// all of them: the weight by TMA, the scattered rows of x 16 bytes a lane. So the memory is never idle between items.
// GATED: the first half of the TILE are rows of the gate, the second half those of up; y = activation(gate) * up, both rounded
// before. Otherwise y = scales[pair] * sum. Sums are float32, in the order of K. With sorted_rows the rows of what lies between the
// two products (y of the gated one, x of the other) are in the order of `pairs`, else in that of pair.
//
// When is it known which experts have pairs? ROUTING_BEFORE: already before the wait for the previous kernel, which must have let
// this one start after its own wait. ASSUME_ALL: not yet, but nearly all have some; the first item is copied in any case.
//
// Set by the compiler's command line: ROWS (8, 16, 32, 64), TILE (64, 128, 256), FLOAT16, GATED.

#include "streaming.cuh"

constexpr int THREADS = CONSUMERS + 32;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int PITCH = TILE + 4;  // floats between the sums of two pairs: lanes keep off each other's banks
constexpr int MAX_EXPERTS = 512;
constexpr int ROWS_A_LANE = ROWS / 4;  // of x, whose 8 chunks of 16 bytes are copied by 8 lanes

enum Routing { UNKNOWN = 0, ROUTING_BEFORE = 1, ASSUME_ALL = 2 };

// One item: the first of its outputs, the place of its first pair and the number of them.
struct Item {
  int first_output, first_place, num_pairs;
};

extern "C" __global__ void __launch_bounds__(THREADS)
streaming_experts(const __grid_constant__ TensorMap weight_map, const u16* x, const float* scales, u16* y, const int* pairs,
                  const int* expert_starts, int stride_x, int num_inputs, int num_outputs, int num_experts, int tiles_an_expert,
                  int pairs_per_row, int num_stages, int activation, int routing, int sorted_rows) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * MAX_STAGES];
  __shared__ int starts[MAX_EXPERTS + 1];  // of each expert's pairs
  __shared__ short active[MAX_EXPERTS];    // experts that have pairs, ascending
  __shared__ int num_active;
  const u32 stages = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 parts = stages + num_stages * STAGE_BYTES;                  // sums of a pass: [pair, row of the tile]
  const u32 full = shared_address(barriers), empty = full + 8 * MAX_STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = num_inputs / STEP_INPUTS;

  const auto read_routing = [&]() {
    for (int i = threadIdx.x; i <= num_experts; i += THREADS) starts[i] = load_from_l2(expert_starts + i);
    __syncthreads();
    if (warp == 0) {
      int found = 0;
      for (int first = 0; first < num_experts; first += 32) {
        const int expert = first + lane;
        const bool has_pairs = expert < num_experts && starts[expert + 1] > starts[expert];
        const u32 those = __ballot_sync(0xffffffff, has_pairs);
        if (has_pairs) active[found + __popc(those & ((1u << lane) - 1))] = static_cast<short>(expert);
        found += __popc(those);
      }
      if (lane == 0) num_active = found;
    }
    __syncthreads();
  };
  const auto expert_of = [&](int item) { return routing == ASSUME_ALL ? item / tiles_an_expert : active[item / tiles_an_expert]; };
  const auto load_weight = [&](int stage, int item, int step, u64 policy) {
    const u32 target = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
    const int first_output = item % tiles_an_expert * OUTPUTS;
    const int row = expert_of(item) * (GATED ? 2 : 1) * num_outputs + first_output;
    arrive_and_expect(barrier, WEIGHT_BYTES);
    load_box(target, weight_map, step * STEP_INPUTS, row, barrier, policy);
    if (GATED) load_box(target + OUTPUTS * STEP_BYTES, weight_map, step * STEP_INPUTS, num_outputs + row, barrier, policy);
  };

  const bool is_producer = threadIdx.x == CONSUMERS;
  u64 policy = 0;
  if (is_producer) {
    prefetch_map(weight_map);
    for (int stage = 0; stage < num_stages; ++stage) {
      init_barrier(full + 8 * stage, 1 + 32);  // the weight, and x of each lane
      init_barrier(empty + 8 * stage, GROUPS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    policy = read_once_policy();
  }
  __syncthreads();
  if (routing == ROUTING_BEFORE) read_routing();
  int num_items = (routing == ASSUME_ALL ? num_experts : routing == ROUTING_BEFORE ? num_active : 0) * tiles_an_expert;
  int prefilled = 0;
  if (static_cast<int>(blockIdx.x) < num_items) {
    prefilled = min(steps, num_stages);
    if (is_producer) {
      for (int stage = 0; stage < prefilled; ++stage) load_weight(stage, blockIdx.x, stage, policy);
    }
  }
  wait_for_previous();
  let_next_start();  // not before: the next kernel may read the routing before its own wait
  if (routing != ROUTING_BEFORE) read_routing();
  if (routing == UNKNOWN) num_items = num_active * tiles_an_expert;
  const auto find_item = [&](int item) {
    const int expert = expert_of(item);
    return Item{item % tiles_an_expert * OUTPUTS, starts[expert], starts[expert + 1] - starts[expert]};
  };
  // An item that was copied ahead goes through one pass in any case.
  const auto num_passes = [&](const Item& item, bool is_first) {
    return max((item.num_pairs + ROWS - 1) / ROWS, is_first && prefilled > 0 ? 1 : 0);
  };

  if (warp == GROUPS * 4) {
    Place place;
    int ahead = prefilled;  // steps whose weight is on its way
    int count = 0;          // steps so far
    for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = find_item(index);
      const int passes = num_passes(item, index == static_cast<int>(blockIdx.x));
      for (int pass = 0; pass < passes; ++pass) {
        const u16* source[ROWS_A_LANE];
        bool is_there[ROWS_A_LANE];
#pragma unroll
        for (int i = 0; i < ROWS_A_LANE; ++i) {
          const int own = pass * ROWS + i * 4 + lane / 8;
          is_there[i] = own < item.num_pairs;
          int row = 0;
          if (is_there[i]) {
            row = item.first_place + own;
            if (GATED || !sorted_rows) row = load_from_l2(pairs + row) / pairs_per_row;
          }
          source[i] = x + static_cast<long long>(row) * stride_x + lane % 8 * 8;
        }
        for (int step = 0; step < steps; ++step, ++count) {
          if (count >= num_stages) wait(empty + 8 * place.stage, place.parity ^ 1);
          if (ahead > 0) {
            --ahead;
          } else if (lane == 0) {
            load_weight(place.stage, index, step, policy);
          }
          const u32 target = stages + place.stage * STAGE_BYTES + WEIGHT_BYTES;
#pragma unroll
          for (int i = 0; i < ROWS_A_LANE; ++i) {
            const int row = i * 4 + lane / 8;
            copy_chunk(target + row * STEP_BYTES + ((lane % 8) ^ (row & 7)) * 16, source[i] + step * STEP_INPUTS, is_there[i]);
          }
          arrive_when_copied(full + 8 * place.stage);
          place.advance(num_stages);
        }
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  Place filled, released;
  const auto acquire = [&]() {
    wait(full + 8 * filled.stage, filled.parity);
    show_copies_to_tensor_cores();
    const u32 weight = stages + filled.stage * STAGE_BYTES;
    filled.advance(num_stages);
    return Operands{matrix_descriptor(weight + warp / 4 * 64 * STEP_BYTES), matrix_descriptor(weight + WEIGHT_BYTES)};
  };
  const auto release = [&]() {
    if (lane == 0) arrive(empty + 8 * released.stage);
    released.advance(num_stages);
  };
  for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
    const Item item = find_item(index);
    const int passes = num_passes(item, index == static_cast<int>(blockIdx.x));
    for (int pass = 0; pass < passes; ++pass) {
      float sums[1][SUMS];
      multiply_steps<ROWS>(sums, steps, acquire, release);

      const int here = min(item.num_pairs - pass * ROWS, ROWS);  // pairs of this pass; none of an item copied in vain
      // After gather_four a lane has rows [row, row + 4) of the tile, of pair 8 i + 2 (lane % 4) + (lane / 4) % 2.
      const int row = warp * 16 + (lane & 8) + lane / 16 * 4;
      const u32 target = parts + 4 * ((lane % 4 * 2 + lane / 4 % 2) * PITCH + row);
      synchronize_consumers();  // the sums of the pass before have been read
#pragma unroll
      for (int i = 0; i < ROWS / 8; ++i) {
        if (8 * i < here) keep(target + 4 * 8 * i * PITCH, gather_four(sums[0] + 4 * i, lane));
      }
      synchronize_consumers();
      for (int four = threadIdx.x; four < here * (OUTPUTS / 4); four += CONSUMERS) {
        const int m = four / (OUTPUTS / 4), own = four % (OUTPUTS / 4) * 4;
        const int n = item.first_output + own;
        if (n >= num_outputs) continue;
        const int place = item.first_place + pass * ROWS + m, pair = load_from_l2(pairs + place);
        Four result = load(parts + 4 * (m * PITCH + own));
        if (GATED) {
          const Four up = load(parts + 4 * (m * PITCH + OUTPUTS + own));
          result = activate_four(result, up, activation);
        } else {
          const float scale = scales[pair];
          for (int i = 0; i < 4; ++i) result.value[i] *= scale;
        }
        const u64 y_row = GATED && sorted_rows ? place : pair;
        store(y, y_row * num_outputs + n, result, 4, false, true);
      }
    }
  }
}
