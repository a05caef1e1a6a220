// Rows of an embedding table, widened to float32; kernels/embedding.py.
#include "parallel.h"
#include "simd.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 65536;
constexpr int64_t kBlock = 8;

template <class Weight>
void embedding(const int64_t* ids, const Weight* weight, int64_t row_stride, float* x, int64_t num_tokens, int64_t size,
               int64_t num_threads) {
  const int64_t threads = threads_for(num_tokens * size, kElementsPerThread, num_threads);
  share_out_blocks(num_tokens, kBlock, threads, [=](int64_t token) {
    const Weight* row = weight + ids[token] * row_stride;
    float* out = x + token * size;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, load(row + i));
    if (i < size) store_partial(out + i, load_partial(row + i, size - i), size - i);
  });
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_embedding_f32(const int64_t* ids, const float* weight, int64_t row_stride, float* x, int64_t num_tokens,
                        int64_t size, int64_t num_threads) {
  pilotfish::embedding(ids, weight, row_stride, x, num_tokens, size, num_threads);
}

EXPORT(void)
pilotfish_embedding_bf16(const int64_t* ids, const pilotfish::BFloat16* weight, int64_t row_stride, float* x,
                         int64_t num_tokens, int64_t size, int64_t num_threads) {
  pilotfish::embedding(ids, weight, row_stride, x, num_tokens, size, num_threads);
}
