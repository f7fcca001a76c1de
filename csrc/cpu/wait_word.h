// A number that threads wait for: they spin for some microseconds and then sleep, so that a thread whose turn
// it is gets the processor where there are fewer of them than threads. Linux: a futex; elsewhere a condition
// variable.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace rnnkit {

class WaitWord {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire) >> 1; }

  // Of 31 bits, by one thread at a time. What the thread wrote before is seen by those that waited.
  void set(uint32_t value) {
    if ((word_.exchange(value << 1, std::memory_order_acq_rel) & sleeping) != 0) wake();
  }

  // The first value that is not `old`.
  uint32_t wait_while(uint32_t old) {
    const int most = spins_.load(std::memory_order_relaxed);
    for (int spins = 0; spins < most; ++spins) {
      const uint32_t now = word_.load(std::memory_order_acquire);
      if (now >> 1 != old) {
        if (most < longest_spin) spins_.store(std::min(2 * most, longest_spin), std::memory_order_relaxed);
        return now >> 1;
      }
      pause();
    }
    // Whom spinning did not serve has a thread before it that does not run: it spins for less the next time.
    spins_.store(std::max(most / 2, shortest_spin), std::memory_order_relaxed);
    while (true) {
      uint32_t now = word_.load(std::memory_order_acquire);
      if (now >> 1 != old) return now >> 1;
      if ((now & sleeping) != 0 ||
          word_.compare_exchange_weak(now, now | sleeping, std::memory_order_relaxed))
        sleep_while(now | sleeping);
    }
  }

 private:
  // Bit 0: a thread sleeps, or is about to. The value stands above it.
  static constexpr uint32_t sleeping = 1;
  // Pauses, on a Zen 4 50 and 5 us. To sleep and be woken costs some 4 us.
  static constexpr int longest_spin = 2000, shortest_spin = 200;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
  }

#ifdef __linux__
  // Returns at once where the word is not `now` any more, and may return without a reason.
  void sleep_while(uint32_t now) { syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel reads the word as a number");
#else
  void sleep_while(uint32_t now) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return word_.load(std::memory_order_acquire) != now; });
  }
  void wake() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }  // not between a sleeper's look and its sleep
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
#endif

  alignas(64) std::atomic<uint32_t> word_{0};
  std::atomic<int> spins_{longest_spin};
};

}  // namespace rnnkit
