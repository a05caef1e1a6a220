// y[M, N] = x[M, K] @ weight[N, K]^T + bias for few rows, on sm_90a: the weight flows through shared memory at the rate of DRAM.
//
// The weight is on the M side of wgmma (64 of its rows a warpgroup), the rows of x on the N side, so that tiles are full however
// few rows x has. A CTA owns TILE rows of the weight and, where the CTAs of a cluster share K, a contiguous range of it. Two
// threads issue the copies (TMA, 64 numbers of K a stage, rows of 128 swizzled bytes), one those of the weight and one those of x:
// behind the weight in the same stage (ONE_RING: one barrier to wait for), or, where x has many rows, in a ring of its own, many
// stages of the weight to hide the latency of DRAM, few of x that of L2. A warpgroup for each 64 rows of the weight multiplies.
// All stages of the weight are filled before the kernel waits for the one before it in the stream:
// only then is x read and y written. Partial sums are sent to the CTA of the cluster that owns their outputs, which adds them in
// the order of the ranks. They have memory of their own, so that a CTA sends as soon as it is done; where that is too little
// (reuses_stages), they take the place of the stages, and are sent when every CTA of the cluster is done with these.
// GATED: the first half of the TILE are rows of the gate, the second half those of up, both for the same outputs.
// RACE: the outputs are a head's logits, of which only those are stored that are wanted; see race.cuh. K is not shared then.
//
// Set by the compiler's command line: ROWS (8, 16, 32, 64, 128: rows of x, filled up), TILE (64, 128, 192, 256), FLOAT16, GATED,
// ONE_RING; perhaps RACE.

#include "streaming.cuh"
#if RACE
#include "race.cuh"
#endif

constexpr int THREADS = CONSUMERS + 64;
constexpr int UNITS = OUTPUTS / 8;  // outputs are shared out among the CTAs of a cluster by eights
constexpr int MAX_SPLITS = 8;
constexpr int STAGE_BYTES = WEIGHT_BYTES + (ONE_RING ? X_BYTES : 0);
constexpr int X_STAGE_BYTES = ONE_RING ? STAGE_BYTES : X_BYTES;

// --- clusters

// The sum over the cluster's CTAs in the order of their ranks, whose parts are `rank_bytes` apart.
__device__ __forceinline__ Four add_parts(u32 address, u32 rank_bytes, int num_splits) {
  Four total = load(address);
#pragma unroll
  for (int rank = 1; rank < MAX_SPLITS; ++rank) {
    if (rank < num_splits) {
      const Four part = load(address + rank * rank_bytes);
      for (int i = 0; i < 4; ++i) total.value[i] += part.value[i];
    }
  }
  return total;
}

// Four of the biases before an output of y; none for outputs that there are not.
__device__ __forceinline__ Four load_bias(const u16* bias, int count) {
  Four four = {};
  for (int i = 0; i < 4; ++i) {
    if (bias != nullptr && i < count) four.value[i] = widen_input(bias[i]);
  }
  return four;
}

// Grid: CTAs that share K (one cluster), tiles. The tensor maps have boxes of 64 x OUTPUTS numbers of the weight, 64 x ROWS of x.
// Of the steps of 64 inputs each CTA takes steps_each, the first extra_steps of them one more. Of a tile's UNITS each CTA
// stores units_each, the last ones what is left. A stage is given back one step after its own, so there are 2 of each at least,
// unless there is but one step. ONE_RING: num_x_stages is num_stages. bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
streaming_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, const u16* bias, void* y,
                 int num_rows, int num_outputs, int steps_each, int extra_steps, int units_each, int num_stages, int num_x_stages,
                 int reuses_stages, int activation, int is_float32
#if RACE
                 ,
                 const __grid_constant__ Race race
#endif
) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[4 * MAX_STAGES + 1];
#if RACE
  __shared__ Racer racers[ROWS];
#endif
  const u32 stages = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 x_stages = stages + (ONE_RING ? 1 : num_stages) * WEIGHT_BYTES;
  const u32 parts = reuses_stages ? stages : stages + num_stages * WEIGHT_BYTES + num_x_stages * X_BYTES;
  const u32 received = shared_address(barriers), full = received + 8, empty = full + 8 * MAX_STAGES;
  const u32 x_full = ONE_RING ? full : empty + 8 * MAX_STAGES, x_empty = ONE_RING ? empty : x_full + 8 * MAX_STAGES;

  const int split = blockIdx.x, num_splits = gridDim.x;
  const int first_step = split * steps_each + min(split, extra_steps);
  const int steps = steps_each + (split < extra_steps ? 1 : 0);
  const int first_output = blockIdx.y * OUTPUTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool copies_weight = threadIdx.x == CONSUMERS, copies_x = threadIdx.x == CONSUMERS + 32;

  // Parts: [rank, row of x, own outputs (GATED: gates, then ups)]. 4 floats after each row keep lanes off each other's banks.
  const int first_unit = split * units_each;
  const int own_outputs = 8 * max(min(units_each, UNITS - first_unit), 0);
  const int ups = 8 * units_each;  // where they begin
  const int pitch = (GATED ? 2 : 1) * ups + 4;
  const u32 rank_bytes = 4 * ROWS * pitch;

  const auto load_weight = [&](int stage, int step, u64 policy) {
    const u32 target = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
    const int input = (first_step + step) * STEP_INPUTS;
    arrive_and_expect(barrier, WEIGHT_BYTES);
    load_box(target, weight_map, input, first_output, barrier, policy);
    if (GATED) load_box(target + OUTPUTS * STEP_BYTES, weight_map, input, num_outputs + first_output, barrier, policy);
  };

  if (copies_weight) {
    prefetch_map(weight_map);
    for (int stage = 0; stage < num_stages; ++stage) {
      init_barrier(full + 8 * stage, ONE_RING ? 2 : 1);
      init_barrier(empty + 8 * stage, GROUPS * 4);
    }
    for (int stage = 0; !ONE_RING && stage < num_x_stages; ++stage) {
      init_barrier(x_full + 8 * stage, 1);
      init_barrier(x_empty + 8 * stage, GROUPS * 4);
    }
    init_barrier(received, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const u64 policy = read_once_policy();
    for (int stage = 0; stage < min(steps, num_stages); ++stage) load_weight(stage, stage, policy);
    if (num_splits > 1) arrive_and_expect(received, num_splits * own_outputs * (GATED ? 2 : 1) * ((num_rows + 7) / 8 * 8) * 4);
  }
  if (copies_x) prefetch_map(x_map);
  __syncthreads();
  if (num_splits > 1 && !reuses_stages) arrive_at_cluster();
  let_next_start();
  wait_for_previous();

  if (warp >= GROUPS * 4) {
    if (copies_weight) {
      const u64 policy = read_once_policy();
      Place place;
      for (int step = num_stages; step < steps; ++step) {
        wait(empty + 8 * place.stage, place.parity);
        load_weight(place.stage, step, policy);
        place.advance(num_stages);
      }
    }
    if (copies_x) {
      const u64 policy = read_often_policy();
      Place place;
      for (int step = 0; step < steps; ++step) {
        if (step >= num_x_stages) wait(x_empty + 8 * place.stage, place.parity ^ 1);
        arrive_and_expect(x_full + 8 * place.stage, X_BYTES);
        load_box(x_stages + place.stage * X_STAGE_BYTES, x_map, (first_step + step) * STEP_INPUTS, 0, x_full + 8 * place.stage, policy);
        place.advance(num_x_stages);
      }
    }
    __syncwarp();
    if (num_splits > 1) {
      if (reuses_stages) arrive_at_cluster();
      wait_for_cluster();
    }
    return;
  }

#if RACE
  load_racer(racers, race, num_rows);
#endif
  Place place, x_place, released, x_released;
  const auto acquire = [&]() {
    const u32 weight = stages + place.stage * STAGE_BYTES + warp / 4 * 64 * STEP_BYTES;
    const u32 x = x_stages + x_place.stage * X_STAGE_BYTES;
    wait(full + 8 * place.stage, place.parity);
    if (!ONE_RING) wait(x_full + 8 * x_place.stage, x_place.parity);
    place.advance(num_stages);
    x_place.advance(num_x_stages);
    return Operands{matrix_descriptor(weight), matrix_descriptor(x)};
  };
  const auto release = [&]() {
    if (lane == 0) {
      arrive(empty + 8 * released.stage);
      if (!ONE_RING) arrive(x_empty + 8 * x_released.stage);
    }
    released.advance(num_stages);
    x_released.advance(num_x_stages);
  };
  float sums[1][SUMS];
  multiply_steps<ROWS>(sums, steps, acquire, release);
  if (reuses_stages) {  // the stages of every CTA that is written to have been read
    if (num_splits > 1) {
      arrive_at_cluster();
    } else {
      synchronize_consumers();
    }
  }

  // After gather_four a lane has rows [row, row + 4) of the tile, of row 8 i + 2 (lane % 4) + (lane / 4) % 2 of x.
  const int row = warp * 16 + (lane & 8) + lane / 16 * 4;
  const bool is_up = GATED && row >= OUTPUTS;
  const int column = is_up ? row - OUTPUTS : row;  // among the tile's outputs
  const u32 owner = static_cast<u32>(column / 8) / static_cast<u32>(units_each);
  const int among_8 = lane % 4 * 2 + lane / 4 % 2;  // rows of x
  u32 target = parts + split * rank_bytes + 4 * (among_8 * pitch + column - 8 * owner * units_each + (is_up ? ups : 0));
  u32 barrier = received;
  if (num_splits > 1) {
    wait_for_cluster();
    target = address_in_rank(target, owner);
    barrier = address_in_rank(barrier, owner);
  }
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    if (8 * i < num_rows) {
      const Four four = gather_four(sums[0] + 4 * i, lane);
      if (num_splits > 1) {
        send(target + 32 * i * pitch, barrier, four);
      } else {
        keep(target + 32 * i * pitch, four);
      }
    }
  }
  if (own_outputs == 0) return;
  if (num_splits == 1) {
    synchronize_consumers();
  } else {
    wait_for_peers(received, 0);
  }
#if RACE
  race_tile(parts, pitch, racers, race, y, num_rows, num_outputs);
#else

  // A thread has four outputs, and goes down the rows of x.
  const u32 row_fours = own_outputs / 4, rows_at_once = CONSUMERS / row_fours;
  const u32 first_row = threadIdx.x / row_fours, own = threadIdx.x % row_fours * 4;
  const int n = first_output + 8 * first_unit + own, count = num_outputs - n;
  if (first_row >= rows_at_once || count <= 0) return;
  const bool is_aligned = num_outputs % 4 == 0 && (reinterpret_cast<u64>(y) & 15) == 0;
  const Four bias_four = load_bias(bias == nullptr ? nullptr : bias + n, count);
  const Four up_bias = load_bias(bias == nullptr ? nullptr : bias + num_outputs + n, GATED ? count : 0);
#pragma unroll 4
  for (u32 m = first_row; m < num_rows; m += rows_at_once) {
    const u32 address = parts + 4 * (m * pitch + own);
    Four result = add_parts(address, rank_bytes, num_splits);
    for (int i = 0; i < 4; ++i) result.value[i] += bias_four.value[i];
    if (GATED) {
      Four up = add_parts(address + 4 * ups, rank_bytes, num_splits);
      for (int i = 0; i < 4; ++i) up.value[i] += up_bias.value[i];
      result = activate_four(result, up, activation);
    }
    store(y, static_cast<u64>(m) * num_outputs + n, result, count, is_float32, is_aligned);
  }
#endif
}
