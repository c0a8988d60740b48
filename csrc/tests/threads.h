// The parallel-for that the tests hand to the kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/kernels.h"

namespace sep_attn::tests {

// How many threads a kernel is told it has, and whether they are real: tasks may run in any order,
// so one thread may also run them all, from the last to the first.
struct Threads {
  int64_t count;
  bool real;
};

inline std::string describe(Threads threads) {
  return std::to_string(threads.count) + (threads.real ? " threads" : " threads in one, backwards");
}

inline int64_t& running_threads() {
  static int64_t count = 1;
  return count;
}

inline void run_on_threads(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) body(context, task);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < running_threads() && i < tasks; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

inline void run_backwards(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = tasks; task-- > 0;) body(context, task);
}

inline ParallelFor parallel_for(Threads threads) {
  running_threads() = threads.count;
  return {threads.count, threads.real ? run_on_threads : run_backwards};
}

}  // namespace sep_attn::tests
