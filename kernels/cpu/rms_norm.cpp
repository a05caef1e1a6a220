// Root-mean-square norm of rows, with an optional residual added first; kernels/rms_norm.py has the formula.
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kBlock = 8;

// Calls f(offset, count) for each vector of a row; count is kLanes but for the last one.
template <class F>
inline void for_each_vector(int64_t size, F f) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, static_cast<int64_t>(kLanes));
  if (i < size) f(i, size - i);
}

template <class T>
inline Vector load_up_to(const T* source, int64_t count) {
  return count == kLanes ? load(source) : load_partial(source, count);
}

inline void store_up_to(float* target, Vector value, int64_t count) {
  count == kLanes ? store(target, value) : store_partial(target, value, count);
}

// y = x * scale * weight; where there is a residual, x + residual goes to new_residual first and is what is normed.
template <class Weight>
void norm_row(const float* x, const float* residual, const Weight* weight, float eps, float* y, float* new_residual,
              int64_t size) {
  Vector squares = {};
  const float* normed = residual == nullptr ? x : new_residual;
  for_each_vector(size, [&](int64_t i, int64_t count) {
    Vector value = load_up_to(x + i, count);
    if (residual != nullptr) {
      value += load_up_to(residual + i, count);
      store_up_to(new_residual + i, value, count);
    }
    squares = multiply_add(value, value, squares);
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for_each_vector(size, [&](int64_t i, int64_t count) {
    store_up_to(y + i, load_up_to(normed + i, count) * scale * load_up_to(weight + i, count), count);
  });
}

// Row (outer, inner) of x lies at outer * outer_stride + inner * inner_stride; y and new_residual are contiguous.
template <class Weight>
void rms_norm(const float* x, int64_t num_outer, int64_t outer_stride, int64_t num_inner, int64_t inner_stride,
              const float* residual, int64_t residual_stride, const Weight* weight, float eps, float* y,
              float* new_residual, int64_t size, int64_t num_threads) {
  const int64_t num_rows = num_outer * num_inner;
  share_out_blocks(num_rows, kBlock, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    const float* source = x + row / num_inner * outer_stride + row % num_inner * inner_stride;
    const float* added = residual == nullptr ? nullptr : residual + row * residual_stride;
    float* sum_row = residual == nullptr ? nullptr : new_residual + row * size;
    norm_row(source, added, weight, eps, y + row * size, sum_row, size);
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_rms_norm_f32(const float* x, int64_t num_outer, int64_t outer_stride, int64_t num_inner, int64_t inner_stride,
                       const float* residual, int64_t residual_stride, const float* weight, float eps, float* y,
                       float* new_residual, int64_t size, int64_t num_threads) {
  pilotfish::rms_norm(x, num_outer, outer_stride, num_inner, inner_stride, residual, residual_stride, weight, eps, y,
                      new_residual, size, num_threads);
}

EXPORT(void)
pilotfish_rms_norm_bf16(const float* x, int64_t num_outer, int64_t outer_stride, int64_t num_inner,
                        int64_t inner_stride, const float* residual, int64_t residual_stride,
                        const pilotfish::BFloat16* weight, float eps, float* y, float* new_residual, int64_t size,
                        int64_t num_threads) {
  pilotfish::rms_norm(x, num_outer, outer_stride, num_inner, inner_stride, residual, residual_stride, weight, eps, y,
                      new_residual, size, num_threads);
}
