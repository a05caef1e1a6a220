// A panel of rows of a weight against all rows of x: the unit of work of linear layers and of experts.
//
// A panel is small enough to stay in the L2 cache while the rows of x pass over it a tile at a time, so a weight is read
// from memory once whatever the number of rows.
#pragma once

#include <algorithm>

#include "dot_tile.h"
#include "parallel.h"

namespace pilotfish {

constexpr int64_t kPanelBytes = 192 * 1024;
constexpr int64_t kMaxPanelRows = 16;
constexpr int64_t kPrefetchBytes = 16384;

template <class Weight>
struct Matrix {
  const Weight* data;  // [rows, size], rows `stride` apart
  int64_t stride, num_rows, size;
};

// Rows of w in one panel: whole tiles, not too large for the cache, and the same number of panels for every thread.
template <class Weight>
int64_t panel_rows(const Matrix<Weight>& w, int64_t num_threads) {
  const int64_t row_bytes = std::max<int64_t>(w.size * static_cast<int64_t>(sizeof(Weight)), 1);
  const int64_t fitting = std::max<int64_t>(std::min(kMaxPanelRows, kPanelBytes / row_bytes), kTileColumns);
  const int64_t share = ceil_div(w.num_rows, num_threads);
  return ceil_div(ceil_div(share, ceil_div(share, fitting)), kTileColumns) * kTileColumns;
}

template <class Weight>
inline void write_products(Vector4 products, const Weight* bias, float* y, int count) {
  if (bias != nullptr) {
    for (int j = 0; j < count; ++j) products[j] += to_float(bias[j]);
  }
  if (count == kTileColumns) {
    std::memcpy(y, &products, sizeof(products));
  } else {
    for (int j = 0; j < count; ++j) y[j] = products[j];
  }
}

// What pass `pass` of `num_passes` over a panel fetches beside its rows from n on: with a single pass, rows soon to come; else
// a part of the same rows of the next panel, so that memory is busy while the passes compute. No cache line twice.
template <class Weight>
inline Prefetch prefetch_for(const Matrix<Weight>& w, int64_t n, int64_t panel_rows, int64_t pass, int64_t num_passes) {
  const int64_t row_bytes = w.stride * static_cast<int64_t>(sizeof(Weight));
  const int64_t step_bytes = kTileColumns * kLanes * static_cast<int64_t>(sizeof(Weight));
  const int64_t num_parts = std::min(num_passes, step_bytes / 64);
  if (pass >= num_parts) return {nullptr, 0};
  const int64_t ahead = num_passes == 1 ? kPrefetchBytes : panel_rows * row_bytes;
  const int64_t part = kTileColumns * row_bytes * pass / num_parts;
  return {reinterpret_cast<const char*>(w.data + n * w.stride) + ahead + part, step_bytes / num_parts};
}

// y_row(m)[n] = x_row(m) . w[n] + bias[n] for all num_rows rows m and the rows n in [begin, end) of w; bias may be null.
template <class Weight, class XRow, class YRow>
void multiply_panel(const Matrix<Weight>& w, const Weight* bias, int64_t begin, int64_t end, int64_t num_rows,
                    XRow x_row, YRow y_row) {
  const float* x[kTileRows];
  const Weight* weights[kTileColumns];
  Vector4 tile[kTileRows];
  const int64_t num_passes = ceil_div(num_rows, kTileRows), tile_rows = ceil_div(num_rows, num_passes);
  for (int64_t m = 0; m < num_rows; m += tile_rows) {
    const int rows = static_cast<int>(std::min(tile_rows, num_rows - m));
    for (int i = 0; i < rows; ++i) x[i] = x_row(m + i);
    for (int64_t n = begin; n < end; n += kTileColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, end - n));
      for (int j = 0; j < kTileColumns; ++j) weights[j] = w.data + (n + std::min(j, columns - 1)) * w.stride;
      dot_tile(rows, x, weights, w.size, prefetch_for(w, n, end - begin, m / tile_rows, num_passes), tile);
      for (int i = 0; i < rows; ++i) {
        write_products(tile[i], bias == nullptr ? nullptr : bias + n, y_row(m + i) + n, columns);
      }
    }
  }
}

}  // namespace pilotfish
