// y_MN = x_MK @ w_NK^T + bias_N. x, y float32; w and bias bfloat16 or float32; accumulation in float32.
// Threads share out panels of rows of w. For more rows of x than one tile holds, a panel is widened to float32 once
// and stays in the L2 cache while all rows of x pass over it; for few rows w is widened in registers as it streams by.
#include <algorithm>
#include <memory>

#include "dot_tile.h"

namespace pilotfish {
namespace {

constexpr int64_t kPanelBytes = 192 * 1024;  // float32 bytes of one panel: a part of L2
constexpr int64_t kMaxPanelRows = 64;

struct Problem {
  const float* x;
  int64_t x_stride;
  int64_t num_rows;
  float* y;
  int64_t y_stride;
  int64_t num_columns;
  int64_t size;  // K
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of w in one panel: a multiple of the tile, small enough for the cache, and an equal share for every thread.
int64_t panel_rows(int64_t num_columns, int64_t size, int num_threads) {
  const int64_t fitting = std::min(kMaxPanelRows, kPanelBytes / (4 * std::max<int64_t>(size, 1)));
  const int64_t share = ceil_div(num_columns, num_threads);
  const int64_t rows = ceil_div(share, ceil_div(share, std::max<int64_t>(fitting, kTileColumns)));
  return ceil_div(rows, kTileColumns) * kTileColumns;
}

float* scratch(int64_t count) {
  thread_local float* buffer = nullptr;
  thread_local int64_t capacity = 0;
  if (capacity < count) {
    free(buffer);buffer=(float*)aligned_alloc(64,(count*4+63)/64*64);
    capacity = count;
  }
  return buffer;
}

void widen_rows(const BFloat16* source, int64_t stride, int64_t num_rows, int64_t size, float* target) {
  for (int64_t n = 0; n < num_rows; ++n) {
    const BFloat16* row = source + n * stride;
    float* out = target + n * size;
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) store(out + k, load(row + k));
    for (; k < size; ++k) out[k] = to_float(row[k]);
  }
}

// All rows of x against columns [begin, end) of y, whose weights are the rows of `panel`.
template <class Weight>
void multiply_panel(const Problem& p, const Weight* panel, int64_t stride, const Weight* bias, int64_t begin,
                    int64_t end, int64_t tile_rows) {
  const float* x[kTileRows];
  const Weight* w[kTileColumns];
  Vector4 tile[kTileRows];
  for (int64_t m = 0; m < p.num_rows; m += tile_rows) {
    const int rows = static_cast<int>(std::min(tile_rows, p.num_rows - m));
    for (int i = 0; i < rows; ++i) x[i] = p.x + (m + i) * p.x_stride;
    for (int64_t n = begin; n < end; n += kTileColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, end - n));
      for (int j = 0; j < kTileColumns; ++j) w[j] = panel + (n - begin + std::min(j, columns - 1)) * stride;
      dot_tile(rows, x, w, p.size, tile);
      for (int i = 0; i < rows; ++i) {
        float* y = p.y + (m + i) * p.y_stride + n;
        if (columns == kTileColumns) std::memcpy(y, &tile[i], sizeof(Vector4));
        else for (int j = 0; j < columns; ++j) y[j] = tile[i][j];
      }
    }
  }
}

template <class Weight>
void linear(const Problem& p, const Weight* w, int64_t w_stride, const Weight* bias, int num_threads) {
  const int64_t rows = panel_rows(p.num_columns, p.size, num_threads);
  const int64_t num_panels = ceil_div(p.num_columns, rows);
  const int64_t tile_rows = ceil_div(p.num_rows, ceil_div(p.num_rows, kTileRows));
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t begin = i * rows, end = std::min(begin + rows, p.num_columns);
    const Weight* panel = w + begin * w_stride;
    if constexpr (std::is_same_v<Weight, BFloat16>) {
      if (p.num_rows > kTileRows) {
        float* widened = scratch(rows * p.size);
        widen_rows(panel, w_stride, end - begin, p.size, widened);
        multiply_panel<float>(p, widened, p.size, nullptr, begin, end, tile_rows);
        continue;
      }
    }
    multiply_panel<Weight>(p, panel, w_stride, nullptr, begin, end, tile_rows);
  }
}

}  // namespace
}  // namespace pilotfish

extern "C" void pilotfish_linear_bf16(const float* x, int64_t x_stride, const pilotfish::BFloat16* w, int64_t w_stride,
                          float* y, int64_t y_stride, int64_t M, int64_t N, int64_t K, int num_threads) {
  pilotfish::linear<pilotfish::BFloat16>({x, x_stride, M, y, y_stride, N, K}, w, w_stride, nullptr, num_threads);
}
extern "C" void pilotfish_linear_f32(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                          float* y, int64_t y_stride, int64_t M, int64_t N, int64_t K, int num_threads) {
  pilotfish::linear<float>({x, x_stride, M, y, y_stride, N, K}, w, w_stride, nullptr, num_threads);
}
