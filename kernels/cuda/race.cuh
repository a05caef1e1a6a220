// The race of sampling.py among a tile's outputs, run where a head's sums still lie in shared memory.
//
// A row whose logits are wanted has them stored, and takes no part. Of every other row the tile leaves three numbers: the best of
// logit + temperature * g, the lowest token that has it, and that token's logit. What is not a number counts as -inf.
// A lane has four consecutive outputs, which share a block of Philox.
//
// Needs streaming.cuh's macros, without GATED.

#pragma once

#include "streaming.cuh"

typedef long long i64;

// S rows, M slots, T tiles. What a launch passes: eight bytes each.
struct Race {
  const i64* slots;         // [S]
  const i64* positions;     // [S]
  const i64* wants_logits;  // [S], or null: no row's are wanted
  const float* temperatures;  // [M]
  const i64* seeds;           // [M]
  float* scores;              // [S, T]
  int* tokens;                // [S, T]
  float* logits;              // [S, T]
  u64 first_token;            // of the whole vocabulary, a multiple of four
};

struct Racer {
  u32 seed[2], position[2];
  float temperature;  // or WANTS_LOGITS
};

constexpr float WANTS_LOGITS = -1.0f;

// Thread m of the consumers, which are no fewer than the rows.
__device__ __forceinline__ void load_racer(Racer* racers, const Race& race, int num_rows) {
  static_assert(ROWS <= CONSUMERS, "a thread for each row");
  const int m = threadIdx.x;
  if (m >= num_rows) return;
  const i64 slot = race.slots[m], position = race.positions[m], wants_logits = race.wants_logits ? race.wants_logits[m] : 0;
  const i64 seed = race.seeds[slot];
  const float temperature = race.temperatures[slot];
  racers[m] = Racer{{static_cast<u32>(seed), static_cast<u32>(static_cast<u64>(seed) >> 32)},
                    {static_cast<u32>(position), static_cast<u32>(static_cast<u64>(position) >> 32)},
                    wants_logits ? WANTS_LOGITS : temperature};
}

// --- random numbers: those of philox.py

struct Words {
  u32 word[4];
};

__device__ __forceinline__ Words philox(const Racer& racer, u32 counter) {
  u32 c0 = counter, c1 = racer.position[0], c2 = racer.position[1], c3 = 0, k0 = racer.seed[0], k1 = racer.seed[1];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 product_0 = static_cast<u64>(c0) * 0xD2511F53u, product_1 = static_cast<u64>(c2) * 0xCD9E8D57u;
    c0 = static_cast<u32>(product_1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<u32>(product_1);
    c2 = static_cast<u32>(product_0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<u32>(product_0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// -log(-log(1 - u)). The series is right to 1e-7 of its value below 1/8, where __logf(1 - u) would lose what decides.
__device__ __forceinline__ float gumbel(u32 word) {
  const float u = fminf((static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
  float series = 0.142857143f;
  series = series * u + 0.166666667f;
  series = series * u + 0.2f;
  series = series * u + 0.25f;
  series = series * u + 0.333333333f;
  series = series * u + 0.5f;
  series = (series * u + 1.0f) * u;
  return -__logf(u < 0.125f ? series : -__logf(1.0f - u));
}

// --- the best of a row

// Numbers in the order of (score, then the lower token first); more than 0.
__device__ __forceinline__ u64 rank_of(float score, u32 token) {
  const u32 bits = __float_as_uint(score + 0.0f);  // -0 is 0
  const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(ordered) << 32 | ~token;
}

__device__ __forceinline__ float score_of(u64 rank) {
  const u32 ordered = static_cast<u32>(rank >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ u32 token_of(u64 rank) { return ~static_cast<u32>(rank); }

// The best of four logits, which are those of `token` and the `count` - 1 after it, if there are as many.
__device__ __forceinline__ u64 best_of_four(Four four, const Racer& racer, u32 token, int count, u64 first_token) {
  if (racer.temperature > 0.0f) {
    const Words words = philox(racer, static_cast<u32>((first_token + token) / 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] += racer.temperature * gumbel(words.word[i]);
  }
  float best = fmaxf(four.value[0], __uint_as_float(0xff800000));  // -inf, where it is not a number
  u32 winner = token;
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (i < count && four.value[i] > best) best = four.value[i], winner = token + i;
  }
  return rank_of(best, winner);
}

// Sums: [row, output of the tile], rows `pitch` numbers apart. Called by all consumers.
__device__ __forceinline__ void race_tile(u32 sums, int pitch, const Racer* racers, const Race& race, void* y, int num_rows,
                                          int num_outputs) {
  constexpr int LANES = TILE == 64 ? 16 : 32;      // of a row
  constexpr int STRIDE = CONSUMERS / LANES;        // rows that all warps have at a time
  constexpr int AT_ONCE = ROWS >= 4 * STRIDE ? 4 : 1;  // of each warp, so that it waits for its shuffles once
  const int lane = threadIdx.x % LANES, tile = blockIdx.y, num_tiles = gridDim.y, first_output = tile * TILE;
  const bool is_aligned = num_outputs % 4 == 0 && (reinterpret_cast<u64>(y) & 15) == 0;
  const int first_row = threadIdx.x / LANES, first_of_warp = threadIdx.x / 32 * (32 / LANES);
  for (int offset = 0; first_of_warp + offset < num_rows; offset += AT_ONCE * STRIDE) {
    u64 best[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      best[i] = 0;
      const int m = first_row + offset + i * STRIDE;
      if (m >= num_rows) continue;
      const Racer racer = racers[m];
#pragma unroll
      for (int column = 4 * lane; column < TILE; column += 4 * LANES) {
        const int n = first_output + column, count = num_outputs - n;
        if (count <= 0) continue;
        const Four four = load(sums + 4 * (m * pitch + column));
        if (racer.temperature == WANTS_LOGITS) {
          store(y, static_cast<u64>(m) * num_outputs + n, four, count, true, is_aligned);
        } else {
          best[i] = max(best[i], best_of_four(four, racer, n, count, race.first_token));
        }
      }
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) best[i] = max(best[i], __shfl_xor_sync(ALL_LANES, best[i], distance));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int m = first_row + offset + i * STRIDE;
      if (lane != 0 || best[i] == 0) continue;  // there is no such row, or its logits are stored
      const u64 index = static_cast<u64>(m) * num_tiles + tile;
      const u32 token = token_of(best[i]);
      race.scores[index] = score_of(best[i]);
      race.tokens[index] = static_cast<int>(token);
      race.logits[index] = load_one(sums + 4 * (m * pitch + token - first_output));
    }
  }
}
