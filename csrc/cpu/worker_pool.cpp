// The threads of worker_pool.h.

#include "worker_pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "wait_word.h"

namespace rnnkit {
namespace {

using Body = void (*)(void* context, int64_t first, int64_t last);

class WorkerPool {
 public:
  void run(int64_t slices, void* context, Body body) {
    const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    const int64_t helpers = mine.owns_lock() ? start(slices - 1) : 0;
    if (helpers == 0) {
      body(context, 0, slices);
      return;
    }
    follow();
    const int64_t own = slices - helpers;
    context_ = context, body_ = body;
    left_.store(helpers, std::memory_order_relaxed);
    const uint32_t before = done_.value();
    for (int64_t k = 0; k < helpers; ++k) {
      Helper& helper = *helpers_[k];
      helper.slice = own + k;
      helper.turn.set(helper.turn.value() + 1);
    }
    body(context, 0, own);
    done_.wait_while(before);
  }

 private:
  struct Helper {
    WaitWord turn;  // changes when there is something to do
    int64_t slice = 0;
    std::thread::native_handle_type thread{};
  };

  // Helpers run where the caller may run: a thread keeps the affinity mask of the one that started it, also
  // when that one's has changed since.
  void follow() {
#if defined(__linux__)
    cpu_set_t mask;
    if (pthread_getaffinity_np(pthread_self(), sizeof mask, &mask) != 0)
      return;  // more CPUs than a mask counts
    if (!CPU_EQUAL(&mask, &mask_)) placed_ = 0;
    mask_ = mask;
    for (; placed_ < helpers_.size(); ++placed_) {
      pthread_setaffinity_np(helpers_[placed_]->thread, sizeof mask, &mask);
    }
#endif
  }

  // How many helpers there are of those that are wanted.
  int64_t start(int64_t wanted) {
    helpers_.reserve(static_cast<size_t>(wanted));
    while (static_cast<int64_t>(helpers_.size()) < wanted) {
      auto helper = std::make_unique<Helper>();
      try {
        std::thread made([this, own = helper.get()] { serve(*own); });
        helper->thread = made.native_handle();
        made.detach();
      } catch (const std::system_error&) {  // the system's or a container's limit of threads
        break;
      }
      helpers_.push_back(std::move(helper));
    }
    return std::min(wanted, static_cast<int64_t>(helpers_.size()));
  }

  void serve(Helper& own) {
    for (uint32_t turn = 0;;) {
      turn = own.turn.wait_while(turn);
      body_(context_, own.slice, own.slice + 1);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.set(done_.value() + 1);
    }
  }

  std::mutex busy_;
  std::vector<std::unique_ptr<Helper>> helpers_;
#if defined(__linux__)
  cpu_set_t mask_{};  // of the first `placed_` helpers
  size_t placed_ = 0;
#endif
  void* context_ = nullptr;
  Body body_ = nullptr;
  alignas(64) std::atomic<int64_t> left_{0};
  WaitWord done_;
};

}  // namespace

void run_in_pool(int64_t slices, void* context, Body body) {
  static auto* pool = new WorkerPool;  // its threads sleep in it for as long as the process lives
  pool->run(slices, context, body);
}

}  // namespace rnnkit
