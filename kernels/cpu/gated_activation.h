// y = activation(gate) * up for one row; kernels/gated_activation.py has the formulas.
#pragma once

#include "simd_math.h"

namespace pilotfish {

enum class Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

inline Vector activate(Vector gate, Activation activation) {
  if (activation == Activation::kSilu) return gate / (exp(-gate) + 1.0f);
  // g / 2 * (1 + tanh(u)) = g / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (g + 0.044715 g^3)
  constexpr float kMinus2Root = -1.5957691216057308f;
  const Vector exponent = (gate + gate * gate * gate * broadcast(0.044715f)) * kMinus2Root;
  return gate / (exp(exponent) + 1.0f);
}

inline void gated_activation_row(const float* gate, const float* up, Activation activation, float* y, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(y + i, activate(load(gate + i), activation) * load(up + i));
  if (i < size) {
    const int64_t left = size - i;
    const Vector value = activate(load_partial(gate + i, left), activation) * load_partial(up + i, left);
    store_partial(y + i, value, left);
  }
}

}  // namespace pilotfish
