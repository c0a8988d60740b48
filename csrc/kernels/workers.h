// One parallel region made of steps: the workers share the items of a step out among themselves, so
// that a slow core takes fewer of them, and wait for a step where the next one needs it whole.
#pragma once

#include <atomic>
#include <thread>

#include "kernels.h"
#include "scratch.h"
#include "simd.h"
#include "tokens.h"

namespace sep_attn {
namespace SEP_ATTN_CAPABILITY {

enum class Order { kForward, kBackward };

// The counters of a region. Tasks of a ParallelFor may run one after the other: whoever is first
// then does every item, and the others find nothing left.
class Team {
 public:
  explicit Team(int64_t workers)
      : workers_(workers), counters_(workers > 1 ? kMostSteps * (workers + 1) : 0) {
    for (int64_t i = 0; workers > 1 && i < kMostSteps * (workers + 1); ++i) {
      new (&counters_[i]) Counter{};
    }
  }

 private:
  friend class Worker;
  static constexpr int64_t kMostSteps = 12;
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  std::atomic<int64_t>& taken(int64_t step, int64_t share) const {
    return counters_[step * (workers_ + 1) + share].value;
  }
  std::atomic<int64_t>& done(int64_t step) const { return taken(step, workers_); }

  const int64_t workers_;
  const Buffer<Counter> counters_;
};

// What one worker sees of the team. All workers call share_out and wait in the same order.
class Worker {
 public:
  Worker(const Team& team, int64_t index) : team_(team), index_(index) {}
  int64_t index() const { return index_; }

  // body(item) once for every item in [0, items). A worker begins with its own share, in the given
  // order, so that it finds again what it had in its cache; then it helps the others.
  template <typename Body>
  SEP_ATTN_INLINE void share_out(int64_t items, const Body& body, Order order = Order::kForward) {
    const int64_t workers = team_.workers_;
    if (workers == 1) {
      for (int64_t i = 0; i < items; ++i) body(order == Order::kForward ? i : items - 1 - i);
      return;
    }
    items_[steps_] = items;
    int64_t done = 0;
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t owner = index_ + i < workers ? index_ + i : index_ + i - workers;
      const Range own = share(items, owner, workers);
      std::atomic<int64_t>& taken = team_.taken(steps_, owner);
      while (taken.load(std::memory_order_relaxed) < own.count()) {
        const int64_t next = taken.fetch_add(1, std::memory_order_relaxed);
        if (next >= own.count()) break;
        body(order == Order::kForward ? own.begin + next : own.end - 1 - next);
        ++done;
      }
    }
    if (done > 0) team_.done(steps_).fetch_add(done, std::memory_order_release);
    ++steps_;
  }

  // Returns when every item shared out so far is done.
  void wait() {
    for (; waited_ < steps_; ++waited_) {
      const std::atomic<int64_t>& done = team_.done(waited_);
      for (int spins = 0; done.load(std::memory_order_acquire) < items_[waited_]; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const Team& team_;
  const int64_t index_;
  int64_t steps_ = 0, waited_ = 0;
  int64_t items_[Team::kMostSteps];
};

// body(worker) on every worker of a region. `body` must not throw.
template <typename Body>
SEP_ATTN_INLINE void run_workers(const ParallelFor& parallel, int64_t workers, const Body& body) {
  const Team team(workers);
  run_tasks(parallel, workers, [&](int64_t index) {
    Worker worker(team, index);
    body(worker);
  });
}

}  // namespace SEP_ATTN_CAPABILITY
}  // namespace sep_attn
