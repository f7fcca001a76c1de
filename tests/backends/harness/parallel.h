// The ways in which a caller may run the slices of a scan: what `Parallel` allows, each once.

#pragma once

#include <thread>

#include "../../../csrc/cpu/scan.h"

namespace harness {

using Body = void (*)(void* context, int64_t first, int64_t last);

// All slices in one call, as OpenMP does inside a parallel region.
inline void together(int64_t slices, void* context, Body body) { body(context, 0, slices); }

// Each slice in a thread of its own.
inline void apart(int64_t slices, void* context, Body body) {
  std::vector<std::thread> threads;
  for (int64_t p = 1; p < slices; ++p) threads.emplace_back([=] { body(context, p, p + 1); });
  body(context, 0, 1);
  for (std::thread& t : threads) t.join();
}

// Two threads: the first has one slice, the other the rest, as OpenMP may where it gives fewer threads than
// asked for.
inline void uneven(int64_t slices, void* context, Body body) {
  std::thread other([=] { body(context, 1, slices); });
  body(context, 0, 1);
  other.join();
}

// Two threads with half of the slices each, started in the other order.
inline void halves(int64_t slices, void* context, Body body) {
  std::thread other([=] { body(context, slices / 2, slices); });
  std::this_thread::yield();
  body(context, 0, slices / 2);
  other.join();
}

// One slice after the other in the calling thread, the last first: only where slices are rows, which never
// wait.
inline void in_turn(int64_t slices, void* context, Body body) {
  for (int64_t p = slices; p-- > 0;) body(context, p, p + 1);
}

struct Way {
  const char* name;
  rnnkit::Workers workers;
};

}  // namespace harness
