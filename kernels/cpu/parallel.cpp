// The helper threads of this process. They are started when first wanted and never end; between jobs they spin for a moment,
// since a model's ops follow one another within microseconds, then sleep.
#include "parallel.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pilotfish {
namespace {

constexpr std::chrono::microseconds kSpin{100};

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Helpers {
 public:
  void run(int64_t num_threads, Body body, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return body(context, 0);
    for (; num_helpers_ + 1 < num_threads; ++num_helpers_) {
      std::thread(&Helpers::serve, this, num_helpers_ + 1, job_number_.load()).detach();
    }
    body_ = body, context_ = context, num_threads_ = num_threads;
    door_.store(kOpen, std::memory_order_release);
    ++job_number_;
    if (num_asleep_ > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }  // nobody is between looking at the job number and falling asleep
      wake_.notify_all();
    }
    body(context, 0);
    door_.fetch_and(~kOpen, std::memory_order_relaxed);
    for (int64_t turns = 0; door_.load(std::memory_order_acquire) != 0; ++turns) {
      turns < 1000 ? pause() : std::this_thread::yield();  // a helper that is inside may have lost its core
    }
  }

 private:
  // Bit 31 of door_: the job may be entered. The rest: how many helpers are inside.
  static constexpr uint32_t kOpen = 1u << 31;

  void serve(int64_t thread, uint32_t last_job) {
    for (;;) {
      last_job = wait_for_job(last_job);
      if (!enter()) continue;
      if (thread < num_threads_) body_(context_, thread);
      door_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint32_t wait_for_job(uint32_t last_job) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    while (std::chrono::steady_clock::now() < deadline) {
      for (int i = 0; i < 32; ++i) {
        const uint32_t job = job_number_.load(std::memory_order_acquire);
        if (job != last_job) return job;
        pause();
      }
    }
    std::unique_lock<std::mutex> lock(sleep_);
    ++num_asleep_;
    wake_.wait(lock, [&] { return job_number_ != last_job; });
    --num_asleep_;
    return job_number_;
  }

  bool enter() {
    uint32_t inside = door_.load(std::memory_order_relaxed);
    while (inside & kOpen) {
      if (door_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
    }
    return false;
  }

  std::mutex turn_;  // of the one caller that has the helpers
  int64_t num_helpers_ = 0;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t num_threads_ = 0;
  alignas(64) std::atomic<uint32_t> job_number_{0};
  alignas(64) std::atomic<uint32_t> door_{0};
  std::atomic<int> num_asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

std::atomic<Helpers*> helpers{nullptr};

// Threads do not survive a fork: the child starts its own. The old object stays where it is, locked or not.
void forget_helpers() { helpers = new Helpers; }

Helpers& this_process_helpers() {
  static const bool prepared = [] {
    forget_helpers();
    pthread_atfork(nullptr, nullptr, forget_helpers);
    return true;
  }();
  static_cast<void>(prepared);
  return *helpers.load();
}

}  // namespace

void run_with_helpers(int64_t num_threads, Body body, void* context) {
  this_process_helpers().run(num_threads, body, context);
}

}  // namespace pilotfish
