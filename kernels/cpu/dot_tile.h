// The microkernel that linear and mixture-of-experts layers share: a tile of dot products
//   y[m][n] = sum_k x[m][k] * w[n][k]
// between a few rows of x and four rows of w, all read along k, accumulated in float32. bfloat16 rows of w are widened
// in registers: with six rows of x that costs nothing measurable, and memory is read only once at half the width.
// The order of additions for one (m, n) never depends on the tile it is in: lane l adds k = l, l + kLanes, ... and the
// lanes are added by sum4. So a row gives the same bits alone and in any batch.
#pragma once

#include "simd.h"

namespace pilotfish {

// Accumulators (rows x 4) and operands fill the vector registers: 32 on AVX-512 and NEON, 16 on AVX2 and SSE.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileColumns = 4;

// What to ask memory for meanwhile, as far as the L2 cache: `step` bytes from `next` on for each vector of k. The four rows of
// w are four streams a row apart, which hardware prefetchers take for noise (9 GB/s a core instead of 20): asking in order
// restores the speed.
struct Prefetch {
  const char* next;
  int64_t step;
};

template <int NumRows, class Weight>
inline void dot_tile_of(const float* const* x_rows, const Weight* const* w_rows, int64_t size, Prefetch prefetch,
                        Vector4* out) {
  const float* x[NumRows];
  for (int m = 0; m < NumRows; ++m) x[m] = x_rows[m];
  const Weight *w0 = w_rows[0], *w1 = w_rows[1], *w2 = w_rows[2], *w3 = w_rows[3];
  Vector sums[NumRows][kTileColumns] = {};
  const auto add_products = [&](Vector a, Vector b, Vector c, Vector d, auto load_x) {
#pragma GCC unroll 8
    for (int m = 0; m < NumRows; ++m) {
      const Vector value = in_register(load_x(x[m]));
      sums[m][0] = multiply_add(value, a, sums[m][0]);
      sums[m][1] = multiply_add(value, b, sums[m][1]);
      sums[m][2] = multiply_add(value, c, sums[m][2]);
      sums[m][3] = multiply_add(value, d, sums[m][3]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    for (int64_t byte = 0; byte < prefetch.step; byte += 64) __builtin_prefetch(prefetch.next + byte, 0, 2);
    prefetch.next += prefetch.step;
    add_products(load(w0 + k), load(w1 + k), load(w2 + k), load(w3 + k),
                 [k](const float* row) { return load(row + k); });
  }
  if (k < size) {
    const int64_t left = size - k;
    add_products(load_partial(w0 + k, left), load_partial(w1 + k, left), load_partial(w2 + k, left),
                 load_partial(w3 + k, left), [k, left](const float* row) { return load_partial(row + k, left); });
  }
#pragma GCC unroll 8
  for (int m = 0; m < NumRows; ++m) out[m] = sum4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
}

// One row of x against consecutive rows of w: reading them one after another is one long stream, as fast as memory.
template <class Weight>
inline void dot_row(const float* x, const Weight* const* w, int64_t size, Vector4* out) {
  Vector sums[kTileColumns];
#pragma GCC unroll 4
  for (int n = 0; n < kTileColumns; ++n) {
    Vector row_sum = {};
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) row_sum = multiply_add(load(x + k), load(w[n] + k), row_sum);
    if (k < size) row_sum = multiply_add(load_partial(x + k, size - k), load_partial(w[n] + k, size - k), row_sum);
    sums[n] = row_sum;
  }
  *out = sum4(sums[0], sums[1], sums[2], sums[3]);
}

// The instance for 1 <= num_rows <= kTileRows. out[m] holds the four products of row m.
template <class Weight>
inline void dot_tile(int num_rows, const float* const* x, const Weight* const* w, int64_t size, Prefetch prefetch,
                     Vector4* out) {
  switch (num_rows) {
    case 1: return dot_row(x[0], w, size, out);
    case 2: return dot_tile_of<2>(x, w, size, prefetch, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return dot_tile_of<3>(x, w, size, prefetch, out);
    case 4: return dot_tile_of<4>(x, w, size, prefetch, out);
    case 5: return dot_tile_of<5>(x, w, size, prefetch, out);
    case 6: return dot_tile_of<6>(x, w, size, prefetch, out);
#endif
    default: __builtin_unreachable();
  }
}

}  // namespace pilotfish
