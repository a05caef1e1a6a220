// Writes new keys and values into their pages of the cache; kernels/store_kv.py has the rule.
#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 32768;
constexpr int64_t kBlock = 8;

struct Source {
  const float* base;
  int64_t token_stride, head_stride;
};

struct Cache {
  float* base;
  int64_t block_stride, slot_stride, head_stride;
};

void store_token(const Source& source, const Cache& cache, int64_t token, int64_t block, int64_t slot,
                 int64_t num_heads, int64_t head_dim) {
  const float* from = source.base + token * source.token_stride;
  float* to = cache.base + block * cache.block_stride + slot * cache.slot_stride;
  for (int64_t head = 0; head < num_heads; ++head) {
    std::memcpy(to + head * cache.head_stride, from + head * source.head_stride, head_dim * sizeof(float));
  }
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_store_kv(const float* k, int64_t k_token_stride, int64_t k_head_stride, const float* v,
                   int64_t v_token_stride, int64_t v_head_stride, float* k_cache, int64_t k_block_stride,
                   int64_t k_slot_stride, int64_t k_cache_head_stride, float* v_cache, int64_t v_block_stride,
                   int64_t v_slot_stride, int64_t v_cache_head_stride, const int64_t* slots, int64_t num_tokens,
                   int64_t page_len, int64_t num_heads, int64_t head_dim, int64_t value_dim, int64_t num_threads) {
  using namespace pilotfish;
  const Source k_source = {k, k_token_stride, k_head_stride}, v_source = {v, v_token_stride, v_head_stride};
  const Cache k_target = {k_cache, k_block_stride, k_slot_stride, k_cache_head_stride};
  const Cache v_target = {v_cache, v_block_stride, v_slot_stride, v_cache_head_stride};
  const int64_t threads = threads_for(num_tokens * num_heads * (head_dim + value_dim), kElementsPerThread, num_threads);
  share_out_blocks(num_tokens, kBlock, threads, [=](int64_t token) {
    if (slots[token] < 0) return;
    const int64_t block = slots[token] / page_len, slot = slots[token] % page_len;
    store_token(k_source, k_target, token, block, slot, num_heads, head_dim);
    store_token(v_source, v_target, token, block, slot, num_heads, value_dim);
  });
}
