// Sharing work between threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace pilotfish {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many threads a small op deserves: one for every `grain` units of work, since waking a thread costs microseconds.
inline int threads_for(int64_t work, int64_t grain, int64_t num_threads) {
  return static_cast<int>(std::clamp<int64_t>(work / grain, 1, num_threads));
}

// Calls f(i) once for every i in [0, count). A thread walks through a range of its own in order, so that what it reads
// follows on in memory; when it is done it helps with what others have left.
template <class F>
void share_out(int64_t count, int64_t num_threads, F f) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t share = ceil_div(count, num_threads);
  std::vector<Range> ranges(num_threads);
  for (int64_t i = 0; i < num_threads; ++i) {
    ranges[i].next = std::min(i * share, count);
    ranges[i].end = std::min((i + 1) * share, count);
  }
#pragma omp parallel num_threads(num_threads)
  for (int64_t i = 0; i < num_threads; ++i) {
    Range& range = ranges[(omp_get_thread_num() + i) % num_threads];
    for (int64_t item = range.next++; item < range.end; item = range.next++) f(item);
  }
}

}  // namespace pilotfish
