// exp, log and tanh of vectors, with a relative error below 1e-6 (tested through the ops that use them).
#pragma once

#include <limits>

#include "simd.h"

namespace pilotfish {

// Horner's scheme: the polynomial with these coefficients, highest power first.
inline Vector polynomial(Vector, Vector value) { return value; }

template <class... Rest>
inline Vector polynomial(Vector x, Vector value, float next, Rest... rest) {
  return polynomial(x, multiply_add(value, x, broadcast(next)), rest...);
}

// Cody-Waite reduction to |r| <= ln(2) / 2 and a degree-6 Taylor-like polynomial (coefficients: Cephes expf).
// Results below 2^-125 are zero; NaN stays NaN.
inline Vector exp(Vector x) {
  constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector shifted = multiply_add(x, broadcast(kLog2E), broadcast(kRound));
  const Vector n = shifted - kRound;
  const Vector r = multiply_add(n, broadcast(-kLn2Low), multiply_add(n, broadcast(-kLn2High), x));
  Vector p = polynomial(r, broadcast(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                        1.6666665459e-1f, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1.0f);
  // 2^(n - 1), then twice that: 2^128 does not fit a float.
  const IntVector exponent = reinterpret_cast<IntVector>(shifted) - 0x4b400000 + 126;
  const Vector y = p * reinterpret_cast<Vector>(exponent << 23) * 2.0f;
  const Vector large = select(x > 88.7228f, broadcast(std::numeric_limits<float>::infinity()), y);
  return select(x < -86.6f, Vector{}, large);
}

// x + x^3 P(x^2) near zero (Cephes tanhf), 1 - 2 / (exp(2 |x|) + 1) elsewhere.
inline Vector tanh(Vector x) {
  const Vector square = x * x;
  const Vector p = polynomial(square, broadcast(-5.70498872745e-3f), 2.06390887954e-2f, -5.37397155531e-2f,
                              1.33314422036e-1f, -3.33332819422e-1f);
  const Vector near_zero = multiply_add(p * square, x, x);
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
  const Vector p = polynomial(m, broadcast(7.0376836292e-2f), -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                              1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                              3.3333331174e-1f);
  const Vector square = m * m;
  const Vector correction = multiply_add(e, broadcast(-2.12194440e-4f), square * -0.5f);
  const Vector low = multiply_add(p, square * m, correction);
  return multiply_add(e, broadcast(0.693359375f), low + m);
}

// log(1 + x) for x > -1 where 1 + x is normal: the rounding of 1 + x is divided out again.
inline Vector log1p(Vector x) {
  const Vector y = x + 1.0f, rounded = y - 1.0f;
  return select(rounded == 0.0f, x, log(y) * (x / rounded));
}

}  // namespace pilotfish
