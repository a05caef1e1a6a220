// Repetition, presence and frequency penalties on rows of logits, in place; kernels/penalties.py has the rules.
#include "simd.h"

EXPORT(void)
pilotfish_apply_penalties(float* logits, int64_t row_stride, const uint8_t* prompt_mask, int64_t mask_stride,
                          const int32_t* output_counts, int64_t counts_stride, const int64_t* table_rows,
                          const float* repetition, const float* presence, const float* frequency, int64_t num_rows,
                          int64_t size, int64_t num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_rows > 1)
  for (int64_t row = 0; row < num_rows; ++row) {
    if (table_rows[row] < 0) continue;
    float* values = logits + row * row_stride;
    const uint8_t* in_prompt = prompt_mask + table_rows[row] * mask_stride;
    const int32_t* counts = output_counts + table_rows[row] * counts_stride;
    const float repeated = repetition[row], present = presence[row], frequent = frequency[row];
    for (int64_t token = 0; token < size; ++token) {
      const float logit = values[token];
      const bool generated = counts[token] > 0;
      const float scaled = logit > 0 ? logit / repeated : logit * repeated;
      const float repeated_logit = generated | (in_prompt[token] != 0) ? scaled : logit;
      const float penalty = present + frequent * static_cast<float>(counts[token]);
      values[token] = generated ? repeated_logit - penalty : repeated_logit;
    }
  }
}
