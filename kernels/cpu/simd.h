// One vector type for every machine: 16 float lanes on AVX-512, 8 on AVX2, 4 elsewhere (SSE, NEON).
// Written with the GCC/clang vector extensions, so that one source serves x86 and ARM. Compiled with -ffp-contract=off:
// a product is fused with a sum only where multiply_add says so, never as a compiler sees fit in one place and not in
// another, so that the same row gives the same bits in every loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// An exported function: C names, the only symbols the library shows.
#define EXPORT(result) extern "C" __attribute__((visibility("default"))) result

namespace pilotfish {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVector __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVector __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVector __attribute__((vector_size(kLanes * 2)));
typedef float Vector4 __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline Vector broadcast(float value) { return Vector{} + value; }

// a * b + c, rounded once where the machine can.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Vector load(const float* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

inline Vector widen(HalfVector half) {
#if defined(__AVX512F__)  // GCC 12 splits the generic conversion in two
  const UintVector bits = reinterpret_cast<UintVector>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
#else
  const UintVector bits = __builtin_convertvector(half, UintVector);
#endif
  return reinterpret_cast<Vector>(bits << 16);
}

inline Vector load(const BFloat16* source) {
  HalfVector half;
  std::memcpy(&half, source, sizeof(half));
  return widen(half);
}

// a where the mask is set, else b.
inline Vector select(IntVector mask, Vector a, Vector b) { return mask ? a : b; }

inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

// Stops the compiler from repeating a load as the memory operand of every multiplication that uses the value.
inline Vector in_register(Vector value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#elif defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

inline void store(float* target, Vector value) { std::memcpy(target, &value, sizeof(value)); }

// The first `count` (< kLanes) values; the other lanes are zero and their memory is not touched.
inline Vector load_partial(const float* source, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), source);
#else
  float buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
#endif
}

inline Vector load_partial(const BFloat16* source, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), source);
  return widen(reinterpret_cast<HalfVector>(bits));
#else
  BFloat16 buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return load(buffer);
#endif
}

inline void store_partial(float* target, Vector value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), value);
#else
  float buffer[kLanes];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
#endif
}

template <class Pattern, size_t... Lane>
inline Vector shuffle_lanes(Vector a, Vector b, std::index_sequence<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::index(Lane)...);
#else
  return __builtin_shuffle(a, b, IntVector{Pattern::index(Lane)...});
#endif
}

template <class Pattern>
inline Vector shuffle(Vector a, Vector b) {
  return shuffle_lanes<Pattern>(a, b, std::make_index_sequence<kLanes>{});
}

// Blocks of Size lanes of a and b in turn: the even ones of both, or the odd ones. {a0 b0 a2 b2 ...}, {a1 b1 a3 b3 ...}.
template <int Size>
struct EvenBlocks {
  static constexpr int index(int lane) { return (lane & Size) ? kLanes + lane - Size : lane; }
};
template <int Size>
struct OddBlocks {
  static constexpr int index(int lane) { return EvenBlocks<Size>::index(lane) + Size; }
};

template <int Size>
inline void transpose_step(Vector* rows) {
  if constexpr (Size < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & Size) continue;
      const Vector a = rows[i], b = rows[i + Size];
      rows[i] = shuffle<EvenBlocks<Size>>(a, b);
      rows[i + Size] = shuffle<OddBlocks<Size>>(a, b);
    }
    transpose_step<2 * Size>(rows);
  }
}

// Transposes a square of kLanes vectors in place.
inline void transpose(Vector* rows) { transpose_step<1>(rows); }

// Within each group of four lanes: {a0 b0 a1 b1}, {a2 b2 a3 b3}, {a0 a1 b0 b1}, {a2 a3 b2 b3}.
struct InterleaveLow {
  static constexpr int index(int lane) { return (lane & ~3) + ((lane & 3) >> 1) + (lane & 1) * kLanes; }
};
struct InterleaveHigh {
  static constexpr int index(int lane) { return InterleaveLow::index(lane) + 2; }
};
struct JoinLow {
  static constexpr int index(int lane) { return (lane & ~3) + (lane & 1) + ((lane & 3) >> 1) * kLanes; }
};
struct JoinHigh {
  static constexpr int index(int lane) { return JoinLow::index(lane) + 2; }
};

// The lanes of a and b in turn, of their first or second halves: {a0 b0 a1 b1 ...}.
struct ZipLow {
  static constexpr int index(int lane) { return lane / 2 + (lane & 1) * kLanes; }
};
struct ZipHigh {
  static constexpr int index(int lane) { return ZipLow::index(lane) + kLanes / 2; }
};

inline Vector zip_low(Vector a, Vector b) { return shuffle<ZipLow>(a, b); }
inline Vector zip_high(Vector a, Vector b) { return shuffle<ZipHigh>(a, b); }

// Adds the groups of four lanes together: lane i of the result is the sum of lanes i, i + 4, i + 8, ...
inline Vector4 fold(Vector value) {
#if defined(__AVX512F__)
  const __m256 half = _mm512_castps512_ps256(value) + _mm512_extractf32x8_ps(value, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#else
  Vector4 parts[kLanes / 4];
  std::memcpy(parts, &value, sizeof(value));
  Vector4 sum = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) sum += parts[i];
  return sum;
#endif
}

// The four horizontal sums of four vectors. Every one is added up in the same order of lanes.
inline Vector4 sum4(Vector a, Vector b, Vector c, Vector d) {
  const Vector ab = shuffle<InterleaveLow>(a, b) + shuffle<InterleaveHigh>(a, b);
  const Vector cd = shuffle<InterleaveLow>(c, d) + shuffle<InterleaveHigh>(c, d);
  return fold(shuffle<JoinLow>(ab, cd) + shuffle<JoinHigh>(ab, cd));
}

inline float sum(Vector value) {
  const Vector4 folded = fold(value);
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}

// Whether a comparison holds in any lane.
inline bool any(IntVector mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

inline float largest_lane(Vector value) {
  float result = value[0];
  for (int i = 1; i < kLanes; ++i) result = value[i] > result ? value[i] : result;
  return result;
}

}  // namespace pilotfish
