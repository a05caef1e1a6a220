// Sharing work between threads.
//
// Not OpenMP: there every parallel loop ends with all threads at a barrier, and on a machine that also runs other programs
// (a gateway, a second replica) each of a model's hundreds of loops a step waits until the scheduler has given every thread a
// turn. Here the calling thread can do all the work alone; helpers that happen to be awake take parts of it, and nothing
// waits for one that is not.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace pilotfish {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many threads an op deserves: one for every `grain` units of work, since waking a thread costs microseconds.
inline int64_t threads_for(int64_t work, int64_t grain, int64_t num_threads) {
  return std::clamp<int64_t>(work / grain, 1, num_threads);
}

// Calls body(context, 0) on this thread and body(context, i) on those helpers i < num_threads that come in time; returns when
// all calls have. The body of any one thread must see to it that all the work gets done. Where another thread of the
// program is in here, the caller works alone.
using Body = void (*)(void* context, int64_t thread);
void run_with_helpers(int64_t num_threads, Body body, void* context);

// Calls f(i) once for every i in [0, count), in any order. A thread walks through a range of its own in order, so that what
// it reads follows on in memory; when it is done it takes what is left of others' ranges.
template <class F>
void share_out(int64_t count, int64_t num_threads, F f) {
  if (num_threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Work {
    std::vector<Range> ranges;
    F& f;
  };
  num_threads = std::min(num_threads, count);
  Work work = {std::vector<Range>(num_threads), f};
  for (int64_t i = 0; i < num_threads; ++i) {
    work.ranges[i].next = count * i / num_threads;
    work.ranges[i].end = count * (i + 1) / num_threads;
  }
  const Body body = [](void* context, int64_t thread) {
    auto& [ranges, f] = *static_cast<Work*>(context);
    const int64_t num_ranges = ranges.size();
    for (int64_t i = 0; i < num_ranges; ++i) {
      Range& range = ranges[(thread + i) % num_ranges];
      for (int64_t item = range.next++; item < range.end; item = range.next++) f(item);
    }
  };
  run_with_helpers(num_threads, body, &work);
}

// The same in blocks of `block` items, for items that take well under a microsecond.
template <class F>
void share_out_blocks(int64_t count, int64_t block, int64_t num_threads, F f) {
  share_out(ceil_div(count, block), num_threads, [&](int64_t i) {
    for (int64_t item = i * block; item < std::min((i + 1) * block, count); ++item) f(item);
  });
}

}  // namespace pilotfish
