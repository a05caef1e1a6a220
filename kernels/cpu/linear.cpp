// y_MN = x_MK @ w_NK^T + bias_N. x and y are float32, w and bias bfloat16 or float32, sums are kept in float32.
// Threads share out panels of rows of w. A panel is small enough to stay in the L2 cache while the rows of x pass over
// it a tile at a time, so w is read from memory once whatever the number of rows.
#include <algorithm>

#include "dot_tile.h"

namespace pilotfish {
namespace {

constexpr int64_t kPanelBytes = 192 * 1024;
constexpr int64_t kMaxPanelRows = 64;

template <class Weight>
struct Linear {
  const float* x;
  int64_t x_stride;
  const Weight* w;
  int64_t w_stride;
  const Weight* bias;  // may be null
  float* y;
  int64_t y_stride;
  int64_t num_rows;     // M
  int64_t num_columns;  // N
  int64_t size;         // K
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of w in one panel: whole tiles, not too large for the cache, and the same number of panels for every thread.
int64_t panel_rows(int64_t num_columns, int64_t row_bytes, int64_t num_threads) {
  const int64_t fitting = std::min(kMaxPanelRows, kPanelBytes / std::max<int64_t>(row_bytes, 1));
  const int64_t share = ceil_div(num_columns, num_threads);
  const int64_t rows = ceil_div(share, ceil_div(share, std::max<int64_t>(fitting, kTileColumns)));
  return ceil_div(rows, kTileColumns) * kTileColumns;
}

template <class Weight>
void write_row(const Linear<Weight>& p, Vector4 sums, int64_t m, int64_t n, int columns) {
  float* y = p.y + m * p.y_stride + n;
  if (p.bias != nullptr) {
    for (int j = 0; j < columns; ++j) sums[j] += to_float(p.bias[n + j]);
  }
  if (columns == kTileColumns) {
    std::memcpy(y, &sums, sizeof(sums));
  } else {
    for (int j = 0; j < columns; ++j) y[j] = sums[j];
  }
}

// Columns [begin, end) of y for all rows of x.
template <class Weight>
void multiply_panel(const Linear<Weight>& p, int64_t begin, int64_t end, int64_t tile_rows) {
  const float* x[kTileRows];
  const Weight* w[kTileColumns];
  Vector4 tile[kTileRows];
  for (int64_t m = 0; m < p.num_rows; m += tile_rows) {
    const int rows = static_cast<int>(std::min(tile_rows, p.num_rows - m));
    for (int i = 0; i < rows; ++i) x[i] = p.x + (m + i) * p.x_stride;
    for (int64_t n = begin; n < end; n += kTileColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, end - n));
      for (int j = 0; j < kTileColumns; ++j) w[j] = p.w + (n + std::min(j, columns - 1)) * p.w_stride;
      dot_tile<Rows::kConsecutive>(rows, x, w, p.size, tile);
      for (int i = 0; i < rows; ++i) write_row(p, tile[i], m + i, n, columns);
    }
  }
}

template <class Weight>
void linear(const Linear<Weight>& p, int64_t num_threads) {
  if (p.num_rows == 0 || p.num_columns == 0) return;
  const int64_t rows = panel_rows(p.num_columns, p.size * sizeof(Weight), num_threads);
  const int64_t num_panels = ceil_div(p.num_columns, rows);
  const int64_t tile_rows = ceil_div(p.num_rows, ceil_div(p.num_rows, kTileRows));
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t i = 0; i < num_panels; ++i) {
    multiply_panel(p, i * rows, std::min((i + 1) * rows, p.num_columns), tile_rows);
  }
}

}  // namespace
}  // namespace pilotfish

using pilotfish::BFloat16;

EXPORT(void)
pilotfish_linear_bf16(const float* x, int64_t x_stride, const BFloat16* w, int64_t w_stride, const BFloat16* bias,
                           float* y, int64_t y_stride, int64_t num_rows, int64_t num_columns, int64_t size,
                           int64_t num_threads) {
  pilotfish::linear<BFloat16>({x, x_stride, w, w_stride, bias, y, y_stride, num_rows, num_columns, size}, num_threads);
}

EXPORT(void)
pilotfish_linear_f32(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias,
                          float* y, int64_t y_stride, int64_t num_rows, int64_t num_columns, int64_t size,
                          int64_t num_threads) {
  pilotfish::linear<float>({x, x_stride, w, w_stride, bias, y, y_stride, num_rows, num_columns, size}, num_threads);
}
