// Attention of a few query rows over one chunk of keys, and the merging of such partial results.
//
// A chunk is 128 keys aligned to an absolute position. It gives each row a partial result: its largest score, the sum of
// exp(score - largest), and the values weighted so. Rows are independent and every sum runs in one fixed order, so a row's
// partial has the same bits whatever rows are computed beside it; merged in the order of chunks, so has the result.
//
// Keys are transposed first, 16 x 16 at a time: then scores = queries x keys and out = weights x values are the same
// product of a few rows with a matrix whose rows lie along vectors, and no score needs a sum across lanes.
#pragma once

#include <algorithm>

#include "simd_math.h"

namespace pilotfish {

constexpr int kChunk = 128;

// Rows that share one pass over keys or values: 6 x 4 accumulators fill the 32 vector registers, 2 x 4 fill 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowGroup = 6;
#else
constexpr int kRowGroup = 2;
#endif

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The keys [begin, end) of a chunk that a row sees, counted from the chunk's start.
struct KeyRange {
  int begin, end;
};

// The result of each row over some keys: sum over j of exp(score_j - largest) v_j, with `sum` the same over 1.
struct Partial {
  float *largest, *sum, *values;  // [rows], [rows], [rows, padded head_dim]
};

inline int64_t partial_floats(int64_t rows, int64_t head_dim) { return 2 * padded(rows) + rows * padded(head_dim); }

inline Partial partial_at(float* memory, int64_t rows) {
  return {memory, memory + padded(rows), memory + 2 * padded(rows)};
}

// Where the keys and values of a chunk are, for one head; those of the next heads lie `head_stride` further on. Every place
// holds an address; those outside `range` repeat one inside.
template <class Cache>
struct ChunkPlaces {
  KeyRange range;
  const Cache* keys[kChunk];
  const Cache* values[kChunk];
};

// Asks memory for something soon wanted, as far as the L2 cache: more such requests can wait there than at L1.
inline void fetch(const void* address, int64_t num_bytes) {
  for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(address) + byte, 0, 2);
}

// keys_transposed[d][j] = keys[j][key_offset + d] for the vectors of keys that the chunk's range touches; lanes outside it
// hold anything. Meanwhile asks for num_bytes of each of `fetched`.
template <class Cache>
void transpose_keys(const ChunkPlaces<Cache>& chunk, int64_t key_offset, int64_t head_dim, const Cache* const* fetched,
                    int64_t fetched_offset, int64_t num_bytes, float* keys_transposed) {
  for (int j = chunk.range.begin / kLanes * kLanes; j < chunk.range.end; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) fetch(fetched[j + i] + fetched_offset, num_bytes);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int64_t left = head_dim - d;
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Cache* key = chunk.keys[j + i] + key_offset + d;
        block[i] = left >= kLanes ? load(key) : load_partial(key, left);
      }
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(kLanes, left); ++i) store(keys_transposed + (d + i) * kChunk + j, block[i]);
    }
  }
}

// Several vectors of NumRows rows of a product: out[m][...] = sum over k in [begin, end) of factors[m][k] * rows(k)[...].
template <int NumRows, int NumVectors, class Row>
inline void accumulate(const float* factors, int64_t factor_stride, int64_t begin, int64_t end, Row row, float* out,
                       int64_t out_stride) {
  Vector sums[NumRows][NumVectors] = {};
  for (int64_t k = begin; k < end; ++k) {
    Vector values[NumVectors];
#pragma GCC unroll 4
    for (int i = 0; i < NumVectors; ++i) values[i] = in_register(row(k, i));
#pragma GCC unroll 8
    for (int m = 0; m < NumRows; ++m) {
      const Vector factor = in_register(broadcast(factors[m * factor_stride + k]));
#pragma GCC unroll 4
      for (int i = 0; i < NumVectors; ++i) sums[m][i] = multiply_add(factor, values[i], sums[m][i]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < NumRows; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < NumVectors; ++i) store(out + m * out_stride + i * kLanes, sums[m][i]);
  }
}

// scores[m][j] = queries[m] . keys[j] for the vectors of keys that `range` touches.
template <int NumRows>
void score_rows(const float* queries, int64_t head_dim, const float* keys_transposed, KeyRange range, float* scores) {
  int j = range.begin / kLanes * kLanes;
  for (; j + 3 * kLanes < range.end; j += 4 * kLanes) {
    const auto keys = [=](int64_t d, int i) { return load(keys_transposed + d * kChunk + j + i * kLanes); };
    accumulate<NumRows, 4>(queries, padded(head_dim), 0, head_dim, keys, scores + j, kChunk);
  }
  for (; j < range.end; j += kLanes) {
    const auto keys = [=](int64_t d, int) { return load(keys_transposed + d * kChunk + j); };
    accumulate<NumRows, 1>(queries, padded(head_dim), 0, head_dim, keys, scores + j, kChunk);
  }
}

// out[m] = sum over the keys j of `range` of weights[m][j] * values[j][offset ...]. Meanwhile asks for num_bytes of each of
// `fetched`.
template <int NumRows, class Cache>
void weigh_values(const float* weights, int64_t head_dim, const Cache* const* values, int64_t offset, KeyRange range,
                  const Cache* const* fetched, int64_t fetched_offset, int64_t num_bytes, float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
    const int64_t bytes = d == 0 ? num_bytes : 0;
    const auto row = [=](int64_t j, int i) {
      if (i == 0) fetch(fetched[j] + fetched_offset, bytes);
      return load(values[j] + offset + d + i * kLanes);
    };
    accumulate<NumRows, 4>(weights, kChunk, range.begin, range.end, row, out + d, padded(head_dim));
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
    const auto row = [=](int64_t j, int) {
      const Cache* value = values[j] + offset + d;
      return left >= kLanes ? load(value) : load_partial(value, left);
    };
    accumulate<NumRows, 1>(weights, kChunk, range.begin, range.end, row, out + d, padded(head_dim));
  }
}

// Calls f with num_rows (1 to kRowGroup) as a compile-time constant.
template <class F>
inline void with_rows(int num_rows, F f) {
  switch (num_rows) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
#endif
    default: __builtin_unreachable();
  }
}

// Turns a row's scores into exp(score - largest), zero for the keys it does not see. A row that sees none sums to zero.
inline void weigh_row(float* scores, KeyRange range, float soft_cap, float* largest, float* sum_of_weights) {
  *largest = -std::numeric_limits<float>::infinity();
  *sum_of_weights = 0;
  if (range.begin >= range.end) {
    std::fill(scores, scores + kChunk, 0.0f);
    return;
  }
  const int begin = range.begin / kLanes * kLanes, end = static_cast<int>(padded(range.end));
  if (soft_cap > 0) {
    for (int j = begin; j < end; j += kLanes) store(scores + j, tanh(load(scores + j) / soft_cap) * soft_cap);
  }
  std::fill(scores + begin, scores + range.begin, *largest);
  std::fill(scores + range.end, scores + end, *largest);
  Vector lane_largest = broadcast(*largest);
  for (int j = begin; j < end; j += kLanes) lane_largest = max(lane_largest, load(scores + j));
  for (int i = 0; i < kLanes; ++i) *largest = std::max(*largest, lane_largest[i]);
  Vector lane_sums = {};
  for (int j = begin; j < end; j += kLanes) {
    const Vector weights = exp(load(scores + j) - *largest);
    store(scores + j, weights);
    lane_sums += weights;
  }
  *sum_of_weights = sum(lane_sums);
  std::fill(scores, scores + begin, 0.0f);
  std::fill(scores + end, scores + kChunk, 0.0f);
}

inline float exp_scalar(float x) { return exp(broadcast(x))[0]; }

// total = total and then chunk, row by row, both relative to the larger of their largest scores.
inline void merge(const Partial& total, const Partial& chunk, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    if (chunk.sum[row] == 0) continue;
    const float largest = std::max(total.largest[row], chunk.largest[row]);
    const float keep = exp_scalar(total.largest[row] - largest), add = exp_scalar(chunk.largest[row] - largest);
    total.largest[row] = largest;
    total.sum[row] = total.sum[row] * keep + chunk.sum[row] * add;
    float* values = total.values + row * padded(head_dim);
    const float* added = chunk.values + row * padded(head_dim);
    for (int64_t d = 0; d < padded(head_dim); d += kLanes) {
      store(values + d, multiply_add(load(added + d), broadcast(add), load(values + d) * keep));
    }
  }
}

inline void clear(const Partial& total, int64_t rows, int64_t head_dim) {
  std::fill(total.largest, total.largest + rows, -std::numeric_limits<float>::infinity());
  std::fill(total.sum, total.sum + rows, 0.0f);
  std::fill(total.values, total.values + rows * padded(head_dim), 0.0f);
}

}  // namespace pilotfish
