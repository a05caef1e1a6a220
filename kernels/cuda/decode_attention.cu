// Norm of heads, rotary, store and attention of rows with one new token each over a paged cache, in one kernel, on sm_90a.
//
// A row and one of its kv heads belong to a cluster of CTAs, whose warps share the keys in tiles of 16, by turns. Each warp has a
// ring of stages of its own, filled by cp.async, and goes on by itself: GROUP query heads on the M side of mma, keys and values
// on the N side. What earlier steps stored is settled when the kernel starts (dependent_launch.py), so the stages are filled
// before it waits for the kernel before it, which makes q and the new k and v. These every CTA (k and v: the one that has the
// last tile) norms, rotates and rounds as the three ops of qkv_prepare.py do; the new key joins its tile in shared memory, and
// goes to the cache for later steps. Then the warps of a CTA add their sums, and the CTAs of the cluster theirs, in fixed orders:
// each sends the others their shares of the outputs.
//
// Set by the compiler's command line: HEAD_DIM (64, 128), GROUP (1 to 8: query heads of a kv head), WARPS, STAGES, FLOAT16.

#include "hopper.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int TILE_KEYS = 16, ROWS = 8;  // of a tile; of queries, filled up
constexpr int ROW_BYTES = 2 * HEAD_DIM, CHUNKS = ROW_BYTES / 16;
constexpr int KEYS_BYTES = TILE_KEYS * ROW_BYTES, TILE_BYTES = 2 * KEYS_BYTES;
constexpr int PAIRS = HEAD_DIM / 64;       // of numbers that turn together, of a lane
constexpr int PITCH = HEAD_DIM + 8;        // floats of a row of a warp's sums: keeps lanes off each other's banks
constexpr int FOURS = GROUP * HEAD_DIM / 4;  // of outputs
constexpr int PREPARED = (GROUP + WARPS) / WARPS;  // heads of a warp: GROUP of q and one of k, rounded up
constexpr float LOG2_E = 1.4426950408889634f;
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(GROUP <= ROWS && STAGES >= 2 && GROUP * PITCH * 4 <= STAGES * TILE_BYTES, "sums take the place of the stages");

// Where 8 numbers of a row lie: rows of 128 or 256 bytes, whose chunks are exchanged so that 8 rows of one chunk differ in banks.
__device__ __forceinline__ u32 place(u32 row, u32 chunk) { return row * ROW_BYTES + (chunk ^ (row & 7)) * 16; }

__device__ __forceinline__ void load_transposed(u32 (&bits)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_two_matrices(u32 (&bits)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "r"(address) : "memory");
}

// sums += 8 rows x 16 numbers of K by 16 x 8; rows 8 to 15 of the instruction are zeros, and their sums not kept.
__device__ __forceinline__ void multiply_rows(float (&sums)[2], u32 rows_low, u32 rows_high, u32 low, u32 high) {
  float unused_0, unused_1;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." INPUT "." INPUT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
               "{%0, %1, %9, %9};"
               : "+f"(sums[0]), "+f"(sums[1]), "=f"(unused_0), "=f"(unused_1)
               : "r"(rows_low), "r"(0), "r"(rows_high), "r"(low), "r"(high), "f"(0.0f));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most PENDING of this thread's groups of copies have not arrived.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ long long load_from_l2(const long long* source) {
  long long value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ void keep_number(u32 address, u16 bits) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
}

__device__ __forceinline__ void keep_two(u32 address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ float2 load_two(u32 address) {
  float2 two;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(address) : "memory");
  return two;
}

__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The weight of sums whose largest score is `part`, where the largest of all is `largest`; none of what has seen no key.
__device__ __forceinline__ float weight_of(float part, float largest) {
  return part == MINUS_INFINITY ? 0.0f : power_of_two(part - largest);
}

__device__ __forceinline__ float rounded(float value) { return widen_input(round_input(value)); }

// Grid: the CTAs of a cluster (1, 2, 4 or 8), kv heads of all rows. Strides in numbers; q, k and v are parts of one row of
// stride_token, the caches have equal strides. A page has 16 << page_shift keys. window is 0 where all keys are seen; the gains
// (both or none) and sinks may be null. A slot below zero is not written.
extern "C" __global__ void __launch_bounds__(THREADS, 384 / THREADS)
decode_attention(const u16* q, const u16* k, const u16* v, const float* cosines, const float* sines, const u16* q_gain,
                 const u16* k_gain, u16* k_cache, u16* v_cache, u16* out, const int* tables, const int* context_lens,
                 const long long* slots, const u16* sinks, long long stride_token, long long stride_page, int stride_key,
                 int stride_head, int stride_table, int num_kv_heads, int page_shift, int window, float scale, float eps) {
  extern __shared__ unsigned char dynamic_memory[];
  __shared__ float warps_largest[WARPS][GROUP], warps_total[WARPS][GROUP];
  __shared__ u64 barrier_memory;
  const int split = blockIdx.x, num_splits = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long row = blockIdx.y / static_cast<u32>(num_kv_heads);
  const int head = blockIdx.y % static_cast<u32>(num_kv_heads);
  const u32 memory = (shared_address(dynamic_memory) + 127) & ~127u;
  const u32 stages = memory + warp * STAGES * TILE_BYTES;
  const u32 queries = memory + WARPS * STAGES * TILE_BYTES, new_rows = queries + ROWS * ROW_BYTES;
  const u32 received = new_rows + 2 * ROW_BYTES, received_stats = received + FOURS * 16;
  const u32 barrier = shared_address(&barrier_memory);
  let_next_start();

  const int context_len = load_from_l2(context_lens + row), position = context_len - 1;
  const int oldest = window > 0 ? max(context_len - window, 0) : 0;  // key that is seen
  const int first_tile = oldest / TILE_KEYS, last_tile = position / TILE_KEYS;
  const int num_workers = num_splits * WARPS, worker = warp * num_splits + split;  // few tiles go to many CTAs
  const int num_tiles = last_tile - first_tile < worker ? 0 : (last_tile - first_tile - worker) / num_workers + 1;
  const int owner = (last_tile - first_tile) % num_workers;  // of the last tile
  const bool has_new_key = owner % num_splits == split;

  // Tile i of this warp.
  const auto tile_of = [&](int i) { return first_tile + worker + i * num_workers; };
  const auto find_pages = [&](int first) {  // of 32 tiles, one a lane
    const int tile = tile_of(first + lane);
    return tile <= last_tile ? load_from_l2(tables + row * stride_table + (tile >> page_shift)) : 0;
  };
  int pages = find_pages(0);
  const auto copy_tile = [&](int i) {
    if (i > 0 && i % 32 == 0) pages = find_pages(i);
    if (i < num_tiles) {
      const int tile = tile_of(i), first_key = (tile & ((1 << page_shift) - 1)) * TILE_KEYS;
      const long long page = __shfl_sync(ALL_LANES, pages, i % 32);
      const long long source = page * stride_page + static_cast<long long>(first_key + lane / CHUNKS) * stride_key +
                               static_cast<long long>(head) * stride_head + lane % CHUNKS * 8;
      const u16 *key_source = k_cache + source, *value_source = v_cache + source;
      const u32 target = stages + i % STAGES * TILE_BYTES;
#pragma unroll
      for (int n = 0; n < TILE_KEYS * CHUNKS / 32; ++n) {
        const int key = n * (32 / CHUNKS) + lane / CHUNKS;
        const bool is_stored = tile * TILE_KEYS + key < position;
        copy_chunk(target + place(key, lane % CHUNKS), key_source, is_stored);
        copy_chunk(target + KEYS_BYTES + place(key, lane % CHUNKS), value_source, is_stored);
        key_source += 32 / CHUNKS * stride_key;
        value_source += 32 / CHUNKS * stride_key;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) copy_tile(i);

  if (num_splits > 1) {
    if (threadIdx.x == 0) {
      init_barrier(barrier, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      arrive_and_expect(barrier, FOURS * 16 + num_splits * GROUP * 8);
    }
    __syncwarp();
    arrive_at_cluster();
  }
  float cosine[PAIRS], sine[PAIRS], gains[2][2][PAIRS];  // gains of q and k, of the first and the second of each pair
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const int number = PAIRS * lane + p;
    cosine[p] = cosines[static_cast<long long>(position) * (HEAD_DIM / 2) + number];
    sine[p] = sines[static_cast<long long>(position) * (HEAD_DIM / 2) + number];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      gains[0][half][p] = q_gain == nullptr ? 1.0f : widen_input(q_gain[number + half * (HEAD_DIM / 2)]);
      gains[1][half][p] = k_gain == nullptr ? 1.0f : widen_input(k_gain[number + half * (HEAD_DIM / 2)]);
    }
  }
  for (int i = threadIdx.x; i < (ROWS - GROUP) * CHUNKS; i += THREADS) keep(queries + GROUP * ROW_BYTES + i * 16, Four{});
  const long long slot = load_from_l2(slots + row), page_len = TILE_KEYS << page_shift;
  const long long new_place = slot / page_len * stride_page + slot % page_len * stride_key + static_cast<long long>(head) * stride_head;
  wait_for_previous();

  // Heads of q, then the new key.
  float x[PREPARED][2][PAIRS];
#pragma unroll
  for (int r = 0; r < PREPARED; ++r) {
    const int h = r * WARPS + warp;
    const u16* source = h < GROUP ? q + (head * GROUP + h) * HEAD_DIM : k + head * HEAD_DIM;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const u16* number = source + row * stride_token + PAIRS * lane + p;
      x[r][0][p] = widen_input(number[0]);
      x[r][1][p] = widen_input(number[HEAD_DIM / 2]);
    }
  }
#pragma unroll
  for (int r = 0; r < PREPARED; ++r) {
    const int h = r * WARPS + warp;
    const bool is_key = h == GROUP;
    if (h > GROUP || (is_key && !has_new_key)) continue;
    if (q_gain != nullptr) {
      float squares = 0.0f;
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) squares += x[r][0][p] * x[r][0][p] + x[r][1][p] * x[r][1][p];
      const float norm = rsqrtf(add_lanes(squares) / HEAD_DIM + eps);
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) {
        x[r][0][p] = rounded(rounded(x[r][0][p] * norm) * (is_key ? gains[1][0][p] : gains[0][0][p]));
        x[r][1][p] = rounded(rounded(x[r][1][p] * norm) * (is_key ? gains[1][1][p] : gains[0][1][p]));
      }
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {  // as the reference rounds: no multiply-adds
      const float first = x[r][0][p], second = x[r][1][p];
      const u16 turned[2] = {round_input(__fsub_rn(__fmul_rn(first, cosine[p]), __fmul_rn(second, sine[p]))),
                             round_input(__fadd_rn(__fmul_rn(second, cosine[p]), __fmul_rn(first, sine[p])))};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int number = PAIRS * lane + p + half * (HEAD_DIM / 2);
        const u32 chunk_place = is_key ? new_rows + number / 8 * 16 : queries + place(h, number / 8);
        keep_number(chunk_place + number % 8 * 2, turned[half]);
        if (is_key && slot >= 0) k_cache[new_place + number] = turned[half];
      }
    }
  }
  if (has_new_key && threadIdx.x < CHUNKS) {
    const Four eight = *reinterpret_cast<const Four*>(v + row * stride_token + head * HEAD_DIM + threadIdx.x * 8);
    keep(new_rows + ROW_BYTES + threadIdx.x * 16, eight);
    if (slot >= 0) *reinterpret_cast<Four*>(v_cache + new_place + threadIdx.x * 8) = eight;
  }
  __syncthreads();

  // A lane has the query head lane / 4, and of each 8 keys or numbers of a head 2 (lane % 4) and the next.
  const int own_head = lane / 4;
  u32 q_rows[HEAD_DIM / 16][2];
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) load_two_matrices(q_rows[step], queries + place(lane % 8, 2 * step + lane / 8 % 2));
  float largest = MINUS_INFINITY, total = 0.0f, sums[HEAD_DIM / 8][2] = {};
  if (sinks != nullptr && worker == 0 && own_head < GROUP) {  // a sink is a key whose value is zero
    largest = widen_input(sinks[head * GROUP + own_head]) * LOG2_E;
    total = lane % 4 == 0 ? 1.0f : 0.0f;
  }
  const float unit = scale * LOG2_E;
  for (int i = 0; i < num_tiles; ++i) {
    const u32 keys = stages + i % STAGES * TILE_BYTES;
    const int tile = tile_of(i);
    wait_for_copies<STAGES - 2>();
    __syncwarp();
    if (tile == last_tile) {
      if (lane < 2 * CHUNKS) {
        const u32 which = lane / CHUNKS, chunk = lane % CHUNKS;
        keep(keys + which * KEYS_BYTES + place(position % TILE_KEYS, chunk), load(new_rows + which * ROW_BYTES + chunk * 16));
      }
      __syncwarp();
    }
    copy_tile(i + STAGES - 1);

    float scores[2][2] = {};
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      u32 bits[4];
      load_matrices(bits, keys + place(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      multiply_rows(scores[0], q_rows[step][0], q_rows[step][1], bits[0], bits[1]);
      multiply_rows(scores[1], q_rows[step][0], q_rows[step][1], bits[2], bits[3]);
    }
    float best = MINUS_INFINITY;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = tile * TILE_KEYS + n / 2 * 8 + lane % 4 * 2 + n % 2;
      if (key > position || key < oldest) scores[n / 2][n % 2] = MINUS_INFINITY;
      best = fmaxf(best, scores[n / 2][n % 2]);
    }
    best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 1));
    best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 2));
    const float new_largest = fmaxf(largest, best * unit);
    const float rescale = power_of_two(largest - new_largest);
    total *= rescale;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      scores[n / 2][n % 2] = power_of_two(scores[n / 2][n % 2] * unit - new_largest);
      total += scores[n / 2][n % 2];
    }
    largest = new_largest;
    const u32 weights_low = round_two(scores[0][0], scores[0][1]), weights_high = round_two(scores[1][0], scores[1][1]);
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) sums[n][0] *= rescale, sums[n][1] *= rescale;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; ++n) {
      u32 bits[4];
      load_transposed(bits, keys + KEYS_BYTES + place(lane / 8 % 2 * 8 + lane % 8, 2 * n + lane / 16));
      multiply_rows(sums[2 * n], weights_low, weights_high, bits[0], bits[1]);
      multiply_rows(sums[2 * n + 1], weights_low, weights_high, bits[2], bits[3]);
    }
  }
  wait_for_copies<0>();
  __syncwarp();
  total += __shfl_xor_sync(ALL_LANES, total, 1);
  total += __shfl_xor_sync(ALL_LANES, total, 2);
  if (own_head < GROUP) {  // the sums take the place of this warp's stages
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) keep_two(stages + 4 * (own_head * PITCH + 8 * n + lane % 4 * 2), sums[n][0], sums[n][1]);
    if (lane % 4 == 0) warps_largest[warp][own_head] = largest, warps_total[warp][own_head] = total;
  }
  __syncthreads();

  const int own_fours = FOURS / num_splits;  // of the outputs, that this CTA stores
  const auto store_outputs = [&](int four, const Four& sum, float all) {
    Four mean;
    for (int i = 0; i < 4; ++i) mean.value[i] = sum.value[i] / all;
    const u64 bits = round_two(mean.value[0], mean.value[1]) | static_cast<u64>(round_two(mean.value[2], mean.value[3])) << 32;
    *reinterpret_cast<u64*>(out + (row * num_kv_heads + head) * (GROUP * HEAD_DIM) + four * 4) = bits;
  };
  if (num_splits > 1) wait_for_cluster();
  for (int four = threadIdx.x; four < FOURS; four += THREADS) {
    const int g = four / (HEAD_DIM / 4), number = four % (HEAD_DIM / 4) * 4;
    float most = warps_largest[0][g], all = 0.0f;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, warps_largest[w][g]);
    Four sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float weight = weight_of(warps_largest[w][g], most);
      const Four part = load(memory + w * STAGES * TILE_BYTES + 4 * (g * PITCH + number));
      for (int i = 0; i < 4; ++i) sum.value[i] += weight * part.value[i];
      all += weight * warps_total[w][g];
    }
    if (num_splits == 1) {
      store_outputs(four, sum, all);
      continue;
    }
    const u32 target = four / static_cast<u32>(own_fours);
    send(address_in_rank(received + (split * own_fours + four % own_fours) * 16, target), address_in_rank(barrier, target), sum);
    if (number / 4 < num_splits) {  // the first threads of a head tell each CTA its largest score and its total
      send_two(address_in_rank(received_stats + (split * GROUP + g) * 8, number / 4), address_in_rank(barrier, number / 4), most, all);
    }
  }
  if (num_splits == 1) return;

  wait_for_peers(barrier, 0);
  for (int own = threadIdx.x; own < own_fours; own += THREADS) {
    const int four = split * own_fours + own, g = four / (HEAD_DIM / 4);
    float most = MINUS_INFINITY, all = 0.0f;
    for (int s = 0; s < num_splits; ++s) most = fmaxf(most, load_two(received_stats + (s * GROUP + g) * 8).x);
    Four sum = {};
    for (int s = 0; s < num_splits; ++s) {
      const float2 stats = load_two(received_stats + (s * GROUP + g) * 8);
      const float weight = weight_of(stats.x, most);
      const Four part = load(received + (s * own_fours + own) * 16);
      for (int i = 0; i < 4; ++i) sum.value[i] += weight * part.value[i];
      all += weight * stats.y;
    }
    store_outputs(four, sum, all);
  }
}
