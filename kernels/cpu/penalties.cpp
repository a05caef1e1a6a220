// Repetition, presence and frequency penalties on rows of logits, in place; kernels/penalties.py has the rules.
#include "parallel.h"
#include "simd_math.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;

typedef uint8_t ByteVector __attribute__((vector_size(kLanes)));

struct Penalties {
  float repetition, presence, frequency;
};

template <class V, class T>
V load_as(const T* source) {
  V result;
  std::memcpy(&result, source, sizeof(result));
  return result;
}

void penalize_vector(float* logits, const uint8_t* in_prompt, const int32_t* counts, const Penalties& p) {
  const Vector logit = load(logits);
  const IntVector count = load_as<IntVector>(counts);
  const IntVector prompted = __builtin_convertvector(load_as<ByteVector>(in_prompt), IntVector);
  const Vector repeated = select(logit > 0.0f, logit / p.repetition, logit * p.repetition);
  const Vector scaled = select((count | prompted) > 0, repeated, logit);
  const Vector penalized = scaled - p.presence - __builtin_convertvector(count, Vector) * p.frequency;
  store(logits, select(count > 0, penalized, scaled));
}

void penalize_row(float* logits, const uint8_t* in_prompt, const int32_t* counts, const Penalties& p, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) penalize_vector(logits + i, in_prompt + i, counts + i, p);
  if (i == size) return;
  float last_logits[kLanes] = {};
  uint8_t last_in_prompt[kLanes] = {};
  int32_t last_counts[kLanes] = {};
  std::memcpy(last_logits, logits + i, (size - i) * sizeof(float));
  std::memcpy(last_in_prompt, in_prompt + i, size - i);
  std::memcpy(last_counts, counts + i, (size - i) * sizeof(int32_t));
  penalize_vector(last_logits, last_in_prompt, last_counts, p);
  std::memcpy(logits + i, last_logits, (size - i) * sizeof(float));
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_apply_penalties(float* logits, int64_t row_stride, const uint8_t* prompt_mask, int64_t mask_stride,
                          const int32_t* output_counts, int64_t counts_stride, const int64_t* table_rows,
                          const float* repetition, const float* presence, const float* frequency, int64_t num_rows,
                          int64_t size, int64_t num_threads) {
  using namespace pilotfish;
  share_out(num_rows, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    if (table_rows[row] < 0) return;
    penalize_row(logits + row * row_stride, prompt_mask + table_rows[row] * mask_stride,
                 output_counts + table_rows[row] * counts_stride, {repetition[row], presence[row], frequency[row]},
                 size);
  });
}
