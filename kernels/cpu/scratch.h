// Memory that a thread keeps between calls.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pilotfish {

// A buffer that only grows, aligned to a cache line so that vectors never straddle two. Declare it thread_local.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(memory_); }

  // Room for `count` floats, uninitialised; what an earlier call returned is no longer valid.
  float* reserve(int64_t count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = (count + 15) / 16 * 16;
      memory_ = static_cast<float*>(std::aligned_alloc(64, capacity_ * sizeof(float)));
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace pilotfish
