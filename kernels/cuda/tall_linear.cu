// y[M, N] = x[M, K] @ weight[N, K]^T + bias for many rows, on sm_90a: at the rate of the tensor cores.
//
// An item is TILE rows of the weight (the M side of wgmma) by ROWS of x (the N side). A CTA takes every gridDim.x-th place of
// the items' order. One of its threads copies ahead through all of them (TMA, stages of 64 inputs); two warpgroups multiply, 128
// rows of the weight each. GATED: y = activation(gate) * up, both rounded before, see tall.cuh. Sums are float32, in the order
// of K. Outputs are stored by TMA, which leaves out what is not there of the last items.
//
// Set by the compiler's command line: ROWS (a multiple of 16 up to 192), STAGES, FLOAT16, GATED, ACTIVATION.

#include "tall.cuh"

constexpr int THREADS = CONSUMERS + 128;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;  // 168 a thread in all
constexpr int WEIGHT_BYTES = TILE * STEP_BYTES, X_BYTES = ROWS * STEP_BYTES, STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int STAGING_BYTES = ROWS * 2 * PASS_OUTPUTS;  // of a warpgroup

// --- outputs

__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, u32 source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row),
               "r"(source)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread's store_box was given has been read.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until it has been written.
__device__ __forceinline__ void wait_until_stored() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- items

struct Item {
  int first_output, first_row;
};

// The items of a CTA, of all: bands of `band` tiles of the weight by all tiles of x, so that both stay in L2.
struct Order {
  int weight_tiles, row_tiles, band, first, stride;  // this CTA's first place, and the distance

  __device__ __forceinline__ int num_places() const { return weight_tiles * row_tiles; }

  __device__ __forceinline__ Item at(int place) const {
    const int band_places = band * row_tiles, before = place / band_places * band, in_band = place % band_places;
    const int width = min(band, weight_tiles - before);
    return Item{(before + in_band % width) * OUTPUTS, in_band / width * ROWS};
  }
};

// The addresses of the stages and of two mbarriers for each.
struct Ring {
  u32 stages, full, empty;
};

// By one thread.
__device__ __forceinline__ void copy_items(const Order& order, const Ring& ring, const TensorMap& weight_map, const TensorMap& x_map,
                                           int steps) {
  Place place;
  int count = 0;  // steps so far
  for (int index = order.first; index < order.num_places(); index += order.stride) {
    const Item item = order.at(index);
    for (int step = 0; step < steps; ++step, ++count) {
      const u32 stage = ring.stages + place.stage * STAGE_BYTES, barrier = ring.full + 8 * place.stage;
      if (count >= STAGES) wait(ring.empty + 8 * place.stage, place.parity ^ 1);
      arrive_and_expect(barrier, STAGE_BYTES);
      load_weight(stage, weight_map, step * STEP_INPUTS, item.first_output, 0, barrier);
      load_box(stage + WEIGHT_BYTES, x_map, step * STEP_INPUTS, item.first_row, barrier);
      place.advance(STAGES);
    }
  }
}

// Of the two rows of each block of the weight whose sums a thread has, `output` is that of the first of the warpgroup.
struct Biases {
  float of[BLOCKS][2];

  __device__ __forceinline__ Biases(const u16* bias, int output, int num_outputs, int warp, int lane) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = output + (GATED ? block * 32 + warp * 8 : block * 64 + warp * 16 + half * 8) + lane / 4;
        of[block][half] = bias != nullptr && own < num_outputs ? widen_input(bias[own + (GATED ? half * num_outputs : 0)]) : 0.0f;
      }
    }
  }

  // sums of rows r, r, r + 8, r + 8 of the weight for two rows of x.
  __device__ __forceinline__ void add_to(float* sums, int block) const {
    for (int i = 0; i < 4; ++i) sums[i] += of[block][i / 2];
  }
};

// PASS_OUTPUTS of a warpgroup's outputs of ROWS rows to its staging.
__device__ __forceinline__ void stage_outputs(float (&sums)[BLOCKS][ROWS / 2], const Biases& biases, int pass, u32 own_row) {
#pragma unroll
  for (int i = 0; i < ROWS / 16; ++i) {
    u32 matrices[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int block = GATED ? j : pass;
        float* own = sums[block] + 8 * i + 4 * half;
        if (GATED || j == 0) biases.add_to(own, block);
        matrices[2 * half + j] = GATED ? activate_two(own, own + 2) : round_two(own[2 * j], own[2 * j + 1]);
      }
    }
    store_transposed(own_row + i * 16 * STEP_BYTES, matrices);
  }
}

__device__ __forceinline__ void multiply_items(const Order& order, const Ring& ring, const TensorMap& y_map, const u16* bias,
                                               int num_outputs, int steps, int group) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const u32 staging = ring.stages + STAGES * STAGE_BYTES + group * STAGING_BYTES, own_row = own_staged_row(staging, warp, lane);
  Place place, released;
  const auto acquire = [&]() {
    wait(ring.full + 8 * place.stage, place.parity);
    const u32 stage = ring.stages + place.stage * STAGE_BYTES;
    place.advance(STAGES);
    return Operands{matrix_descriptor(stage + group * GROUP_ROWS * STEP_BYTES), matrix_descriptor(stage + WEIGHT_BYTES)};
  };
  const auto release = [&]() {
    if (lane == 0) arrive(ring.empty + 8 * released.stage);
    released.advance(STAGES);
  };

  float sums[BLOCKS][ROWS / 2];
  for (int index = order.first; index < order.num_places(); index += order.stride) {
    const Item item = order.at(index);
    multiply_steps<ROWS>(sums, steps, acquire, release);
    const int first_output = item.first_output + group * GROUP_OUTPUTS;
    const Biases biases(bias, first_output, num_outputs, warp, lane);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      if (thread == 0) wait_until_read();
      synchronize_group(group);
      stage_outputs(sums, biases, pass, own_row);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // before the copy engine reads it
      synchronize_group(group);
      if (thread == 0) store_box(y_map, first_output + pass * PASS_OUTPUTS, item.first_row, staging);
    }
  }
  if (thread == 0) wait_until_stored();
}

// Grid: as many CTAs as run at once. Boxes of the maps: TILE rows of the weight and ROWS of x, each x 64 inputs; ROWS of y x 64
// outputs. num_outputs: of y. bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
tall_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
            const __grid_constant__ TensorMap y_map, const u16* bias, int num_rows, int num_inputs, int num_outputs, int band) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * STAGES];
  const u32 full = shared_address(barriers);
  const Ring ring{(shared_address(dynamic_memory) + 1023) & ~1023u, full, full + 8 * STAGES};  // whole groups of swizzled rows
  const int warp = threadIdx.x / 32, steps = (num_inputs + STEP_INPUTS - 1) / STEP_INPUTS;
  const int weight_tiles = (num_outputs + OUTPUTS - 1) / OUTPUTS, row_tiles = (num_rows + ROWS - 1) / ROWS;
  const Order order{weight_tiles, row_tiles, band, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};

  if (threadIdx.x == CONSUMERS) {
    prefetch_map(weight_map);
    prefetch_map(x_map);
    prefetch_map(y_map);
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(ring.full + 8 * stage, 1);
      init_barrier(ring.empty + 8 * stage, CONSUMERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();

  if (warp >= CONSUMERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x == CONSUMERS) copy_items(order, ring, weight_map, x_map, steps);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    multiply_items(order, ring, y_map, bias, num_outputs, steps, warp / 4);
  }
}
