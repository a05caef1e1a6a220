// Philox4x32-10 for kLanes counters at a time, and the uniform numbers of kernels/philox.py, bit for bit.
#pragma once

#include "simd.h"

namespace pilotfish {

// The high and low halves of the 64-bit products.
inline void multiply_wide(UintVector a, uint32_t factor, UintVector* high, UintVector* low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  *high = reinterpret_cast<UintVector>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
  *low = reinterpret_cast<UintVector>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
#else
  typedef uint64_t WideVector __attribute__((vector_size(kLanes * 8)));
  const WideVector product = __builtin_convertvector(a, WideVector) * static_cast<uint64_t>(factor);
  *high = __builtin_convertvector(product >> 32, UintVector);
  *low = __builtin_convertvector(product, UintVector);
#endif
}

struct Philox {
  uint64_t key;       // the seed
  uint64_t position;  // counter words 1 and 2; word 3 is zero

  // words[i]: word i of the blocks whose first counter words are `counters`.
  void words(UintVector counters, UintVector* words) const {
    UintVector c0 = counters, c1 = UintVector{} + static_cast<uint32_t>(position);
    UintVector c2 = UintVector{} + static_cast<uint32_t>(position >> 32), c3 = {};
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      UintVector high0, low0, high1, low1;
      multiply_wide(c0, 0xD2511F53u, &high0, &low0);
      multiply_wide(c2, 0xCD9E8D57u, &high1, &low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }

  // The uniform numbers of draws [first, first + 4 kLanes), first a multiple of 4.
  void uniforms(int64_t first, Vector* u) const {
    UintVector counters;
    for (int lane = 0; lane < kLanes; ++lane) counters[lane] = static_cast<uint32_t>(first / 4 + lane);
    UintVector w[4];
    words(counters, w);
    Vector v[4];
    for (int i = 0; i < 4; ++i) {
      const Vector value = (__builtin_convertvector(w[i], Vector) + 0.5f) * 0x1p-32f;
      const float largest = 1.0f - 0x1p-24f;
      v[i] = value > largest ? broadcast(largest) : value;
    }
    // Draw 4 c + i is word i of counter c: interleave the four.
    const Vector even_low = zip_low(v[0], v[2]), even_high = zip_high(v[0], v[2]);
    const Vector odd_low = zip_low(v[1], v[3]), odd_high = zip_high(v[1], v[3]);
    u[0] = zip_low(even_low, odd_low), u[1] = zip_high(even_low, odd_low);
    u[2] = zip_low(even_high, odd_high), u[3] = zip_high(even_high, odd_high);
  }
};

}  // namespace pilotfish
