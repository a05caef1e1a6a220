// Each token's top_k experts and their weights; kernels/moe_routing.py has the formula.
#include <vector>

#include "parallel.h"
#include "simd_math.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kBlock = 8;

void route(const float* logits, int64_t num_experts, int64_t top_k, bool renormalize, float* weights, int32_t* experts) {
  thread_local std::vector<bool> taken;
  taken.assign(num_experts, false);
  for (int64_t choice = 0; choice < top_k; ++choice) {
    int64_t best = -1;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      if (!taken[expert] && (best < 0 || logits[expert] > logits[best])) best = expert;
    }
    taken[best] = true;
    experts[choice] = static_cast<int32_t>(best);
  }
  const float largest = logits[experts[0]];
  double total = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) total += exp(broadcast(logits[expert] - largest))[0];
  double kept = 0;
  for (int64_t choice = 0; choice < top_k; ++choice) {
    weights[choice] = static_cast<float>(exp(broadcast(logits[experts[choice]] - largest))[0] / total);
    kept += weights[choice];
  }
  if (!renormalize) return;
  for (int64_t choice = 0; choice < top_k; ++choice) weights[choice] = static_cast<float>(weights[choice] / kept);
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_route_tokens(const float* logits, int64_t row_stride, float* weights, int32_t* experts, int64_t num_tokens,
                       int64_t num_experts, int64_t top_k, int64_t renormalize, int64_t num_threads) {
  using namespace pilotfish;
  const int64_t threads = threads_for(num_tokens * num_experts * top_k, kElementsPerThread, num_threads);
  share_out_blocks(num_tokens, kBlock, threads, [=](int64_t token) {
    route(logits + token * row_stride, num_experts, top_k, renormalize != 0, weights + token * top_k,
          experts + token * top_k);
  });
}
