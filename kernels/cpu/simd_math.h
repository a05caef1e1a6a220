// exp, log and tanh of vectors, with a relative error below 1e-6 (tested through the ops that use them).
#pragma once

#include <limits>

#include "simd.h"

namespace pilotfish {

// a where the mask is set, else b.
inline Vector select(IntVector mask, Vector a, Vector b) { return mask ? a : b; }

inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

// Cody-Waite reduction to |r| <= ln(2) / 2 and a degree-6 Taylor-like polynomial (coefficients: Cephes expf).
// Results below 2^-125 are zero; NaN stays NaN.
inline Vector exp(Vector x) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = x * broadcast(kLog2E) + kRound;
  const Vector n = shifted - kRound;
  Vector r = x - n * broadcast(kLn2High);
  r = r - n * broadcast(kLn2Low);
  Vector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // 2^(n - 1), then twice that: 2^128 does not fit a float.
  const IntVector exponent = reinterpret_cast<IntVector>(shifted) - 0x4b400000 + 126;
  const Vector y = p * reinterpret_cast<Vector>(exponent << 23) * 2.0f;
  const Vector large = select(x > 88.7228f, broadcast(std::numeric_limits<float>::infinity()), y);
  return select(x < -86.6f, Vector{}, large);
}

// x + x^3 P(x^2) near zero (Cephes tanhf), 1 - 2 / (exp(2 |x|) + 1) elsewhere.
inline Vector tanh(Vector x) {
  const Vector square = x * x;
  Vector p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vector near_zero = p * square * x + x;
  const Vector magnitude = select(x < 0.0f, -x, x);
  const Vector far = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  return select(magnitude < 0.625f, near_zero, select(x < 0.0f, -far, far));
}

// Mantissa in [sqrt(1/2), sqrt(2)) and a polynomial in mantissa - 1 (Cephes logf). For positive, normal, finite x.
inline Vector log(Vector x) {
  const IntVector bits = reinterpret_cast<IntVector>(x);
  const IntVector offset = bits - 0x3f3504f3;  // sqrt(1/2)
  const IntVector exponent = offset >> 23;
  const Vector m = reinterpret_cast<Vector>(bits - (exponent << 23)) - 1.0f;
  const Vector e = __builtin_convertvector(exponent, Vector);
  Vector p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vector square = m * m;
  const Vector low = p * (square * m) + e * broadcast(-2.12194440e-4f) - square * 0.5f;
  return low + m + e * broadcast(0.693359375f);
}

// log(1 + x) for x > -1 where 1 + x is normal: the rounding of 1 + x is divided out again.
inline Vector log1p(Vector x) {
  const Vector y = x + 1.0f, rounded = y - 1.0f;
  return select(rounded == 0.0f, x, log(y) * (x / rounded));
}

}  // namespace pilotfish
