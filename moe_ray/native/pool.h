// Threads that share one job's chunks. A thread that has time takes the next chunk, so one that is not scheduled
// (another process has its core) costs nothing: the caller does its share. Helpers sleep in the kernel between jobs,
// after a short spin, because a pool that spins steals the core of the process this one waits for.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_ray {

inline void relax() {  // in a loop that spins
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) helpers_.emplace_back([this, i] { help(i); });
  }

  ~Pool() {
    ending_.store(true);
    wake();
    for (auto& helper : helpers_) helper.join();
  }

  std::mutex using_;  // for callers that share the pool

  // Calls work(chunk, thread) for every chunk in [0, chunks), on any thread; returns when all are done. One caller at
  // a time. `alone` says that the job is too short to be worth waking a helper.
  template <class Work>
  void run(int chunks, bool alone, const Work& work) {
    if (helpers_.empty() || chunks == 1 || alone) {
      for (int i = 0; i < chunks; i++) work(i, 0);
      return;
    }
    call_ = [](const void* w, int chunk, int thread) { (*static_cast<const Work*>(w))(chunk, thread); };
    work_ = &work;
    chunks_ = chunks;
    next_.store(0, std::memory_order_relaxed);
    state_.store(kOpen, std::memory_order_release);
    wake();
    take(0);
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);  // no helper may join now
    for (int spins = 0; state_.load(std::memory_order_acquire) != 0; spins++) {
      if (spins < kSpins) relax();
      else std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kOpen = 1, kHelper = 2;
  static constexpr int kSpins = 1 << 11;

  void take(int thread) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) call_(work_, i, thread);
  }

  void help(int thread) {
    while (!ending_.load(std::memory_order_relaxed)) {
      const int seen = jobs_.load(std::memory_order_acquire);
      int64_t state = state_.load(std::memory_order_acquire);
      bool joined = false;
      while ((state & kOpen) && !(joined = state_.compare_exchange_weak(state, state + kHelper,
                                                                        std::memory_order_acq_rel))) {
      }
      if (joined) {
        take(thread);
        state_.fetch_sub(kHelper, std::memory_order_acq_rel);
      }
      int spins = 0;
      while (jobs_.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
      if (spins == kSpins) {
        sleepers_.fetch_add(1);
        syscall(SYS_futex, reinterpret_cast<int*>(&jobs_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleepers_.fetch_sub(1);
      }
    }
  }

  void wake() {
    jobs_.fetch_add(1);
    if (sleepers_.load() > 0)
      syscall(SYS_futex, reinterpret_cast<int*>(&jobs_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  std::vector<std::thread> helpers_;
  std::atomic<bool> ending_{false};
  std::atomic<int> jobs_{0}, sleepers_{0}, next_{0};
  std::atomic<int64_t> state_{0};  // kOpen while a job may be joined, plus kHelper for each helper inside
  int chunks_ = 0;
  const void* work_ = nullptr;
  void (*call_)(const void*, int, int) = nullptr;
};

}  // namespace moe_ray
