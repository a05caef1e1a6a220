// Log-probabilities of a chosen token and of a row's likeliest ones, and the chosen one's rank; kernels/logprobs.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "keep_threshold.h"
#include "parallel.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;

struct Candidate {
  float logit;
  int64_t token;
};

// The log of the sum of exponentials. Sums over lanes are short; the few lane sums are added in double.
float log_sum_exp(const float* logits, int64_t size) {
  const float largest = largest_of(logits, size);
  constexpr int64_t kBlock = 256 * kLanes;
  double total = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t end = std::min(start + kBlock, size);
    Vector sums = {};
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) sums += exp(load(logits + i) - largest);
    total += sum(sums);
    for (; i < end; ++i) total += std::exp(static_cast<double>(logits[i]) - largest);
  }
  return static_cast<float>(largest + std::log(total));
}

// The num_top largest logits, largest first; of equals the lowest token. Few tokens pass the smallest one held so far.
std::vector<Candidate> likeliest(const float* logits, int64_t size, int64_t num_top) {
  std::vector<Candidate> held;
  if (num_top == 0) return held;
  const auto offer = [&](float logit, int64_t token) {
    const auto place = std::upper_bound(held.begin(), held.end(), logit,
                                        [](float value, const Candidate& c) { return value > c.logit; });
    held.insert(place, {logit, token});
    if (static_cast<int64_t>(held.size()) > num_top) held.pop_back();
  };
  for (int64_t i = 0; i < size; i += kLanes) {
    const bool full = static_cast<int64_t>(held.size()) == num_top;
    if (full && i + kLanes <= size && !any(load(logits + i) > held.back().logit)) continue;
    for (int64_t token = i; token < std::min<int64_t>(i + kLanes, size); ++token) {
      if (static_cast<int64_t>(held.size()) < num_top || logits[token] > held.back().logit) offer(logits[token], token);
    }
  }
  return held;
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_gather_logprobs(const float* logits, int64_t row_stride, const int64_t* tokens, float* logprobs,
                          int64_t* top_tokens, float* top_logprobs, int64_t* ranks, int64_t num_rows, int64_t size,
                          int64_t num_top, int64_t num_threads) {
  using namespace pilotfish;
  share_out(num_rows, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    const float* values = logits + row * row_stride;
    const float total = log_sum_exp(values, size), chosen = values[tokens[row]];
    int64_t rank = 1;
    for (int64_t token = 0; token < size; ++token) rank += values[token] > chosen;
    logprobs[row] = chosen - total;
    ranks[row] = rank;
    const std::vector<Candidate> top = likeliest(values, size, num_top);
    for (int64_t i = 0; i < num_top; ++i) {
      top_tokens[row * num_top + i] = top[i].token;
      top_logprobs[row * num_top + i] = top[i].logit - total;
    }
  });
}
