// Draws one token a row: the argmax of logit + temperature * Gumbel noise over the kept tokens; kernels/sampling.py has
// the formula. Blocks of tokens whose best logit could not win with the largest noise there is draw no numbers.
#include "keep_threshold.h"
#include "parallel.h"
#include "philox.h"

namespace pilotfish {
namespace {

constexpr int64_t kElementsPerThread = 1 << 17;

constexpr int kBlock = 4 * kLanes;         // tokens whose numbers come from one call of Philox
constexpr float kLargestNoise = 22.88f;    // -log(-log(1 - u)) of the smallest u, 2^-33, is 22.874

struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int64_t token = 0;

  // Tokens come in rising order: of equal scores the first stays.
  void offer(float candidate, int64_t candidate_token) {
    if (candidate > score) score = candidate, token = candidate_token;
  }
};

// The largest logit and its token, the lowest of equals.
Best greedy(const float* logits, int64_t size) {
  Vector largest = broadcast(-std::numeric_limits<float>::infinity());
  IntVector tokens = {}, current = {};
  for (int lane = 0; lane < kLanes; ++lane) current[lane] = lane;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes, current += kLanes) {
    const Vector values = load(logits + i);
    const IntVector larger = values > largest;
    largest = select(larger, values, largest);
    tokens = larger ? current : tokens;
  }
  Best best;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (largest[lane] == best.score && tokens[lane] < best.token) best.token = tokens[lane];
    best.offer(largest[lane], tokens[lane]);
  }
  for (; i < size; ++i) best.offer(logits[i], i);
  return best;
}

Vector gumbel(Vector u) { return -log(-log1p(-u)); }

// Vectors of one block, -inf beyond the end of the row.
void load_block(const float* logits, int64_t count, Vector* block) {
  for (int i = 0; i < 4; ++i) {
    const int64_t left = count - i * kLanes;
    if (left >= kLanes) {
      block[i] = load(logits + i * kLanes);
      continue;
    }
    block[i] = broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t lane = 0; lane < left; ++lane) block[i][lane] = logits[i * kLanes + lane];
  }
}

// The logits are of the tokens from first_token on, a multiple of 4; the best one's token is counted from there.
Best race(const float* logits, int64_t size, float temperature, float threshold, const Philox& philox, int64_t first_token) {
  Best best;
  for (int64_t first = 0; first < size; first += kBlock) {
    Vector block[4], u[4];
    load_block(logits + first, size - first, block);
    const float hope = best.score - temperature * kLargestNoise;
    const Vector largest = max(max(block[0], block[1]), max(block[2], block[3]));
    if (!any((largest > hope) & (largest >= threshold))) continue;
    philox.uniforms(first_token + first, u);
    for (int i = 0; i < 4; ++i) {
      const Vector scores = block[i] + gumbel(u[i]) * temperature;
      const Vector kept = select(block[i] >= threshold, scores, broadcast(-std::numeric_limits<float>::infinity()));
      if (!any(kept > best.score)) continue;
      for (int lane = 0; lane < kLanes; ++lane) best.offer(kept[lane], first + i * kLanes + lane);
    }
  }
  return best;
}

}  // namespace
}  // namespace pilotfish

EXPORT(void)
pilotfish_sample(const float* logits, int64_t row_stride, const float* temperature, const int32_t* top_k,
                 const float* top_p, const float* min_p, const int64_t* seeds, const int64_t* positions,
                 int64_t* tokens, int64_t num_rows, int64_t size, int64_t num_threads) {
  using namespace pilotfish;
  share_out(num_rows, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    const float* row_logits = logits + row * row_stride;
    if (temperature[row] <= 0) {
      tokens[row] = greedy(row_logits, size).token;
      return;
    }
    const float threshold = keep_threshold(row_logits, size, {temperature[row], top_k[row], top_p[row], min_p[row]});
    const Philox philox = {static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(positions[row])};
    tokens[row] = race(row_logits, size, temperature[row], threshold, philox, 0).token;
  });
}

// The same without filters over a shard of the vocabulary; tokens count from its first one.
EXPORT(void)
pilotfish_race(const float* logits, int64_t row_stride, const float* temperature, const int64_t* seeds,
               const int64_t* positions, float* scores, int64_t* tokens, int64_t num_rows, int64_t size,
               int64_t first_token, int64_t num_threads) {
  using namespace pilotfish;
  share_out(num_rows, threads_for(num_rows * size, kElementsPerThread, num_threads), [=](int64_t row) {
    const float* row_logits = logits + row * row_stride;
    const float no_threshold = -std::numeric_limits<float>::infinity();
    const Philox philox = {static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(positions[row])};
    const Best best = temperature[row] <= 0
                          ? greedy(row_logits, size)
                          : race(row_logits, size, temperature[row], no_threshold, philox, first_token);
    scores[row] = best.score, tokens[row] = best.token;
  });
}
