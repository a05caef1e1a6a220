// y[M, N] = x[M, K] @ weight[N, K]^T + bias for few rows, on sm_90a: the weight flows through shared memory at the rate of DRAM.
//
// The weight is on the M side of wgmma (64 of its rows a warpgroup), the rows of x on the N side, so that tiles are full however
// few rows x has. A CTA owns TILE rows of the weight and, where the CTAs of a cluster share K, a contiguous range of it. One
// thread issues the copies (TMA, 64 numbers of K a stage, rows of 128 swizzled bytes); a warpgroup for each 64 rows multiplies.
// All stages are filled with weight before the kernel waits for the one before it in the stream: only then is x read and y written.
// Partial sums are sent to the CTA of the cluster that owns their outputs, which adds them in the order of the ranks.
// GATED: the first half of the TILE are rows of the gate, the second half those of up, both for the same outputs.
//
// Set by the compiler's command line: ROWS (8, 16, 32, 64, 128: rows of x, filled up), TILE (64, 128, 192, 256), FLOAT16, GATED.

#include "streaming.cuh"

constexpr bool REUSES_STAGES = ROWS >= 64;  // many partial sums: they take the place of the stages
constexpr int UNITS = OUTPUTS / 8;  // outputs are shared out among the CTAs of a cluster by eights
constexpr int MAX_SPLITS = 8;

// For what other CTAs of the cluster have sent.
__device__ __forceinline__ void wait_for_peers(u32 barrier) {
  u32 done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
  } while (!done);
}

// --- clusters

// Relaxed: before it come the initialised mbarriers, which have their own fence, and reads of shared memory that have finished.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ u32 address_in_rank(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Sends to another CTA's shared memory, whose barrier counts the bytes when they are there.
__device__ __forceinline__ void send(u32 remote_address, u32 remote_barrier, const Four& four) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote_address),
      "f"(four.value[0]), "f"(four.value[1]), "f"(four.value[2]), "f"(four.value[3]), "r"(remote_barrier)
      : "memory");
}

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

// Grid: CTAs that share K (one cluster), tiles. The tensor maps have boxes of 64 x OUTPUTS numbers of the weight, 64 x ROWS of x.
// Of the steps of 64 inputs each CTA takes steps_each, the first extra_steps of them one more. Of a tile's UNITS each CTA
// stores units_each, the last ones what is left. A stage is given back one step after its own, so there are 2 at least, unless
// there is but one step. bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
streaming_linear(const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, const u16* bias, void* y,
                 int num_rows, int num_outputs, int steps_each, int extra_steps, int units_each, int num_stages, int activation,
                 int is_float32) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * MAX_STAGES + 1];
  const u32 stages = (shared_address(dynamic_memory) + 1023) & ~1023u;  // whole groups of swizzled rows
  const u32 parts = REUSES_STAGES ? stages : stages + num_stages * STAGE_BYTES;
  const u32 full = shared_address(barriers), empty = full + 8 * MAX_STAGES, received = empty + 8 * MAX_STAGES;

  const int split = blockIdx.x, num_splits = gridDim.x;
  const int first_step = split * steps_each + min(split, extra_steps);
  const int steps = steps_each + (split < extra_steps ? 1 : 0);
  const int prefilled = min(steps, num_stages);
  const int first_output = blockIdx.y * OUTPUTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_producer = threadIdx.x == CONSUMERS;

  // Parts: [rank, row of x, own outputs (GATED: gates, then ups)]. 4 floats after each row keep lanes off each other's banks.
  const int first_unit = split * units_each;
  const int own_outputs = 8 * max(min(units_each, UNITS - first_unit), 0);
  const int ups = 8 * units_each;  // where they begin
  const int pitch = (GATED ? 2 : 1) * ups + 4;
  const u32 rank_bytes = 4 * ROWS * pitch;

  u64 read_once = 0;
  const auto load_weight = [&](int stage, int step) {
    const u32 target = stages + stage * STAGE_BYTES, barrier = full + 8 * stage;
    arrive_and_expect(barrier, STAGE_BYTES);
    load_box(target, weight_map, (first_step + step) * STEP_INPUTS, first_output, barrier, read_once);
    if (GATED) {
      const u32 half = target + OUTPUTS * STEP_BYTES;
      load_box(half, weight_map, (first_step + step) * STEP_INPUTS, num_outputs + first_output, barrier, read_once);
    }
  };

  if (is_producer) {
    prefetch_map(weight_map);
    prefetch_map(x_map);
    for (int stage = 0; stage < num_stages; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, GROUPS * 4);
    }
    init_barrier(received, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    read_once = read_once_policy();
    for (int stage = 0; stage < prefilled; ++stage) load_weight(stage, stage);
    if (num_splits > 1) arrive_and_expect(received, num_splits * own_outputs * (GATED ? 2 : 1) * ((num_rows + 7) / 8 * 8) * 4);
  }
  __syncthreads();
  if (num_splits > 1 && !REUSES_STAGES) arrive_at_cluster();
  let_next_start();
  wait_for_previous();

  if (warp == GROUPS * 4) {
    if (is_producer) {
      const u64 read_often = read_often_policy();
      const auto load_x = [&](int stage, int step) {
        const u32 target = stages + stage * STAGE_BYTES + WEIGHT_BYTES;
        load_box(target, x_map, (first_step + step) * STEP_INPUTS, 0, full + 8 * stage, read_often);
      };
      for (int stage = 0; stage < prefilled; ++stage) load_x(stage, stage);
      int stage = 0, parity = 0;
      for (int step = num_stages; step < steps; ++step) {
        wait(empty + 8 * stage, parity);
        load_weight(stage, step);
        load_x(stage, step);
        if (++stage == num_stages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (num_splits > 1) {
      if (REUSES_STAGES) arrive_at_cluster();
      wait_for_cluster();
    }
    return;
  }

  const u32 group_weight = stages + warp / 4 * 64 * STEP_BYTES;
  float sums[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
  int stage = 0, parity = 0, previous = 0;
  for (int step = 0; step < steps; ++step) {
    wait(full + 8 * stage, parity);
    const u64 weight = matrix_descriptor(group_weight + stage * STAGE_BYTES);
    const u64 x = matrix_descriptor(stages + stage * STAGE_BYTES + WEIGHT_BYTES);
    start_multiplying();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply<ROWS>(sums, weight + 2 * k, x + 2 * k);  // 16 numbers are 32 bytes, 2 units of an address
    commit_products();
    wait_for_products<1>();
    if (step > 0 && lane == 0) arrive(empty + 8 * previous);
    previous = stage;
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
  wait_for_products<0>();
#pragma unroll
  for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i])::"memory");  // no sum is read before the wait
  if (REUSES_STAGES) {  // the stages of every CTA that is written to have been read
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
  const int place = lane % 4 * 2 + lane / 4 % 2;  // among 8 rows of x
  u32 target = parts + split * rank_bytes + 4 * (place * pitch + column - 8 * owner * units_each + (is_up ? ups : 0));
  u32 barrier = received;
  if (num_splits > 1) {
    wait_for_cluster();
    target = address_in_rank(target, owner);
    barrier = address_in_rank(barrier, owner);
  }
#pragma unroll
  for (int i = 0; i < ROWS / 8; ++i) {
    if (8 * i < num_rows) {
      const Four four = gather_four(sums + 4 * i, lane);
      if (num_splits > 1) {
        send(target + 32 * i * pitch, barrier, four);
      } else {
        keep(target + 32 * i * pitch, four);
      }
    }
  }
  if (num_splits == 1) {
    synchronize_consumers();
  } else if (own_outputs > 0) {
    wait_for_peers(received);
  }

  const bool is_aligned = num_outputs % 4 == 0 && (reinterpret_cast<u64>(y) & 15) == 0;
  const u32 row_fours = own_outputs / 4;
  for (u32 four = threadIdx.x; four < num_rows * row_fours; four += CONSUMERS) {
    const u32 m = four / row_fours, own = four % row_fours * 4;
    const int n = first_output + 8 * first_unit + own, count = num_outputs - n;
    if (count <= 0) continue;
    const u32 address = parts + 4 * (m * pitch + own);
    Four result = add_parts(address, rank_bytes, num_splits);
    if (bias != nullptr) {
      for (int i = 0; i < 4; ++i) {
        if (i < count) result.value[i] += widen_input(bias[n + i]);
      }
    }
    if (GATED) {
      Four up = add_parts(address + 4 * ups, rank_bytes, num_splits);
      for (int i = 0; i < 4; ++i) {
        if (bias != nullptr && i < count) up.value[i] += widen_input(bias[num_outputs + n + i]);
        const float gate = widen_input(round_input(result.value[i]));
        result.value[i] = activate(gate, widen_input(round_input(up.value[i])), activation);
      }
    }
    store(y, static_cast<u64>(m) * num_outputs + n, result, count, is_float32, is_aligned);
  }
}
