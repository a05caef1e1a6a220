// The microkernel that linear, mixture-of-experts and attention scores share: a tile of dot products
//   y[m][n] = sum_k x[m][k] * w[n][k]
// between `rows` rows of x and four rows of w, all read along k, accumulated in float32.
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

template <int Rows, class Weight>
__attribute__((noinline)) void dot_tile(const float* const* x_rows, const Weight* const* w_rows, int64_t size, Vector4* out) {
  const float* x[Rows];
  for (int m = 0; m < Rows; ++m) x[m] = x_rows[m];
  const Weight *w0 = w_rows[0], *w1 = w_rows[1], *w2 = w_rows[2], *w3 = w_rows[3];
  Vector sums[Rows][kTileColumns] = {};
  const auto add_products = [&](Vector a, Vector b, Vector c, Vector d, auto load_x) {
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Vector value = in_register(load_x(x[m]));
      sums[m][0] += value * a;
      sums[m][1] += value * b;
      sums[m][2] += value * c;
      sums[m][3] += value * d;
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    add_products(load(w0 + k), load(w1 + k), load(w2 + k), load(w3 + k), [k](const float* row) { return load(row + k); });
  }
  if (k < size) {
    const int64_t left = size - k;
    add_products(load_partial(w0 + k, left), load_partial(w1 + k, left), load_partial(w2 + k, left),
                 load_partial(w3 + k, left), [k, left](const float* row) { return load_partial(row + k, left); });
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) out[m] = sum4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
}

// Chooses the instance for 1 <= rows <= kTileRows.
template <class Weight>
inline void dot_tile(int rows, const float* const* x, const Weight* const* w, int64_t size, Vector4* out) {
  switch (rows) {
    case 1: return dot_tile<1>(x, w, size, out);
    case 2: return dot_tile<2>(x, w, size, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 3: return dot_tile<3>(x, w, size, out);
    case 4: return dot_tile<4>(x, w, size, out);
    case 5: return dot_tile<5>(x, w, size, out);
    default: return dot_tile<6>(x, w, size, out);
#endif
  }
}

}  // namespace pilotfish
