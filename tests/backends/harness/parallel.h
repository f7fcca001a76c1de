// The ways in which a caller may run the parts of a scan: what `Parallel` allows, each once.

#pragma once

#include <thread>

#include "../../../csrc/cpu/scan.h"

namespace harness {

using Body = void (*)(void* context, int64_t first, int64_t last);

// All parts in one call, as OpenMP does inside a parallel region.
inline void together(int64_t parts, void* context, Body body) { body(context, 0, parts); }

// Each part in a thread of its own.
inline void apart(int64_t parts, void* context, Body body) {
  std::vector<std::thread> threads;
  for (int64_t p = 1; p < parts; ++p) threads.emplace_back([=] { body(context, p, p + 1); });
  body(context, 0, 1);
  for (std::thread& t : threads) t.join();
}

// Two threads: the first has one part, the other the rest, as OpenMP may where it gives fewer threads than
// asked for.
inline void uneven(int64_t parts, void* context, Body body) {
  std::thread other([=] { body(context, 1, parts); });
  body(context, 0, 1);
  other.join();
}

// Two threads with half of the parts each, started in the other order.
inline void halves(int64_t parts, void* context, Body body) {
  std::thread other([=] { body(context, parts / 2, parts); });
  std::this_thread::yield();
  body(context, 0, parts / 2);
  other.join();
}

// One part after the other in the calling thread, the last first: only where parts are rows, which never
// meet.
inline void in_turn(int64_t parts, void* context, Body body) {
  for (int64_t p = parts; p-- > 0;) body(context, p, p + 1);
}

struct Way {
  const char* name;
  rnnkit::Workers workers;
};

}  // namespace harness
