// Rows of an embedding table, widened to float32; kernels/embedding.py.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 65536;
constexpr int64_t kBlock = 8;

template <class Weight>
void embedding(const int64_t* ids, int64_t first_id, const Weight* weight, int64_t num_rows, int64_t row_stride, float* x,
               int64_t num_tokens, int64_t size, int64_t num_threads) {
  const int64_t threads = threads_for(num_tokens * size, kElementsPerThread, num_threads);
  share_out_blocks(num_tokens, kBlock, threads, [=](int64_t token) {
    float* out = x + token * size;
    const int64_t index = ids[token] - first_id;
    if (index < 0 || index >= num_rows) {
      std::fill(out, out + size, 0.0f);
      return;
    }
    const Weight* row = weight + index * row_stride;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, load(row + i));
    if (i < size) store_partial(out + i, load_partial(row + i, size - i), size - i);
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_embedding_f32(const int64_t* ids, int64_t first_id, const float* weight, int64_t num_rows, int64_t row_stride, float* x,
                        int64_t num_tokens, int64_t size, int64_t num_threads) {
  pilotfish::embedding(ids, first_id, weight, num_rows, row_stride, x, num_tokens, size, num_threads);
}

EXPORT(void)
pilotfish_embedding_bf16(const int64_t* ids, int64_t first_id, const pilotfish::BFloat16* weight, int64_t num_rows,
                         int64_t row_stride, float* x, int64_t num_tokens, int64_t size, int64_t num_threads) {
  pilotfish::embedding(ids, first_id, weight, num_rows, row_stride, x, num_tokens, size, num_threads);
}
