// The threshold on a row's logits that top-k, top-p and min-p set; kernels/sampling_filter.py has the rules.
//
// No sort of the vocabulary: logits are counted into buckets between the largest and the smallest, with their probability
// mass. Only the bucket in which the count reaches k, or the mass top_p, has its members sorted.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "simd_math.h"

namespace pilotfish {

struct Filter {
  float temperature;
  int64_t top_k;  // <= 0: off
  float top_p;    // >= 1: off
  float min_p;    // <= 0: off

  bool keeps_all() const { return temperature <= 0 || (top_k <= 0 && !(top_p < 1) && !(min_p > 0)); }
};

inline float largest_of(const float* values, int64_t size) {
  Vector lanes = broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) lanes = max(load(values + i), lanes);
  float result = largest_lane(lanes);
  for (; i < size; ++i) result = std::max(result, values[i]);
  return result;
}

// Logits from the largest (finite) down to the smallest finite one, in buckets of equal width; -inf falls into the last,
// and so does NaN, which counts as -inf.
class LogitBuckets {
 public:
  LogitBuckets(const float* logits, int64_t size, float temperature)
      : logits_(logits), size_(size), largest_(largest_of(logits, size)) {
    temperature_ = std::max(temperature, std::numeric_limits<float>::min());
    const float smallest = smallest_finite();
    scale_ = largest_ > smallest ? (kNumBuckets - 1) / (largest_ - smallest) : 0;
    count_all();
  }

  float largest() const { return largest_; }

  double total_mass() const {
    double total = 0;
    for (const double mass : masses_) total += mass;
    return total;
  }

  // The rank-th largest logit, and the mass of all logits at or above it.
  float value_of_rank(int64_t rank, double* mass) const {
    int bucket = 0;
    *mass = 0;
    for (; rank > counts_[bucket]; ++bucket) {
      rank -= counts_[bucket];
      *mass += masses_[bucket];
    }
    const std::vector<float> values = sorted_members(bucket);
    const float threshold = values[rank - 1];
    for (const float value : values) *mass += value >= threshold ? mass_of(value) : 0;
    return threshold;
  }

  // The smallest logit such that less than `mass` lies strictly above it; the largest logit if there is none.
  float value_below_mass(double mass) const {
    double above = 0;
    for (int bucket = 0; bucket < kNumBuckets; ++bucket) {
      if (above + masses_[bucket] < mass) {
        above += masses_[bucket];
        continue;
      }
      const std::vector<float> values = sorted_members(bucket);
      float threshold = values[0];  // `above` was still less than `mass`, or this is the largest logit
      for (const float value : values) {
        if (value < threshold && above >= mass) break;
        threshold = value;
        above += mass_of(value);
      }
      return threshold;
    }
    return -std::numeric_limits<float>::infinity();
  }

 private:
  static constexpr int kNumBuckets = 2048;

  float smallest_finite() const {
    const Vector lowest = broadcast(std::numeric_limits<float>::lowest());
    Vector smallest = broadcast(largest_);
    int64_t i = 0;
    for (; i + kLanes <= size_; i += kLanes) {
      const Vector logits = load(logits_ + i);
      smallest = select((logits >= lowest) & (logits < smallest), logits, smallest);
    }
    float result = -largest_lane(-smallest);
    for (; i < size_; ++i) result = logits_[i] >= lowest[0] && logits_[i] < result ? logits_[i] : result;
    return result;
  }

  float mass_of(float logit) const { return exp(broadcast((logit - largest_) / temperature_))[0]; }

  // Calls f(vector of logits, of their buckets, number of lanes). The bucket never falls as logits fall.
  template <class F>
  void for_each_vector(F f) const {
    const Vector last = broadcast(kNumBuckets - 1);
    for (int64_t i = 0; i < size_; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, size_ - i));
      const Vector read = count == kLanes ? load(logits_ + i) : load_partial(logits_ + i, count);
      const Vector logits = select(read == read, read, broadcast(-std::numeric_limits<float>::infinity()));
      const Vector place = (largest_ - logits) * scale_;
      f(logits, __builtin_convertvector(place < last ? place : last, IntVector), count);
    }
  }

  void count_all() {
    for_each_vector([this](Vector logits, IntVector buckets, int count) {
      float masses[kLanes];
      int32_t places[kLanes];
      store(masses, exp((logits - largest_) / temperature_));
      std::memcpy(places, &buckets, sizeof(buckets));
      for (int lane = 0; lane < count; ++lane) {
        ++counts_[places[lane]];
        masses_[places[lane]] += masses[lane];
      }
    });
  }

  std::vector<float> sorted_members(int bucket) const {
    std::vector<float> values;
    values.reserve(counts_[bucket]);
    for_each_vector([&](Vector logits, IntVector buckets, int count) {
      if (!any(buckets == bucket)) return;
      for (int lane = 0; lane < count; ++lane) {
        if (buckets[lane] == bucket) values.push_back(logits[lane]);
      }
    });
    std::sort(values.begin(), values.end(), std::greater<float>());
    return values;
  }

  const float* logits_;
  int64_t size_;
  float largest_, temperature_, scale_;
  std::vector<int64_t> counts_ = std::vector<int64_t>(kNumBuckets);
  std::vector<double> masses_ = std::vector<double>(kNumBuckets);
};

// The smallest float whose probability is at least min_p times the largest.
inline float min_p_threshold(float largest, float temperature, float min_p) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const double limit = std::log(static_cast<double>(min_p)), wide_temperature = temperature;
  const auto passes = [=](float logit) { return (static_cast<double>(logit) - largest) / wide_temperature >= limit; };
  float threshold = static_cast<float>(largest + wide_temperature * limit);
  while (passes(threshold) && std::isfinite(threshold)) threshold = std::nextafter(threshold, -kInfinity);
  while (!passes(threshold) && threshold < largest) threshold = std::nextafter(threshold, kInfinity);
  return std::min(threshold, largest);
}

// Tokens with logit >= the result are kept.
inline float keep_threshold(const float* logits, int64_t size, const Filter& filter) {
  if (filter.keeps_all()) return -std::numeric_limits<float>::infinity();
  const LogitBuckets buckets(logits, size, filter.temperature);
  if (!std::isfinite(buckets.largest())) return buckets.largest();  // a broken row: there are no probabilities
  float threshold = -std::numeric_limits<float>::infinity();
  double kept_mass = 0;
  if (filter.top_k > 0 && filter.top_k < size) {
    threshold = buckets.value_of_rank(filter.top_k, &kept_mass);
  } else {
    kept_mass = buckets.total_mass();
  }
  if (filter.top_p < 1) threshold = std::max(threshold, buckets.value_below_mass(filter.top_p * kept_mass));
  if (filter.min_p > 0) {
    threshold = std::max(threshold, min_p_threshold(buckets.largest(), filter.temperature, filter.min_p));
  }
  return threshold;
}

}  // namespace pilotfish
