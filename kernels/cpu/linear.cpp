// y_MN = x_MK @ w_NK^T + bias_N. x and y are float32, w and bias bfloat16 or float32, sums are kept in float32.
#include "panel.h"

namespace pilotfish {
namespace {

template <class Weight>
void linear(const float* x, int64_t x_stride, const Matrix<Weight>& w, const Weight* bias, float* y, int64_t y_stride,
            int64_t num_rows, int64_t num_threads) {
  if (num_rows == 0 || w.num_rows == 0) return;
  const int64_t rows = panel_rows(w, num_threads), num_panels = ceil_div(w.num_rows, rows);
  share_out(num_panels, num_threads, [&](int64_t i) {
    multiply_panel(
        w, bias, i * rows, std::min((i + 1) * rows, w.num_rows), num_rows, [=](int64_t m) { return x + m * x_stride; },
        [=](int64_t m) { return y + m * y_stride; });
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_linear_bf16(const float* x, int64_t x_stride, const pilotfish::BFloat16* w, int64_t w_stride,
                      const pilotfish::BFloat16* bias, float* y, int64_t y_stride, int64_t num_rows,
                      int64_t num_columns, int64_t size, int64_t num_threads) {
  pilotfish::linear<pilotfish::BFloat16>(x, x_stride, {w, w_stride, num_columns, size}, bias, y, y_stride, num_rows,
                                         num_threads);
}

EXPORT(void)
pilotfish_linear_f32(const float* x, int64_t x_stride, const float* w, int64_t w_stride, const float* bias, float* y,
                     int64_t y_stride, int64_t num_rows, int64_t num_columns, int64_t size, int64_t num_threads) {
  pilotfish::linear<float>(x, x_stride, {w, w_stride, num_columns, size}, bias, y, y_stride, num_rows, num_threads);
}
