// How many threads a small op deserves.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pilotfish {

// One thread for every `grain` units of work, since waking a thread costs microseconds; at least one.
inline int threads_for(int64_t work, int64_t grain, int64_t num_threads) {
  return static_cast<int>(std::clamp<int64_t>(work / grain, 1, num_threads));
}

}  // namespace pilotfish
