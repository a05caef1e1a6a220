// y[pair] = x[row of the pair] @ weight[expert of the pair]^T for the pairs of each expert, on sm_90a, where experts have many
// pairs each: at the rate of the tensor cores.
//
// Pairs are sorted by expert (moe_sort.py): those of expert e are pairs[expert_starts[e] .. expert_starts[e + 1]). An item is TILE
// rows of one expert's weight (the M side of wgmma) by up to PAIRS of its pairs (the N side). An expert's pairs are shared out
// evenly among its items, in multiples of 16 for which there is an instruction each, so that few products are made in vain.
// A CTA takes every gridDim.x-th item. One warpgroup copies ahead through all of them, stages of 64 inputs: the weight by TMA, and
// where the rows of x are IN_ORDER of the places of `pairs` these too; scattered rows 16 bytes a lane. Two warpgroups multiply, 128
// rows of the weight each.
// GATED: 8 rows of the gate and the 8 rows of up for the same outputs follow each other in a stage, which leaves a gate and its up
// in one thread; y = activation(gate) * up, both rounded before. Otherwise y = scales[pair] * sum. Sums are float32, in the order of
// K. With sorted_rows the rows of y of the gated product are in the order of `pairs`, else in that of pair.
// It waits for the kernel before it lets the next one start, which may read the routing before its own wait.
//
// Set by the compiler's command line: PAIRS (a multiple of 16 up to 192), STAGES, IN_ORDER, FLOAT16, GATED,
// ACTIVATION.

#include "hopper.cuh"

constexpr int TILE = 256;
constexpr int OUTPUTS = GATED ? TILE / 2 : TILE;
constexpr int GROUPS = 2;         // warpgroups that multiply
constexpr int BLOCKS = 2;         // of 64 rows of the weight, of a warpgroup
constexpr int CONSUMERS = GROUPS * 128, PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int CONSUMER_REGISTERS = 224, PRODUCER_REGISTERS = 56;  // 65536 in all, by eights
constexpr int WEIGHT_BYTES = TILE * STEP_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + PAIRS * STEP_BYTES;
constexpr int ROWS_A_PRODUCER = PAIRS / 16;  // of x, whose 8 chunks of 16 bytes are copied by 8 threads
constexpr int BOX_ROWS = PAIRS % 32 == 0 ? 32 : 16;  // of x, where IN_ORDER
constexpr int PASS_OUTPUTS = 64;             // of a warpgroup, that lie in shared memory at once: rows of 128 swizzled bytes
constexpr int PASSES = OUTPUTS / GROUPS / PASS_OUTPUTS;
constexpr int PASS_BYTES = PAIRS * 2 * PASS_OUTPUTS;
constexpr int BLOCKS_AT_ONCE = 12;  // of an expert's outputs: those and the pairs that meet them stay in L2
constexpr int MAX_EXPERTS = 256;

struct Item {
  int expert, first_output, first_place, num_pairs, columns;  // num_pairs filled up to columns
};

// The box of TILE rows of a weight [expert, group of 8 rows, gate or up, row, input]; not GATED: [expert, 1, 1, row, input].
__device__ __forceinline__ void load_weight(u32 target, const TensorMap& map, int input, int output, int expert, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(
          target),
      "l"(&map), "r"(input), "r"(GATED ? 0 : output), "r"(0), "r"(GATED ? output / 8 : 0), "r"(expert), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void synchronize_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Four 8 x 8 matrices in the layout of wgmma's sums, each to 8 rows of 16 bytes, transposed; a lane has the address of a row.
__device__ __forceinline__ void store_transposed(u32 address, const u32 (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Two outputs from their gates and ups.
__device__ __forceinline__ u32 activate_two(const float* gates, const float* ups) {
  const u32 gate = round_two(gates[0], gates[1]), up = round_two(ups[0], ups[1]);
  return round_two(activate(widen_input(gate & 0xffff), widen_input(up & 0xffff), ACTIVATION),
                   activate(widen_input(gate >> 16), widen_input(up >> 16), ACTIVATION));
}

// Grid: as many CTAs as run at once. The weight's map has boxes of TILE rows x 64 inputs, see load_weight; that of x boxes of
// BOX_ROWS x 64, it is read where IN_ORDER. num_outputs: of y.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
tall_experts(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, const u16* x,
             const float* scales, u16* y, const int* pairs, const int* expert_starts, int stride_x, int num_inputs, int num_outputs, int num_experts, int pairs_per_row,
             int sorted_rows) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * STAGES];
  __shared__ int starts[MAX_EXPERTS + 1];       // of each expert's pairs
  __shared__ int first_items[MAX_EXPERTS + 1];  // of each expert, and how many there are
  __shared__ int rows_of_y[GROUPS][2][PAIRS];   // of this item's pairs and of those of the next, for each warpgroup
  __shared__ float scales_of_pairs[GROUPS][2][PAIRS];
  const u32 stages = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int steps = num_inputs / STEP_INPUTS, num_blocks = (num_outputs + OUTPUTS - 1) / OUTPUTS;

  if (threadIdx.x == CONSUMERS) {
    prefetch_map(weight_map);
    if (IN_ORDER) prefetch_map(x_map);
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + 8 * stage, IN_ORDER ? 1 : 1 + PRODUCERS);  // the weight, and scattered rows of each thread
      init_barrier(empty + 8 * stage, CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  wait_for_previous();
  let_next_start();
  for (int i = threadIdx.x; i <= num_experts; i += THREADS) starts[i] = load_from_l2(expert_starts + i);
  __syncthreads();

  // Pairs of each of an expert's items but the last, which has what is left.
  const auto share_of = [&](int count) {
    const int most_items = (count + PAIRS - 1) / PAIRS;
    return ((count + most_items - 1) / most_items + 15) / 16 * 16;
  };
  const auto num_tiles = [&](int count) { return count == 0 ? 0 : (count + share_of(count) - 1) / share_of(count); };
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < num_experts; first += 32) {
      const int expert = first + lane;
      const int items = expert < num_experts ? num_tiles(starts[expert + 1] - starts[expert]) * num_blocks : 0;
      int to_here = items;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffff, to_here, distance);
        if (lane >= distance) to_here += other;
      }
      if (expert < num_experts) first_items[expert] = before + to_here - items;
      before += __shfl_sync(0xffffffff, to_here, 31);
    }
    if (lane == 0) first_items[num_experts] = before;
  }
  __syncthreads();
  const int num_items = first_items[num_experts];
  // `expert`: not after the item's. An expert's items go through BLOCKS_AT_ONCE blocks of outputs for all its pairs, then the next.
  const auto find_item = [&](int index, int expert) {
    while (index >= first_items[expert + 1]) ++expert;
    const int count = starts[expert + 1] - starts[expert], share = share_of(count), tiles = (count + share - 1) / share;
    const int own = index - first_items[expert], band = own / (tiles * BLOCKS_AT_ONCE) * BLOCKS_AT_ONCE;
    const int in_band = own - band * tiles, width = min(BLOCKS_AT_ONCE, num_blocks - band), tile = in_band / width;
    const int num_pairs = min(share, count - tile * share);
    const int first_output = (band + in_band - tile * width) * OUTPUTS;
    return Item{expert, first_output, starts[expert] + tile * share, num_pairs, (num_pairs + 15) / 16 * 16};
  };

  Place ring;
  if (warp >= CONSUMERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const int thread = threadIdx.x - CONSUMERS, chunk = thread % 8, first_row = thread / 8;
    if (IN_ORDER && thread > 0) return;
    const u32 own_chunk = first_row * STEP_BYTES + (chunk ^ (first_row & 7)) * 16;
    int count = 0, expert = 0;  // steps so far
    for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
      const Item item = find_item(index, expert);
      expert = item.expert;
      const int num_boxes = (item.columns + BOX_ROWS - 1) / BOX_ROWS;
      int sources[ROWS_A_PRODUCER];  // rows of x, none: -1
      if (!IN_ORDER) {
#pragma unroll
        for (int i = 0; i < ROWS_A_PRODUCER; ++i) {
          const int place = i * 16 + first_row;
          sources[i] = place < item.num_pairs ? load_from_l2(pairs + item.first_place + place) / pairs_per_row : -1;
        }
      }
      for (int step = 0; step < steps; ++step, ++count) {
        const u32 stage = stages + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
        if (count >= STAGES) wait(empty + 8 * ring.stage, ring.parity ^ 1);
        if (thread == 0) {
          arrive_and_expect(barrier, WEIGHT_BYTES + (IN_ORDER ? num_boxes * BOX_ROWS * STEP_BYTES : 0));
          load_weight(stage, weight_map, step * STEP_INPUTS, item.first_output, item.expert, barrier);
        }
        if (IN_ORDER) {
          for (int box = 0; box < num_boxes; ++box) {
            const u32 target = stage + WEIGHT_BYTES + box * BOX_ROWS * STEP_BYTES;
            load_box(target, x_map, step * STEP_INPUTS, item.first_place + box * BOX_ROWS, barrier);
          }
        } else {
          const u16* inputs = x + step * STEP_INPUTS + chunk * 8;
#pragma unroll
          for (int i = 0; i < ROWS_A_PRODUCER; ++i) {
            if (i * 16 < item.columns) {
              const u16* source = inputs + static_cast<long long>(max(sources[i], 0)) * stride_x;
              copy_chunk(stage + WEIGHT_BYTES + own_chunk + i * 16 * STEP_BYTES, source, sources[i] >= 0);
            }
          }
          arrive_when_copied(barrier);
        }
        ring.advance(STAGES);
      }
    }
    if (!IN_ORDER) asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    const int thread = threadIdx.x % 128;
    const u32 staging = stages + STAGES * STAGE_BYTES + group * PASS_BYTES;
    // store_transposed writes outputs of 16 pairs: matrices 0 and 1 of the first 8, 2 and 3 of the others. GATED: 8 outputs of each
    // block of 64 rows in turn; otherwise 16 of one block.
    const int matrix = lane / 8;
    const int own_chunk = GATED ? matrix % 2 * 4 + warp % 4 : warp % 4 * 2 + matrix % 2;
    const u32 own_row = staging + (matrix / 2 * 8 + lane % 8) * STEP_BYTES + (own_chunk ^ lane % 8) * 16;
    const auto acquire = [&]() {
      wait(full + 8 * ring.stage, ring.parity);
      if (!IN_ORDER) show_copies_to_tensor_cores();
      const u32 stage = stages + ring.stage * STAGE_BYTES;
      ring.advance(STAGES);
      return Operands{matrix_descriptor(stage + group * BLOCKS * 64 * STEP_BYTES), matrix_descriptor(stage + WEIGHT_BYTES)};
    };
    Place released;
    const auto release = [&]() {
      if (lane == 0) arrive(empty + 8 * released.stage);
      released.advance(STAGES);
    };
    float sums[BLOCKS][PAIRS / 2];
    int expert = 0, buffer = 0;
    for (int index = blockIdx.x; index < num_items; index += gridDim.x, buffer ^= 1) {
      const Item item = find_item(index, expert);
      expert = item.expert;
      for (int place = thread; place < item.num_pairs; place += 128) {
        const int pair = load_from_l2(pairs + item.first_place + place);
        rows_of_y[group][buffer][place] = GATED && sorted_rows ? item.first_place + place : pair;
        if (!GATED) scales_of_pairs[group][buffer][place] = scales[pair];
      }
      switch (item.columns / 16) {  // an instruction for each
#define CASE(sixteens) \
  case sixteens: \
    if constexpr (sixteens * 16 <= PAIRS) multiply_steps<sixteens * 16>(sums, steps, acquire, release); \
    break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
      }
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass) {
        synchronize_group(group);  // what the pass before left has been read, what is known of the pairs is there
#pragma unroll
        for (int i = 0; i < PAIRS / 16; ++i) {
          if (i * 16 < item.columns) {
            u32 matrices[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const float* own = sums[GATED ? j : pass] + 8 * i + 4 * half;  // rows r, r, r + 8, r + 8 for pairs 2 c, 2 c + 1
                if (GATED) {
                  matrices[2 * half + j] = activate_two(own, own + 2);
                } else {
                  const float* scale = scales_of_pairs[group][buffer] + i * 16 + half * 8 + lane % 4 * 2;
                  matrices[2 * half + j] = round_two(own[2 * j] * scale[0], own[2 * j + 1] * scale[1]);
                }
              }
            }
            store_transposed(own_row + i * 16 * STEP_BYTES, matrices);
          }
        }
        synchronize_group(group);
        const int chunk = thread % 8;
        const int output = item.first_output + (group * PASSES + pass) * PASS_OUTPUTS + chunk * 8;
        if (output < num_outputs) {
#pragma unroll 4
          for (int place = thread / 8; place < item.num_pairs; place += 16) {
            uint4 values;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                         : "r"(staging + place * STEP_BYTES + (chunk ^ (place & 7)) * 16)
                         : "memory");
            *reinterpret_cast<uint4*>(y + static_cast<long long>(rows_of_y[group][buffer][place]) * num_outputs + output) = values;
          }
        }
      }
    }
  }
}
