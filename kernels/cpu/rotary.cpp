// Rotary position embedding in place, half-split convention; kernels/rotary.py has the formula.
#include "parallel.h"
#include "simd.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kBlock = 8;

struct Heads {
  float* base;
  int64_t token_stride, head_stride, count;
};

void rotate(float* low, float* high, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vector a = load(low + i), b = load(high + i), c = load(cos + i), s = load(sin + i);
    store(low + i, a * c - b * s);
    store(high + i, b * c + a * s);
  }
  if (i < half) {
    const int64_t left = half - i;
    const Vector a = load_partial(low + i, left), b = load_partial(high + i, left);
    const Vector c = load_partial(cos + i, left), s = load_partial(sin + i, left);
    store_partial(low + i, a * c - b * s, left);
    store_partial(high + i, b * c + a * s, left);
  }
}

template <class Position>
void apply_rotary(const Heads& q, const Heads& k, const float* cos, int64_t cos_stride, const float* sin,
                  int64_t sin_stride, const Position* positions, int64_t num_tokens, int64_t half,
                  int64_t num_threads) {
  const int64_t threads = threads_for(num_tokens * (q.count + k.count) * half * 2, kElementsPerThread, num_threads);
  share_out_blocks(num_tokens, kBlock, threads, [=](int64_t token) {
    const float* cos_row = cos + positions[token] * cos_stride;
    const float* sin_row = sin + positions[token] * sin_stride;
    for (const Heads& heads : {q, k}) {
      for (int64_t head = 0; head < heads.count; ++head) {
        float* x = heads.base + token * heads.token_stride + head * heads.head_stride;
        rotate(x, x + half, cos_row, sin_row, half);
      }
    }
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_apply_rotary(float* q, int64_t q_token_stride, int64_t q_head_stride, int64_t num_q_heads, float* k,
                       int64_t k_token_stride, int64_t k_head_stride, int64_t num_k_heads, const float* cos,
                       int64_t cos_stride, const float* sin, int64_t sin_stride, const void* positions,
                       int64_t position_bytes, int64_t num_tokens, int64_t half, int64_t num_threads) {
  const pilotfish::Heads q_heads = {q, q_token_stride, q_head_stride, num_q_heads};
  const pilotfish::Heads k_heads = {k, k_token_stride, k_head_stride, num_k_heads};
  if (position_bytes == 4) {
    pilotfish::apply_rotary(q_heads, k_heads, cos, cos_stride, sin, sin_stride,
                            static_cast<const int32_t*>(positions), num_tokens, half, num_threads);
  } else {
    pilotfish::apply_rotary(q_heads, k_heads, cos, cos_stride, sin, sin_stride,
                            static_cast<const int64_t*>(positions), num_tokens, half, num_threads);
  }
}
