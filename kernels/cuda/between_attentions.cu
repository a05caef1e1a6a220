// From the outputs of one layer's attention to what the next layer's attention reads, of up to 8 rows, in one kernel, on sm_90a:
//
//     s = attended @ output^T + residual            t = norm(s)
//     h = activation(t @ gate^T) * (t @ up^T)       of each expert that a row has chosen, with EXPERTS
//     r = h @ down^T + s                            the chosen experts' weighted sum
//     qkv = norm(r) @ next^T
//
// All of it is reading weights. The CTAs, one an SM, share the groups of 8 rows of each weight evenly. A warp of each copies
// (layer_chunks.cuh): it goes through all products in their order without a stop, as far ahead as the ring in shared memory has
// room, from before the kernel in front has ended, and across the places where CTAs wait for each other's results. Only which
// experts are read it must be told. So the memory stays busy while results travel. The other warps are teams of two. Each
// multiplies its share of a tile's columns, or of the experts of `down`, by all rows of x on tensor cores; a tile's sums are added
// in the order of the warps. x, normed where that is asked for, lies in shared memory as a whole. Roundings are those of the
// separate kernels. That all sizes are known when it is compiled leaves a warp the fewest instructions between two such places.
//
// CTAs meet at a counter in memory that only grows: all of them must be on the GPU at once, so the grid is no larger than that, and
// kernels in front may not wait for this one. Two such kernels side by side on one GPU, of two processes under MPS, could hold half
// of it each and wait for the rest until the limit ends them.
//
// Set by the compiler's command line: HIDDEN, ATTENDED, INTERMEDIATE, OUT_SIZE (sizes), EXPERTS (0: the layer is dense; 32 to 256),
// CHOICES, CTAS (of the grid), FLOAT16.

#include "layer_chunks.cuh"
#include "route.cuh"

constexpr int ROWS = 8;  // of x
constexpr int EIGHTS = HIDDEN / 8, COLUMNS = (EIGHTS + CONSUMERS - 1) / CONSUMERS;  // of a row, and of it that a thread has
constexpr int SQUARES = HIDDEN / 256;                                               // sums of squares of a row
constexpr int BATCH = 4;                                                            // eights that a thread asks for at once
constexpr int MAX_PAIRS = 64;                                                       // rows times chosen experts
constexpr int PAD = 16;                      // bytes behind a row of x: eight rows of a column meet all banks
constexpr int PART_BYTES = WARPS * 32 * 16;  // sums of a tile
constexpr long long LIMIT_CYCLES = 40000000000;  // of a wait for other CTAs: some 20 s

struct Layer {
  const u16 *attended, *residual, *norm, *router;  // [rows, ATTENDED], [rows, HIDDEN], [HIDDEN], [EXPERTS, HIDDEN]
  const u16 *next_norm, *next;                     // of the next layer; null where there is none
  u16 *sum, *gated, *out, *new_residual;           // s [rows, HIDDEN], h [rows * CHOICES, INTERMEDIATE], qkv and r, or where there
                                                   // is no next layer h @ down^T and nothing
  float* logits;                                   // [rows, EXPERTS]
  u64* counter;
  long long rows, renormalize, activation, ring_bytes, x_bytes;
  long long max_in_flight;  // chunks that have been asked for and are not there: more only make all others wait
  long long prefetches;     // numbers of the next layer's weight, of each CTA
  float eps, next_eps;
};

// Experts of a product, each with the row of x that a token has there, or -1, and its weight. They lie in shared memory.
struct Table {
  int size;
  const int* experts;
  const signed char (*places)[ROWS];
  const float (*weights)[ROWS];
};

// --- memory

__device__ __forceinline__ Eight load_eight_from_l2(const u16* source) {
  Eight eight;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(eight.pairs[0]), "=r"(eight.pairs[1]), "=r"(eight.pairs[2]), "=r"(eight.pairs[3])
               : "l"(source)
               : "memory");
  return eight;
}

__device__ __forceinline__ u16 load_number_from_l2(const u16* source) {
  u16 bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(source) : "memory");
  return bits;
}

__device__ __forceinline__ float load_float_from_l2(const float* source) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(source) : "memory");
  return value;
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

// --- the warps that multiply

__device__ __forceinline__ float rounded(float value) { return widen_input(round_input(value)); }

struct Multiplier {
  const Layer& layer;
  float (*squares)[SQUARES];  // of ROWS rows
  u32 ring, ring_bytes, full, empty, x, parts;
  u32 own_row;  // of a pair of pieces: where this lane's 16 bytes lie, of those of 16 columns that load_matrices takes
  u64 meeting;  // the counter when all have come to the next one; of thread 0
  int num_rows, warp, lane;
  u32 tail = 0;
  int count = 0, buffer = 0;

  // Until all CTAs have come here; what they have stored can be read by load_..._from_l2 then.
  __device__ __forceinline__ void meet() {
    synchronize_consumers();
    if (threadIdx.x == 0) {
      count_arrival(layer.counter);
      const long long begin = clock64();
      while (load_counter(layer.counter) < meeting) {
        if (clock64() - begin > LIMIT_CYCLES) __trap();  // the launch fails, where it would have hung
      }
      meeting += CTAS;
    }
    synchronize_consumers();
  }

  // Rows of SIZE numbers to shared memory; NORMED: and the sums of squares of each 256 columns.
  template <int SIZE, bool NORMED>
  __device__ __forceinline__ void load_x(const u16* source, int rows) {
    constexpr int SIZE_EIGHTS = SIZE / 8, PITCH = 2 * SIZE + PAD;
    const int all = rows * SIZE_EIGHTS;
#pragma unroll 1
    for (int first = threadIdx.x; first < all; first += BATCH * CONSUMERS) {
      Eight values[BATCH];
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        const int i = first + n * CONSUMERS;
        if (i < all) values[n] = load_eight_from_l2(source + static_cast<long long>(8) * i);
      }
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        const int i = first + n * CONSUMERS, row = i / SIZE_EIGHTS, eight = i % SIZE_EIGHTS;
        if (i >= all) break;
        keep_eight(x + row * PITCH + 16 * eight, values[n]);
        if constexpr (NORMED) {
          float square = 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const u32 pair = values[n].pairs[j];
            square += low(pair) * low(pair) + high(pair) * high(pair);
          }
          square = add_lanes(square);
          if (lane == 0) squares[row][eight / 32] = square;
        }
      }
    }
    synchronize_consumers();
  }

  __device__ __forceinline__ bool has_column(int j) const { return (j + 1) * CONSUMERS <= EIGHTS || own_eight(j) < EIGHTS; }
  __device__ __forceinline__ static int own_eight(int j) { return threadIdx.x + j * CONSUMERS; }

  // The norms of whole rows.
  __device__ __forceinline__ void load_normed(const u16* source, const u16* gain, float eps) {
    Eight gains[COLUMNS];  // on their way while the rows are
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (has_column(j)) gains[j] = load_constant(gain + 8 * own_eight(j));
    }
    load_x<HIDDEN, true>(source, num_rows);
#pragma unroll 1
    for (int row = 0; row < num_rows; ++row) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < SQUARES; ++i) total += squares[row][i];
      const float scale = rsqrtf(total / HIDDEN + eps);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (!has_column(j)) break;
        const u32 place = x + row * (2 * HIDDEN + PAD) + 16 * own_eight(j);
        Eight values = load_eight(place);
        norm(values, gains[j], scale);
        keep_eight(place, values);
      }
    }
    synchronize_consumers();
  }

#if EXPERTS
  // The router's row of an expert; nothing where there is no such expert.
  __device__ __forceinline__ void load_router(Eight (&weights)[COLUMNS], int expert) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (expert < EXPERTS && has_column(j)) weights[j] = load_constant(layer.router + expert * HIDDEN + 8 * own_eight(j));
    }
  }

  // An expert's logits, of all rows that load_normed has left. dots: [ROWS][WARPS].
  __device__ __forceinline__ void route(const Eight (&weights)[COLUMNS], int expert, float (*dots)[WARPS]) {
#pragma unroll 1
    for (int row = 0; row < num_rows; ++row) {
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        if (!has_column(j)) break;
        const Eight values = load_eight(x + row * (2 * HIDDEN + PAD) + 16 * own_eight(j));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          dot += low(weights[j].pairs[n]) * low(values.pairs[n]);
          dot += high(weights[j].pairs[n]) * high(values.pairs[n]);
        }
      }
      dot = add_lanes(dot);
      if (lane == 0) dots[row][warp] = dot;
    }
    synchronize_consumers();
    if (static_cast<int>(threadIdx.x) < num_rows) {
      float logit = 0.0f;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) logit += dots[threadIdx.x][i];
      layer.logits[threadIdx.x * EXPERTS + expert] = rounded(logit);
    }
  }
#endif

  // Where the next chunk lies, as the copier found it.
  __device__ __forceinline__ u32 advance(u32 bytes) {
    const u32 place = tail + bytes <= ring_bytes ? tail : 0;
    tail = place + bytes;
    return place;
  }

  // sums += the chunk number `number` of CHUNK steps, which lies at `place`, times its columns of x from `numbers` on.
  template <int CHUNK>
  __device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], int number, u32 place, u32 second, u32 numbers) {
    const u32 slot = number % SLOTS, mate = warp % MATES;
    const u32 own = ring + place + own_row + second + mate * PIECE_BYTES, own_numbers = numbers + mate * 2 * STEP;
    wait(full + 8 * slot, number / SLOTS % 2);
#pragma unroll
    for (int step = 0; step < CHUNK; step += MATES) {
      if (CHUNK % MATES != 0 && step + MATES > CHUNK && static_cast<int>(mate) + step >= CHUNK) break;
      u32 a[4][4], b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices(b[n], own_numbers + step * 2 * STEP + 64 * n);
#pragma unroll
      for (int n = 0; n < 4; ++n) load_matrices(a[n], (own ^ 32 * n) + step * PIECE_BYTES);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        multiply(sums[n % 2], a[n][0], a[n][1], a[n][2], a[n][3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(empty + 8 * slot);
  }

  // All tiles of a product. addend: of what is stored, [rows, HIDDEN], or null.
  template <int WHICH>
  __device__ __forceinline__ void multiply_product(const Table& table, const u16* addend) {
    using P = Product<WHICH>;
    constexpr u32 PITCH = 2 * P::INPUTS + PAD;
    const int team = warp / MATES, own_token = lane % 8;  // whose numbers this lane loads for the others
    const u32 own_x = x + lane / 8 * 16;
    // Of the sums of a tile, as mma leaves them, thread i of the first 128 adds up those of this row and this token.
    const int out_row = threadIdx.x / 16 + (P::GATED ? 0 : threadIdx.x / 2 % 2 * GROUP);
    const int out_token = threadIdx.x / 4 % 4 * 2 + threadIdx.x % 2;
    const bool is_token = threadIdx.x < 128 && out_token < num_rows;

    for_tiles<WHICH>(table.size, [&](const Tile& tile) {
      const bool is_out = is_token && out_row < tile.groups * GROUP;
      const int place_out = out_token * HIDDEN + tile.row + out_row;  // where OUTPUTS are HIDDEN
      u16 added = 0;
      if ((WHICH == OUTPUT || WHICH == DOWN) && addend != nullptr && is_out) added = load_number_from_l2(addend + place_out);
      const u32 bytes = (P::GATED ? 2 : tile.groups) * P::GROUP_BYTES;
      const u32 second = (P::GATED || tile.groups > 1) && lane / 8 % 2 != 0 ? P::GROUP_BYTES : 0;
      float totals[4] = {};
      if constexpr (P::BY_EXPERT) {
#pragma unroll 1
        for (int first = 0; first < table.size; first += TEAMS) {
          u32 places[P::CHUNKS];
#pragma unroll
          for (int t = 0; t < TEAMS; ++t) {
            if (first + t >= table.size) break;
#pragma unroll
            for (int c = 0; c < P::CHUNKS; ++c) {
              const u32 place = advance(bytes);
              if (t == team) places[c] = place;
            }
          }
          const int i = first + team;
          if (i < table.size) {
            const u32 numbers = own_x + max(static_cast<int>(table.places[i][own_token]), 0) * PITCH;
            const float weights[2] = {table.weights[i][lane % 4 * 2], table.weights[i][lane % 4 * 2 + 1]};
            float sums[2][4] = {};
#pragma unroll
            for (int c = 0; c < P::CHUNKS; ++c) {
              multiply_chunk<P::CHUNK>(sums, count + team * P::CHUNKS + c, places[c], second, numbers + c * P::CHUNK * 2 * STEP);
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {  // a token that does not have this expert has multiplied another's numbers
              if (weights[n % 2] != 0.0f) totals[n] += weights[n % 2] * (sums[0][n] + sums[1][n]);
            }
          }
          count += min(table.size - first, TEAMS) * P::CHUNKS;
        }
      } else {
        const u32 numbers = own_x + min(own_token, num_rows - 1) * PITCH + team * P::CHUNK * 2 * STEP;
        float sums[2][4] = {};
#pragma unroll
        for (int round = 0; round < P::CHUNKS / TEAMS; ++round) {
          u32 place = 0;
#pragma unroll
          for (int t = 0; t < TEAMS; ++t) {
            const u32 next = advance(bytes);
            if (t == team) place = next;
          }
          multiply_chunk<P::CHUNK>(sums, count + team, place, second, numbers + round * TEAMS * P::CHUNK * 2 * STEP);
          count += TEAMS;
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) totals[n] = sums[0][n] + sums[1][n];
      }

      const u32 own_parts = parts + buffer * PART_BYTES;
      buffer ^= 1;  // who is still reading the tile before is not disturbed
      Four four;
#pragma unroll
      for (int n = 0; n < 4; ++n) four.value[n] = totals[n];
      keep(own_parts + threadIdx.x * 16, four);
      synchronize_consumers();
      if (threadIdx.x >= 128) return;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) sum += load_one(own_parts + i * 512 + threadIdx.x * 4);
      const float up = __shfl_xor_sync(ALL_LANES, sum, 2);
      if (!is_out || (P::GATED && threadIdx.x % 4 >= 2)) return;
      if constexpr (WHICH == OUTPUT) layer.sum[place_out] = round_input(rounded(sum) + widen_input(added));
      if constexpr (WHICH == NEXT) layer.out[out_token * OUT_SIZE + tile.row + out_row] = round_input(sum);
      if constexpr (WHICH == DOWN) {
        if (addend == nullptr) {
          layer.out[place_out] = round_input(sum);
        } else {
          layer.new_residual[place_out] = round_input(rounded(sum) + widen_input(added));
        }
      }
      if constexpr (WHICH == GATE_UP) {
        const int place = table.places[tile.first_expert][out_token];
        const float value = activate(rounded(sum), rounded(up), static_cast<int>(layer.activation));
        if (place >= 0) layer.gated[place * INTERMEDIATE + tile.row + out_row] = round_input(value);
      }
    });
  }
};

// --- the kernel

#if EXPERTS
// From the logits of all rows the table of the experts that they choose, of several rows in the order of their numbers. By all
// consumers, who see it when they have met with the producer.
__device__ __forceinline__ void choose_experts(const Layer& layer, const Multiplier& multiplier, float* logits, int* experts,
                                               signed char (*places)[ROWS], float (*weights)[ROWS], int& num_active) {
  __shared__ int chosen[MAX_PAIRS], place_of[EXPERTS];
  __shared__ float chosen_weights[MAX_PAIRS];
  const int num_pairs = multiplier.num_rows * CHOICES;
  for (int i = threadIdx.x; i < multiplier.num_rows * EXPERTS; i += CONSUMERS) logits[i] = load_float_from_l2(layer.logits + i);
  for (int i = threadIdx.x; i < EXPERTS; i += CONSUMERS) place_of[i] = 0;
  synchronize_consumers();
  const bool is_single = multiplier.num_rows == 1;  // whose experts may stay in the order of their choice
  if (multiplier.warp < multiplier.num_rows) {
    const int first = multiplier.warp * CHOICES;
    choose(logits + multiplier.warp * EXPERTS, chosen_weights + first, is_single ? experts : chosen + first, CHOICES,
           layer.renormalize != 0, multiplier.lane);
  }
  if (is_single) {
    if (multiplier.warp == 0 && multiplier.lane < CHOICES) {
      places[multiplier.lane][0] = static_cast<signed char>(multiplier.lane);
      weights[multiplier.lane][0] = chosen_weights[multiplier.lane];
      if (multiplier.lane == 0) num_active = CHOICES;
    }
    return;
  }
  synchronize_consumers();
  if (threadIdx.x < num_pairs) place_of[chosen[threadIdx.x]] = 1;
  synchronize_consumers();
  if (multiplier.warp == 0) {
    int count = 0;
    for (int first = 0; first < EXPERTS; first += 32) {
      const bool is_active = place_of[first + multiplier.lane] != 0;
      const u32 active = __ballot_sync(ALL_LANES, is_active);
      const int place = count + __popc(active & ((1u << multiplier.lane) - 1));
      if (is_active) experts[place] = first + multiplier.lane, place_of[first + multiplier.lane] = place;
      count += __popc(active);
    }
    if (multiplier.lane == 0) num_active = count;
  }
  synchronize_consumers();
  if (threadIdx.x < num_pairs) {
    const int place = place_of[chosen[threadIdx.x]], token = threadIdx.x / CHOICES;
    places[place][token] = static_cast<signed char>(threadIdx.x);
    weights[place][token] = chosen_weights[threadIdx.x];
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    between_attentions(const __grid_constant__ TensorMap output_map, const __grid_constant__ TensorMap gate_up_map,
                       const __grid_constant__ TensorMap down_map, const __grid_constant__ TensorMap next_map,
                       const __grid_constant__ Layer layer) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ u64 barriers[2 * SLOTS];
  __shared__ int experts[1 + MAX_PAIRS];  // the first of each is the one of what is no expert's
  __shared__ signed char places[1 + MAX_PAIRS][ROWS];
  __shared__ float weights[1 + MAX_PAIRS][ROWS];
  __shared__ float squares[ROWS][SQUARES];
#if EXPERTS
  __shared__ float dots[ROWS][WARPS];
  __shared__ int num_active;
#endif
  const int num_rows = static_cast<int>(layer.rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 ring = (shared_address(dynamic_memory) + PIECE_BYTES - 1) & ~(PIECE_BYTES - 1u);
  const u32 ring_bytes = static_cast<u32>(layer.ring_bytes), x = ring + ring_bytes, parts = x + static_cast<u32>(layer.x_bytes);
  const u32 full = shared_address(barriers), empty = full + 8 * SLOTS;
  const Table whole = {1, experts, places, weights};

  if (threadIdx.x == CONSUMERS) {
    prefetch_map(output_map);
    for (int slot = 0; slot < SLOTS; ++slot) {
      init_barrier(full + 8 * slot, 1);
      init_barrier(empty + 8 * slot, MATES);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < (1 + MAX_PAIRS) * ROWS; i += THREADS) {
    const bool is_whole = i < ROWS;
    places[i / ROWS][i % ROWS] = static_cast<signed char>(is_whole && i < num_rows ? i : -1);
    weights[i / ROWS][i % ROWS] = is_whole ? 1.0f : 0.0f;
  }
  if (threadIdx.x == 0) experts[0] = 0;
  __syncthreads();
  let_next_start();

  if (warp == WARPS) {
    Copier copier{ring, ring_bytes, full, empty, read_once_policy(), lane, static_cast<int>(layer.max_in_flight)};
    copier.copy_product<OUTPUT>(output_map, whole.experts, whole.size);
    Table table = whole;
    if (lane == 0) {
      prefetch_map(gate_up_map);
      prefetch_map(down_map);
      prefetch_map(next_map);
    }
#if EXPERTS
    if (layer.next != nullptr) {  // while nobody knows yet which experts are read
      const Range own = own_range(OUT_SIZE / GROUP);
      const u16* first = layer.next + own.first * GROUP * HIDDEN;
      const int size = static_cast<int>(min(static_cast<long long>(own.last - own.first) * GROUP * HIDDEN, layer.prefetches));
      for (int number = lane * 4096; number < size; number += 32 * 4096) {
        prefetch_bulk(first + number, 2 * static_cast<u32>(min(size - number, 4096)));
      }
    }
    synchronize_with_producer();
    table = {num_active, experts + 1, places + 1, weights + 1};
#endif
    copier.copy_product<GATE_UP>(gate_up_map, table.experts, table.size);
    copier.copy_product<DOWN>(down_map, table.experts, table.size);
    if (layer.next != nullptr) copier.copy_product<NEXT>(next_map, whole.experts, whole.size);
    return;
  }

  wait_for_previous();
  const u32 own_row = lane % 8 * 128 + (lane / 16 ^ lane % 8) * 16;
  Multiplier multiplier{layer, squares, ring, ring_bytes, full, empty, x, parts, own_row, 0, num_rows, warp, lane};
  if (threadIdx.x == 0) multiplier.meeting = (load_counter(layer.counter) / CTAS + 1) * CTAS;
  multiplier.load_x<ATTENDED, false>(layer.attended, num_rows);
  multiplier.multiply_product<OUTPUT>(whole, layer.residual);
#if EXPERTS
  Eight own_router[COLUMNS];  // on its way while the CTAs meet
  multiplier.load_router(own_router, blockIdx.x);
#endif
  multiplier.meet();
  multiplier.load_normed(layer.sum, layer.norm, layer.eps);
  Table table = whole;
#if EXPERTS
#pragma unroll 1
  for (int expert = blockIdx.x; expert < EXPERTS; expert += CTAS) {
    if (expert >= CTAS) {
      synchronize_consumers();  // the logits before have been added up
      multiplier.load_router(own_router, expert);
    }
    multiplier.route(own_router, expert, dots);
  }
  multiplier.meet();
  float* logits = reinterpret_cast<float*>(dynamic_memory + (parts - shared_address(dynamic_memory)));
  choose_experts(layer, multiplier, logits, experts + 1, places + 1, weights + 1, num_active);
  synchronize_with_producer();
  table = {num_active, experts + 1, places + 1, weights + 1};
#endif
  multiplier.multiply_product<GATE_UP>(table, nullptr);
  multiplier.meet();
  multiplier.load_x<INTERMEDIATE, false>(layer.gated, num_rows * CHOICES);
  const bool is_last = layer.next == nullptr;
  multiplier.multiply_product<DOWN>(table, is_last ? nullptr : layer.sum);
  if (is_last) return;
  multiplier.meet();
  multiplier.load_normed(layer.new_residual, layer.next_norm, layer.next_eps);
  multiplier.multiply_product<NEXT>(whole, nullptr);
}
