// From the outputs of one layer's attention to what the next layer's attention reads, of up to 8 rows, in one kernel, on sm_90a:
//
//     s = attended @ output^T + residual            t = norm(s)
//     h = activation(t @ gate^T) * (t @ up^T)       of each expert that a row has chosen, with EXPERTS
//     r = h @ down^T + s                            the chosen experts' weighted sum
//     qkv = norm(r) @ next^T
//
// All of it is reading weights. The CTAs, one an SM, share the rows of each weight evenly. A warp of each copies: it goes through
// all products in their order without a stop, as far ahead as the ring in shared memory has room, from before the kernel in front
// has ended, and across the places where CTAs wait for each other's results. Only which experts are read it must be told. So the
// memory stays busy while results travel. The other warps share the columns of each chunk that arrives (16 rows of a weight, in a
// gated product 8 of the gate and 8 of up), multiply them by all rows of x on tensor cores, and add their sums in the order of the
// warps. x of a product, normed where that is asked for, lies in shared memory as a whole, or block by block of its columns.
// Roundings are those of the separate kernels.
//
// CTAs meet at a counter in memory that only grows: all of them must be on the GPU at once, so the grid is no larger than that, and
// kernels in front may not wait for this one.
//
// Set by the compiler's command line: EXPERTS (0: the layer is dense; 32 to 256), FLOAT16.

#include "route.cuh"

constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 32;
constexpr int ROWS = 8, TILE = 16, HALF = 8;  // rows of x; rows of a weight in a chunk, and as many of gate and of up
constexpr int HALF_ROWS = ROWS / 2;           // that a thread norms at a time
constexpr int SLOTS = 32;                     // chunks that are on their way or being read
constexpr int COLUMNS = 4, MAX_HIDDEN = 8 * COLUMNS * CONSUMERS;  // eights of a row that a thread norms
constexpr int MAX_PAIRS = 64;                 // rows times chosen experts
constexpr int PAD = 64;                       // bytes behind a row of a chunk or of x: eight lanes of a load meet all banks
constexpr int PART_BYTES = WARPS * 32 * 16;   // sums of a tile
constexpr int MAX_REGISTERS = 144;            // leaves room for CTAs of the attention behind, where memory is left to it
constexpr long long LIMIT_CYCLES = 40000000000;  // of a wait for other CTAs: some 20 s

struct Layer {
  const u16 *attended, *residual;                              // [rows, attended_size], [rows, hidden]
  const u16 *output, *norm, *router, *gate_up, *down;          // weights; of experts behind one another
  const u16 *next_norm, *next;                                 // of the next layer; null where there is none
  u16 *sum, *gated, *out, *new_residual;                       // s [rows, hidden], h [rows * choices, intermediate], qkv and r, or
                                                               // where there is no next layer h @ down^T and nothing
  float* logits;                                               // [rows, experts]
  u64* counter;
  long long rows, hidden, attended_size, intermediate, out_size, choices, renormalize, activation;
  long long ring_bytes, x_bytes, max_steps, prefetches;        // max_steps: of 256 columns of a chunk
  float eps, next_eps;
};

// Experts of a product, each with the row of x that a token has there, or -1, and its weight. They lie in shared memory.
struct Table {
  int size;
  const int* experts;
  const signed char (*places)[ROWS];
  const float (*weights)[ROWS];
};

// `outputs` sums of `inputs` numbers, of each expert of a table. x comes in blocks of columns, weights in chunks of columns.
struct Product {
  const u16* weight;
  int inputs, outputs, block, chunk;
};

// --- memory

__device__ __forceinline__ void copy_bulk(u32 target, const u16* source, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void prefetch_bulk(const u16* source, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ Eight load_eight_from_l2(const u16* source) {
  Eight eight;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "l"(source)
               : "memory");
  return eight;
}

__device__ __forceinline__ float load_number_from_l2(const u16* source) {
  u16 bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(source) : "memory");
  return widen_input(bits);
}

__device__ __forceinline__ float load_float_from_l2(const float* source) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ void keep_eight(u32 address, const Eight& eight) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(eight.pairs[0]), "r"(eight.pairs[1]),
               "r"(eight.pairs[2]), "r"(eight.pairs[3])
               : "memory");
}

__device__ __forceinline__ Eight load_eight(u32 address) {
  Eight eight;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "r"(address)
               : "memory");
  return eight;
}

__device__ __forceinline__ void synchronize_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

__device__ __forceinline__ void synchronize_with_producer() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ u64 load_counter(const u64* counter) {
  u64 value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void count_arrival(u64* counter) {
  asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}

// --- who has what

struct Range {
  int first, last;
};

__device__ __forceinline__ Range own_range(int size) {
  const u32 cta = blockIdx.x, ctas = gridDim.x;
  return {static_cast<int>(static_cast<u64>(size) * cta / ctas), static_cast<int>(static_cast<u64>(size) * (cta + 1) / ctas)};
}

// `rows_of_x` rows of x are there at once. A chunk has 256 times the most steps, up to max_steps, that inputs consist of.
__device__ __forceinline__ Product product_of(const Layer& layer, const u16* weight, int inputs, int outputs, int rows_of_x) {
  const int room = (static_cast<int>(layer.x_bytes) / rows_of_x - PAD) / 512;  // for steps of x
  int steps = min(static_cast<int>(layer.max_steps), room);
  while (inputs % (256 * steps) != 0) --steps;
  return {weight, inputs, outputs, min(inputs, room / steps * steps * 256), 256 * steps};
}

// Both roles go through a product's chunks in this order. `role` is told of blocks of x, of tiles, of experts and of chunks: where
// its first row begins, the column of x's block, how many rows it has, and that those from `half` on begin `second` rows further.
template <typename Role>
__device__ __forceinline__ void go_through_sums(const Product& product, const Table& table, Role& role) {
  const Range own = own_range(product.outputs);
  const int num_experts = table.size;
  for (int start = 0; start < product.inputs; start += product.block) {
    const int stop = min(start + product.block, product.inputs);
    role.begin_block(start, stop);
    for (int row = own.first, tile = 0; row < own.last; row += TILE, ++tile) {
      const int rows = min(own.last - row, TILE);
      role.begin_tile(row, rows, tile, start == 0);
      for (int i = 0; i < num_experts; ++i) {
        const long long expert = table.experts[i];
        const u16* weight = product.weight + (expert * product.outputs + row) * product.inputs;
        role.begin_expert(i);
        for (int column = start; column < stop; column += product.chunk) {
          role.chunk(product, weight + column, column - start, rows, HALF, HALF);
        }
        role.end_expert(i);
      }
      role.end_tile(row, rows, tile, stop == product.inputs);
    }
  }
}

// The same of a gated product, whose outputs of all experts are shared out as one: up to HALF rows of the gate and as many of up at
// a time.
template <typename Role>
__device__ __forceinline__ void go_through_gated(const Product& product, const Table& table, Role& role) {
  const Range own = own_range(table.size * product.outputs);
  role.begin_block(0, product.inputs);
  for (int place = own.first, rows; place < own.last; place += rows) {
    const int i = place / product.outputs, row = place % product.outputs;
    rows = min(min(own.last - place, HALF), product.outputs - row);
    const long long expert = table.experts[i];
    const u16* weight = product.weight + (expert * 2 * product.outputs + row) * product.inputs;
    role.begin_tile(row, rows, i, true);
    role.begin_expert(i);
    for (int column = 0; column < product.inputs; column += product.chunk) {
      role.chunk(product, weight + column, column, 2 * rows, rows, product.outputs);
    }
    role.end_expert(i);
    role.end_tile(row, rows, i, true);
  }
}

// --- the warp that copies

struct Copier {
  u32 ring, ring_bytes, full, empty;
  u64 policy;
  int lane;
  u32 tail = 0, start = 0;  // where the next chunk goes if there is room; where the chunk of this lane's slot begins
  int count = 0, oldest = 0;

  __device__ __forceinline__ void begin_block(int, int) {}
  __device__ __forceinline__ void begin_tile(int, int, int, bool) {}
  __device__ __forceinline__ void begin_expert(int) {}
  __device__ __forceinline__ void end_expert(int) {}
  __device__ __forceinline__ void end_tile(int, int, int, bool) {}

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

  __device__ __forceinline__ void chunk(const Product& product, const u16* weight, int, int rows, int half, int second) {
    const u32 row_bytes = 2 * product.chunk, bytes = rows * (row_bytes + PAD);
    const u32 place = find_room(bytes), slot = count % SLOTS, barrier = full + 8 * slot;
    if (lane == 0) arrive_and_expect(barrier, rows * row_bytes);
    __syncwarp();
    if (lane < rows) {
      const long long row = lane < half ? lane : lane - half + second;
      copy_bulk(ring + place + lane * (row_bytes + PAD), weight + row * product.inputs, row_bytes, barrier, policy);
    }
    if (lane == static_cast<int>(slot)) start = place;
    tail = place + bytes;
    ++count;
  }
};

// --- the warps that multiply

// What they know from product to product.
struct Consumers {
  u32 ring, ring_bytes, full, empty, x, parts, saved;
  u64* counter;
  u64 meeting;  // the counter when all have come to the next one; of thread 0
  int num_rows, warp, lane;
  u32 tail = 0, x_pitch = 0;
  int count = 0, buffer = 0;

  // Until all CTAs have come here; what they have stored can be read by load_..._from_l2 then.
  __device__ __forceinline__ void meet() {
    synchronize_consumers();
    if (threadIdx.x == 0) {
      count_arrival(counter);
      const long long begin = clock64();
      while (load_counter(counter) < meeting) {
        if (clock64() - begin > LIMIT_CYCLES) __trap();  // the launch fails, where it would have hung
      }
      meeting += gridDim.x;
    }
    synchronize_consumers();
  }

  // Columns [start, stop) to shared memory.
  __device__ __forceinline__ void load_x(const u16* source, int rows, int stride, int start, int stop) {
    if (start > 0) synchronize_consumers();  // the columns before have been multiplied
    const int eights = (stop - start) / 8;
    x_pitch = 16 * eights + PAD;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * eights; i += CONSUMERS) {
      const int row = i / eights, eight = i % eights;
      const u16* place = source + static_cast<long long>(row) * stride + start + 8 * eight;
      keep_eight(x + row * x_pitch + 16 * eight, load_eight_from_l2(place));
    }
    synchronize_consumers();
  }

  // The norms of whole rows. squares: [ROWS][MAX_HIDDEN / 256].
  __device__ __forceinline__ void load_normed(const u16* source, const u16* gain, int hidden, float eps,
                                              float (*squares)[MAX_HIDDEN / 256]) {
    x_pitch = 2 * hidden + PAD;
    Eight gains[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int eight = threadIdx.x + j * CONSUMERS;
      if (8 * eight >= hidden) break;
      gains[j] = load_constant(gain + 8 * eight);
#pragma unroll 1
      for (int first = 0; first < num_rows; first += HALF_ROWS) {
        Eight values[HALF_ROWS];
#pragma unroll
        for (int i = 0; i < HALF_ROWS; ++i) {
          if (first + i < num_rows) values[i] = load_eight_from_l2(source + (first + i) * hidden + 8 * eight);
        }
#pragma unroll
        for (int i = 0; i < HALF_ROWS; ++i) {
          const int row = first + i;
          if (row >= num_rows) break;
          float square = 0.0f;
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const u32 pair = values[i].pairs[n];
            square += low(pair) * low(pair) + high(pair) * high(pair);
          }
          keep_eight(x + row * x_pitch + 16 * eight, values[i]);
          square = add_lanes(square);
          if (lane == 0) squares[row][eight / 32] = square;
        }
      }
    }
    synchronize_consumers();
    for (int row = 0; row < num_rows; ++row) {
      float total = 0.0f;
      for (int i = 0; i < hidden / 256; ++i) total += squares[row][i];
      const float scale = rsqrtf(total / hidden + eps);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int eight = threadIdx.x + j * CONSUMERS;
        if (8 * eight >= hidden) break;
        Eight values = load_eight(x + row * x_pitch + 16 * eight);
        norm(values, gains[j], scale);
        keep_eight(x + row * x_pitch + 16 * eight, values);
      }
    }
    synchronize_consumers();
  }
};

// A product's sums, of the role that multiplies. load(start, stop) brings columns of x; fetch(row of the weight, token) says what
// is to be added; store(row, token, i, sum, other) has the sum and what was fetched, or, where it is GATED, the sum of up, and the
// expert's place i in the table.
template <bool GATED, typename Load, typename Fetch, typename Store>
struct Multiplier {
  Consumers& consumers;
  const Table& table;
  Load load;
  Fetch fetch;
  Store store;
  u32 x_row = 0;
  bool has_x = false;
  float sums[2][4], totals[4], added = 0.0f;

  // Of the sums of a tile, as mma leaves them, thread i of the first 128 adds up those of this row and this token.
  __device__ __forceinline__ static int row_of_thread() { return threadIdx.x / 16 + (GATED ? 0 : threadIdx.x / 2 % 2 * HALF); }
  __device__ __forceinline__ static int token_of_thread() { return threadIdx.x / 4 % 4 * 2 + threadIdx.x % 2; }

  __device__ __forceinline__ void begin_block(int start, int stop) { load(start, stop); }

  __device__ __forceinline__ void begin_tile(int row, int rows, int tile, bool is_first) {
    const u32 place = consumers.saved + tile * PART_BYTES + threadIdx.x * 16;
    const Four before = is_first ? Four{} : ::load(place);
#pragma unroll
    for (int i = 0; i < 4; ++i) totals[i] = before.value[i];
    if (threadIdx.x < 128 && row_of_thread() < rows && token_of_thread() < consumers.num_rows) {
      added = fetch(row + row_of_thread(), token_of_thread());
    }
  }

  __device__ __forceinline__ void begin_expert(int i) {
    const int token = consumers.lane / 4;
    const int place = GATED ? (token < consumers.num_rows ? token : -1) : table.places[i][token];
    has_x = place >= 0;
    x_row = consumers.x + place * consumers.x_pitch;
#pragma unroll
    for (int n = 0; n < 8; ++n) sums[n / 4][n % 4] = 0.0f;
  }

  __device__ __forceinline__ void chunk(const Product& product, const u16*, int column, int rows, int half, int) {
    const u32 pitch = 2 * product.chunk + PAD, bytes = rows * pitch, slot = consumers.count % SLOTS;
    const u32 place = consumers.tail + bytes <= consumers.ring_bytes ? consumers.tail : 0;  // as the copier found it
    const int g = consumers.lane / 4, steps = product.chunk / 256;
    const u32 own = consumers.warp * 64 * steps + consumers.lane % 4 * 16;  // bytes of a row before this lane's
    const u32 first = consumers.ring + place + min(g, rows - 1) * pitch + own;
    const u32 second = consumers.ring + place + min(g + half, rows - 1) * pitch + own;
    const u32 x = x_row + 2 * column + own;
    wait(consumers.full + 8 * slot, consumers.count / SLOTS % 2);
    for (int step = 0; step < steps; ++step) {
      const Eight a = load_eight(first + 64 * step), b = load_eight(second + 64 * step);
      const Eight inputs = has_x ? load_eight(x + 64 * step) : Eight{};
      multiply(sums[0], a.pairs[0], b.pairs[0], a.pairs[1], b.pairs[1], inputs.pairs[0], inputs.pairs[1]);
      multiply(sums[1], a.pairs[2], b.pairs[2], a.pairs[3], b.pairs[3], inputs.pairs[2], inputs.pairs[3]);
    }
    __syncwarp();
    if (consumers.lane == 0) arrive(consumers.empty + 8 * slot);
    consumers.tail = place + bytes;
    ++consumers.count;
  }

  __device__ __forceinline__ void end_expert(int i) {
    const int token = consumers.lane % 4 * 2;
    const float weights[2] = {GATED ? 1.0f : table.weights[i][token], GATED ? 1.0f : table.weights[i][token + 1]};
#pragma unroll
    for (int n = 0; n < 4; ++n) totals[n] += weights[n % 2] * (sums[0][n] + sums[1][n]);
  }

  __device__ __forceinline__ void end_tile(int row, int rows, int tile, bool is_last) {
    Four four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = totals[i];
    if (!is_last) {
      keep(consumers.saved + tile * PART_BYTES + threadIdx.x * 16, four);
      return;
    }
    const u32 parts = consumers.parts + consumers.buffer * PART_BYTES;
    consumers.buffer ^= 1;  // who is still reading the tile before is not disturbed
    keep(parts + threadIdx.x * 16, four);
    synchronize_consumers();
    if (threadIdx.x >= 128) return;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += load_one(parts + warp * 512 + threadIdx.x * 4);
    const float up = __shfl_xor_sync(ALL_LANES, sum, 2);
    const bool stores = !GATED || threadIdx.x % 4 < 2;
    if (stores && row_of_thread() < rows && token_of_thread() < consumers.num_rows) {
      store(row + row_of_thread(), token_of_thread(), tile, sum, GATED ? up : added);
    }
  }
};

template <bool GATED, typename Load, typename Fetch, typename Store>
__device__ __forceinline__ void run(Consumers& consumers, const Product& product, const Table& table, Load load, Fetch fetch,
                                    Store store) {
  Multiplier<GATED, Load, Fetch, Store> multiplier{consumers, table, load, fetch, store};
  if constexpr (GATED) {
    go_through_gated(product, table, multiplier);
  } else {
    go_through_sums(product, table, multiplier);
  }
}

// --- the kernel

__device__ __forceinline__ float rounded(float value) { return widen_input(round_input(value)); }

#if EXPERTS
// From the logits of all rows the table of the experts that they choose, in the order of their numbers. By all consumers.
__device__ __forceinline__ void choose_experts(const Layer& layer, const Consumers& consumers, float* logits, int* experts,
                                               signed char (*places)[ROWS], float (*weights)[ROWS], int& num_active) {
  __shared__ int chosen[MAX_PAIRS], place_of[EXPERTS];
  __shared__ float chosen_weights[MAX_PAIRS];
  const int choices = static_cast<int>(layer.choices), num_pairs = consumers.num_rows * choices;
  for (int i = threadIdx.x; i < consumers.num_rows * EXPERTS; i += CONSUMERS) logits[i] = load_float_from_l2(layer.logits + i);
  for (int i = threadIdx.x; i < EXPERTS; i += CONSUMERS) place_of[i] = 0;
  for (int i = threadIdx.x; i < MAX_PAIRS * ROWS; i += CONSUMERS) {
    places[i / ROWS][i % ROWS] = -1;
    weights[i / ROWS][i % ROWS] = 0.0f;
  }
  synchronize_consumers();
  if (consumers.warp < consumers.num_rows) {
    const int first = consumers.warp * choices;
    const bool renormalize = layer.renormalize != 0;
    choose(logits + consumers.warp * EXPERTS, chosen_weights + first, chosen + first, choices, renormalize, consumers.lane);
  }
  synchronize_consumers();
  if (threadIdx.x < num_pairs) place_of[chosen[threadIdx.x]] = 1;
  synchronize_consumers();
  if (consumers.warp == 0) {
    int count = 0;
    for (int first = 0; first < EXPERTS; first += 32) {
      const bool is_active = place_of[first + consumers.lane] != 0;
      const u32 active = __ballot_sync(ALL_LANES, is_active);
      const int place = count + __popc(active & ((1u << consumers.lane) - 1));
      if (is_active) experts[place] = first + consumers.lane, place_of[first + consumers.lane] = place;
      count += __popc(active);
    }
    if (consumers.lane == 0) num_active = count;
  }
  synchronize_consumers();
  if (threadIdx.x < num_pairs) {
    const int place = place_of[chosen[threadIdx.x]], token = threadIdx.x / choices;
    places[place][token] = static_cast<signed char>(threadIdx.x);
    weights[place][token] = chosen_weights[threadIdx.x];
  }
}
#endif

extern "C" __global__ void __maxnreg__(MAX_REGISTERS) between_attentions(const __grid_constant__ Layer layer) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * SLOTS];
  __shared__ int experts[1 + MAX_PAIRS];  // the first of each is the one of what is no expert's
  __shared__ signed char places[1 + MAX_PAIRS][ROWS];
  __shared__ float weights[1 + MAX_PAIRS][ROWS];
  __shared__ float squares[ROWS][MAX_HIDDEN / 256];
#if EXPERTS
  __shared__ int num_active;
#endif
  const int num_rows = static_cast<int>(layer.rows), hidden = static_cast<int>(layer.hidden);
  const int intermediate = static_cast<int>(layer.intermediate), choices = static_cast<int>(layer.choices);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 ring = (shared_address(dynamic_memory) + 127) & ~127u, ring_bytes = static_cast<u32>(layer.ring_bytes);
  const u32 x = ring + ring_bytes, parts = x + static_cast<u32>(layer.x_bytes), saved = parts + 2 * PART_BYTES;
  const u32 full = shared_address(barriers), empty = full + 8 * SLOTS;

  const Product output = product_of(layer, layer.output, static_cast<int>(layer.attended_size), hidden, num_rows);
  const Product gate_up = product_of(layer, layer.gate_up, hidden, intermediate, num_rows);
  const Product down = product_of(layer, layer.down, intermediate, hidden, num_rows * choices);
  const Product next = product_of(layer, layer.next, hidden, static_cast<int>(layer.out_size), num_rows);
  const Table whole = {1, experts, places, weights};

  if (threadIdx.x == CONSUMERS) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      init_barrier(full + 8 * slot, 1);
      init_barrier(empty + 8 * slot, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x < ROWS) {
    places[0][threadIdx.x] = static_cast<signed char>(static_cast<int>(threadIdx.x) < num_rows ? static_cast<int>(threadIdx.x) : -1);
    weights[0][threadIdx.x] = 1.0f;
    experts[0] = 0;
  }
  __syncthreads();
  let_next_start();

  if (warp == WARPS) {
    Copier copier{ring, ring_bytes, full, empty, read_once_policy(), lane};
    go_through_sums(output, whole, copier);
#if EXPERTS
    const Product router = product_of(layer, layer.router, hidden, EXPERTS, num_rows);
    go_through_sums(router, whole, copier);
    if (layer.next != nullptr) {  // while nobody knows yet which experts are read
      const Range own = own_range(next.outputs);
      const long long first = static_cast<long long>(own.first) * hidden;
      const long long size = min(static_cast<long long>(own.last - own.first) * hidden, layer.prefetches);
      for (long long number = lane * 4096; number < size; number += 32 * 4096) {
        prefetch_bulk(layer.next + first + number, 2 * static_cast<u32>(min(size - number, 4096ll)));
      }
    }
    synchronize_with_producer();
    const Table chosen = {num_active, experts + 1, places + 1, weights + 1};
#else
    const Table& chosen = whole;
#endif
    go_through_gated(gate_up, chosen, copier);
    go_through_sums(down, chosen, copier);
    if (layer.next != nullptr) go_through_sums(next, whole, copier);
    return;
  }

  wait_for_previous();
  Consumers consumers{ring, ring_bytes, full, empty, x, parts, saved, layer.counter, 0, num_rows, warp, lane};
  if (threadIdx.x == 0) consumers.meeting = (load_counter(layer.counter) / gridDim.x + 1) * gridDim.x;
  const auto nothing = [](int, int) { return 0.0f; };
  const auto norm_sum = [&](int, int) { consumers.load_normed(layer.sum, layer.norm, hidden, layer.eps, squares); };

  run<false>(
      consumers, output, whole,
      [&](int start, int stop) { consumers.load_x(layer.attended, num_rows, output.inputs, start, stop); },
      [&](int row, int token) { return load_number_from_l2(layer.residual + token * hidden + row); },
      [&](int row, int token, int, float sum, float residual) {
        layer.sum[token * hidden + row] = round_input(rounded(sum) + residual);
      });
  consumers.meet();
#if EXPERTS
  const Product router = product_of(layer, layer.router, hidden, EXPERTS, num_rows);
  run<false>(consumers, router, whole, norm_sum, nothing,
             [&](int row, int token, int, float sum, float) { layer.logits[token * EXPERTS + row] = rounded(sum); });
  consumers.meet();
  float* logits = reinterpret_cast<float*>(dynamic_memory + (parts - shared_address(dynamic_memory)));
  choose_experts(layer, consumers, logits, experts + 1, places + 1, weights + 1, num_active);
  synchronize_with_producer();
  const Table chosen = {num_active, experts + 1, places + 1, weights + 1};
  const auto load_gate_up = [](int, int) {};  // x is there
#else
  const Table& chosen = whole;
  const auto load_gate_up = norm_sum;
#endif
  run<true>(consumers, gate_up, chosen, load_gate_up, nothing, [&](int row, int token, int i, float gate, float up) {
    const int place = chosen.places[i][token];
    if (place < 0) return;
    const float value = activate(rounded(gate), rounded(up), static_cast<int>(layer.activation));
    layer.gated[place * intermediate + row] = round_input(value);
  });
  consumers.meet();
  const bool is_last = layer.next == nullptr;
  run<false>(
      consumers, down, chosen,
      [&](int start, int stop) { consumers.load_x(layer.gated, num_rows * choices, intermediate, start, stop); },
      [&](int row, int token) { return is_last ? 0.0f : load_number_from_l2(layer.sum + token * hidden + row); },
      [&](int row, int token, int, float sum, float residual) {
        u16* target = is_last ? layer.out : layer.new_residual;
        target[token * hidden + row] = is_last ? round_input(sum) : round_input(rounded(sum) + residual);
      });
  if (is_last) return;
  consumers.meet();
  run<false>(
      consumers, next, whole,
      [&](int, int) { consumers.load_normed(layer.new_residual, layer.next_norm, hidden, layer.next_eps, squares); }, nothing,
      [&](int row, int token, int, float sum, float) { layer.out[token * next.outputs + row] = round_input(sum); });
}
