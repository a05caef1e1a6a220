// y[pair] = x[row of the pair] @ weight[expert of the pair]^T for the pairs of each expert, on sm_90a, where experts have many
// pairs each: at the rate of the tensor cores.
//
// Pairs are sorted by expert (moe_sort.py): those of expert e are pairs[expert_starts[e] .. expert_starts[e + 1]). An item is TILE
// rows of one expert's weight (the M side of wgmma) by up to PAIRS of its pairs (the N side). An expert's pairs are shared out
// evenly among its items, in multiples of 16 for which there is an instruction each, so that few products are made in vain.
// A CTA takes every gridDim.x-th item. One warpgroup copies ahead through all of them, stages of 64 inputs: the weight by TMA, and
// where the rows of x are IN_ORDER of the places of `pairs` these too; scattered rows 16 bytes a lane. Two warpgroups multiply, 128
// rows of the weight each.
// GATED: y = activation(gate) * up, both rounded before, see tall.cuh. Otherwise y = scales[pair] * sum. Sums are float32, in the
// order of K. With sorted_rows the rows of y of the gated product are in the order of `pairs`, else in that of pair.
// It waits for the kernel before it lets the next one start, which may read the routing before its own wait.
//
// Set by the compiler's command line: PAIRS (a multiple of 16 up to 192), STAGES, IN_ORDER, FLOAT16, GATED, ACTIVATION.

#include "tall.cuh"

constexpr int PRODUCERS = 128, THREADS = CONSUMERS + PRODUCERS;
constexpr int PRODUCER_REGISTERS = IN_ORDER ? 40 : 56, CONSUMER_REGISTERS = IN_ORDER ? 232 : 224;  // 168 a thread in all
constexpr int WEIGHT_BYTES = TILE * STEP_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + PAIRS * STEP_BYTES;
constexpr int ROWS_A_PRODUCER = PAIRS / 16;  // of x, whose 8 chunks of 16 bytes are copied by 8 threads
constexpr int BOX_ROWS = PAIRS % 32 == 0 ? 32 : 16;  // of x, where IN_ORDER
constexpr int PASS_BYTES = PAIRS * 2 * PASS_OUTPUTS;
constexpr int BLOCKS_AT_ONCE = 12;  // of an expert's outputs: those and the pairs that meet them stay in L2
constexpr int MAX_EXPERTS = 256;

struct Item {
  int expert, first_output, first_place, num_pairs, columns;  // num_pairs filled up to columns
};

// How the experts' pairs are cut into items, in shared memory.
struct Items {
  int starts[MAX_EXPERTS + 1];        // of each expert's pairs
  int first[MAX_EXPERTS + 1];         // item of each expert, and how many there are
  u16 tiles[MAX_EXPERTS];             // of an expert's pairs
  unsigned char shares[MAX_EXPERTS];  // pairs of each tile but the last, which has what is left

  // By one warp, when `starts` are there. The fewest tiles, shared out evenly.
  __device__ __forceinline__ void cut(int num_experts, int num_blocks, int lane) {
    int before = 0;
    for (int first_expert = 0; first_expert < num_experts; first_expert += 32) {
      const int expert = first_expert + lane;
      int own = 0;
      if (expert < num_experts) {
        const int count = starts[expert + 1] - starts[expert], fewest = max((count + PAIRS - 1) / PAIRS, 1);
        const int share = max(((count + fewest - 1) / fewest + 15) / 16 * 16, 16);
        own = (count + share - 1) / share;
        tiles[expert] = static_cast<u16>(own);
        shares[expert] = static_cast<unsigned char>(share);
      }
      int to_here = own * num_blocks;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffff, to_here, distance);
        if (lane >= distance) to_here += other;
      }
      if (expert < num_experts) first[expert] = before + to_here - own * num_blocks;
      before += __shfl_sync(0xffffffff, to_here, 31);
    }
    if (lane == 0) first[num_experts] = before;
  }

  // `expert`: not after the item's. An expert's items go through BLOCKS_AT_ONCE blocks of outputs for all its pairs, then the next.
  __device__ __forceinline__ Item find(int index, int expert, int num_blocks) const {
    while (index >= first[expert + 1]) ++expert;
    const u32 own = index - first[expert], tiles_here = tiles[expert];
    const u32 band = num_blocks <= BLOCKS_AT_ONCE ? 0 : own / (tiles_here * BLOCKS_AT_ONCE) * BLOCKS_AT_ONCE;
    const u32 in_band = own - band * tiles_here, width = min(BLOCKS_AT_ONCE, num_blocks - static_cast<int>(band));
    const u32 tile = in_band / width, share = shares[expert];
    const int first_place = starts[expert] + tile * share;
    const int num_pairs = min(starts[expert + 1] - first_place, static_cast<int>(share));
    const int first_output = static_cast<int>(band + in_band - tile * width) * OUTPUTS;
    return Item{expert, first_output, first_place, num_pairs, (num_pairs + 15) / 16 * 16};
  }
};

// What a role needs to go through items: from the first on every stride-th is this CTA's.
struct Job {
  const Items& items;
  int num_items, first_item, stride, num_blocks, steps;
  u32 stages, full, empty;  // addresses: of the stages, and of two mbarriers for each

  __device__ __forceinline__ Item find(int index, int expert) const { return items.find(index, expert, num_blocks); }
};

// Rows of x that are in the order of places, and the weight: by one thread.
__device__ __forceinline__ void copy_boxes(const Job& job, const TensorMap& weight_map, const TensorMap& x_map) {
  Place ring;
  int count = 0, expert = 0;  // steps so far
  for (int index = job.first_item; index < job.num_items; index += job.stride) {
    const Item item = job.find(index, expert);
    expert = item.expert;
    const int num_boxes = (item.columns + BOX_ROWS - 1) / BOX_ROWS;
    for (int step = 0; step < job.steps; ++step, ++count) {
      const u32 stage = job.stages + ring.stage * STAGE_BYTES, barrier = job.full + 8 * ring.stage;
      if (count >= STAGES) wait(job.empty + 8 * ring.stage, ring.parity ^ 1);
      arrive_and_expect(barrier, WEIGHT_BYTES + num_boxes * BOX_ROWS * STEP_BYTES);
      load_weight(stage, weight_map, step * STEP_INPUTS, item.first_output, item.expert, barrier);
      for (int box = 0; box < num_boxes; ++box) {
        const u32 target = stage + WEIGHT_BYTES + box * BOX_ROWS * STEP_BYTES;
        load_box(target, x_map, step * STEP_INPUTS, item.first_place + box * BOX_ROWS, barrier);
      }
      ring.advance(STAGES);
    }
  }
}

// Scattered rows of x, by PRODUCERS threads, and the weight.
__device__ __forceinline__ void copy_rows(const Job& job, const TensorMap& weight_map, const u16* x, const int* pairs, int stride_x,
                                          int pairs_per_row, int thread) {
  const int chunk = thread % 8, first_row = thread / 8;
  const u32 own_chunk = WEIGHT_BYTES + first_row * STEP_BYTES + (chunk ^ (first_row & 7)) * 16;
  Place ring;
  int count = 0, expert = 0;  // steps so far
  for (int index = job.first_item; index < job.num_items; index += job.stride) {
    const Item item = job.find(index, expert);
    expert = item.expert;
    int sources[ROWS_A_PRODUCER];  // rows of x, none: -1
#pragma unroll
    for (int i = 0; i < ROWS_A_PRODUCER; ++i) {
      const int place = i * 16 + first_row;
      sources[i] = place < item.num_pairs ? load_from_l2(pairs + item.first_place + place) / pairs_per_row : -1;
    }
    for (int step = 0; step < job.steps; ++step, ++count) {
      const u32 stage = job.stages + ring.stage * STAGE_BYTES, barrier = job.full + 8 * ring.stage;
      if (count >= STAGES) wait(job.empty + 8 * ring.stage, ring.parity ^ 1);
      if (thread == 0) {
        arrive_and_expect(barrier, WEIGHT_BYTES);
        load_weight(stage, weight_map, step * STEP_INPUTS, item.first_output, item.expert, barrier);
      }
      const u16* inputs = x + step * STEP_INPUTS + chunk * 8;
#pragma unroll
      for (int i = 0; i < ROWS_A_PRODUCER; ++i) {
        if (i * 16 < item.columns) {
          const u16* source = inputs + static_cast<long long>(max(sources[i], 0)) * stride_x;
          copy_chunk(stage + own_chunk + i * 16 * STEP_BYTES, source, sources[i] >= 0);
        }
      }
      arrive_when_copied(barrier);
      ring.advance(STAGES);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// What a warpgroup knows of the pairs of an item, in shared memory. GATED: only where y is not in the order of places.
struct Known {
  int pairs[PAIRS];
  float scales[GATED ? 1 : PAIRS];
};

// The same of the next item, on its way: of place `thread` and thread + 128.
struct Expected {
  int pairs[(PAIRS + 127) / 128];
  float scales[(PAIRS + 127) / 128];

  __device__ __forceinline__ void load_pairs(const Item& item, const int* source, int thread) {
#pragma unroll
    for (int i = 0; i < sizeof(pairs) / 4; ++i) {
      const int place = thread + 128 * i;
      pairs[i] = place < item.num_pairs ? load_from_l2(source + item.first_place + place) : 0;
    }
  }

  __device__ __forceinline__ void load_scales(const float* source) {
#pragma unroll
    for (int i = 0; i < sizeof(pairs) / 4; ++i) scales[i] = source[pairs[i]];
  }

  __device__ __forceinline__ void keep(Known& known, int thread) const {
#pragma unroll
    for (int i = 0; i < sizeof(pairs) / 4; ++i) {
      const int place = thread + 128 * i;
      if (place >= PAIRS) continue;
      known.pairs[place] = pairs[i];
      if (!GATED) known.scales[place] = scales[i];
    }
  }
};

// PASS_OUTPUTS of a warpgroup's outputs of 16 pairs, first_pair and on, to its staging. own_row: the address for a lane's row.
__device__ __forceinline__ void stage_outputs(float (&sums)[BLOCKS][PAIRS / 2], const Known& known, int pass, int i, u32 own_row,
                                              int lane) {
  u32 matrices[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* own = sums[GATED ? j : pass] + 8 * i + 4 * half;  // rows r, r, r + 8, r + 8 for pairs 2 c, 2 c + 1
      if (GATED) {
        matrices[2 * half + j] = activate_two(own, own + 2);
      } else {
        const float* scale = known.scales + i * 16 + half * 8 + lane % 4 * 2;
        matrices[2 * half + j] = round_two(own[2 * j] * scale[0], own[2 * j + 1] * scale[1]);
      }
    }
  }
  store_transposed(own_row + i * 16 * STEP_BYTES, matrices);
}

__device__ __forceinline__ void multiply_items(const Job& job, const float* scales, u16* y, const int* pairs, int num_outputs,
                                               bool in_order_of_places, Known (&known)[2], int group) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  Place ring, released;
  const auto acquire = [&]() {
    wait(job.full + 8 * ring.stage, ring.parity);
    if (!IN_ORDER) show_copies_to_tensor_cores();
    const u32 stage = job.stages + ring.stage * STAGE_BYTES;
    ring.advance(STAGES);
    return Operands{matrix_descriptor(stage + group * GROUP_ROWS * STEP_BYTES), matrix_descriptor(stage + WEIGHT_BYTES)};
  };
  const auto release = [&]() {
    if (lane == 0) arrive(job.empty + 8 * released.stage);
    released.advance(STAGES);
  };
  const u32 staging = job.stages + STAGES * STAGE_BYTES + group * PASS_BYTES, own_row = own_staged_row(staging, warp, lane);
  const int chunk = thread % 8;  // of 8 outputs, that the thread stores

  if (job.first_item >= job.num_items) return;
  const bool needs_pairs = !in_order_of_places;
  Expected expected;
  Item item = job.find(job.first_item, 0);
  if (needs_pairs) expected.load_pairs(item, pairs, thread);
  if (!GATED) expected.load_scales(scales);
  float sums[BLOCKS][PAIRS / 2];
  int buffer = 0;
  for (int index = job.first_item; index < job.num_items; index += job.stride, buffer ^= 1) {
    if (needs_pairs) expected.keep(known[buffer], thread);
    Item next = item;
    if (index + job.stride < job.num_items) next = job.find(index + job.stride, item.expert);
    if (needs_pairs) expected.load_pairs(next, pairs, thread);
    switch (item.columns / 16) {  // an instruction for each
#define CASE(sixteens) \
  case sixteens: \
    if constexpr (sixteens * 16 <= PAIRS) multiply_steps<sixteens * 16>(sums, job.steps, acquire, release); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
    if (!GATED) expected.load_scales(scales);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      synchronize_group(group);  // what the pass before left has been read, what is known of the pairs is there
#pragma unroll
      for (int i = 0; i < PAIRS / 16; ++i) {
        if (i * 16 < item.columns) stage_outputs(sums, known[buffer], pass, i, own_row, lane);
      }
      synchronize_group(group);
      const int output = item.first_output + (group * PASSES + pass) * PASS_OUTPUTS + chunk * 8;
      if (output >= num_outputs) continue;
#pragma unroll 4
      for (int place = thread / 8; place < item.num_pairs; place += 16) {
        const long long row = in_order_of_places ? item.first_place + place : known[buffer].pairs[place];
        *reinterpret_cast<Eight*>(y + row * num_outputs + output) =
            load_eight(staging + place * STEP_BYTES + (chunk ^ (place & 7)) * 16);
      }
    }
    item = next;
  }
}

// Grid: as many CTAs as run at once. The weight's map has boxes of TILE rows x 64 inputs, see load_weight; that of x boxes of
// BOX_ROWS x 64, it is read where IN_ORDER. num_outputs: of y.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
tall_experts(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, const u16* x,
             const float* scales, u16* y, const int* pairs, const int* expert_starts, int stride_x, int num_inputs,
             int num_outputs, int num_experts, int pairs_per_row, int sorted_rows) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * STAGES];
  __shared__ Items items;
  __shared__ Known known[GROUPS][2];  // of this item and of the next
  const u32 stages = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, num_blocks = (num_outputs + OUTPUTS - 1) / OUTPUTS;

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
  for (int i = threadIdx.x; i <= num_experts; i += THREADS) items.starts[i] = load_from_l2(expert_starts + i);
  __syncthreads();
  if (warp == 0) items.cut(num_experts, num_blocks, threadIdx.x);
  __syncthreads();

  const Job job{
      items,      items.first[num_experts], static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
      num_blocks, num_inputs / STEP_INPUTS, stages,                       full,
      empty,
  };
  if (warp >= CONSUMERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (!IN_ORDER) copy_rows(job, weight_map, x, pairs, stride_x, pairs_per_row, threadIdx.x - CONSUMERS);
    if (IN_ORDER && threadIdx.x == CONSUMERS) copy_boxes(job, weight_map, x_map);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    multiply_items(job, scales, y, pairs, num_outputs, GATED && sorted_rows, known[warp / 4], warp / 4);
  }
}
