// Threads of the engine's own, for a caller whose runtime has more threads than there are CPUs: OpenMP would
// wake all of them for each piece of work, and those without any would spin on the CPUs of the others.

#pragma once

#include "scan.h"

namespace rnnkit {

// A `Parallel`: each slice on a thread of its own, the first ones on the caller's. The threads are started
// when they are first needed and sleep between calls. One call has them at a time; another, and one in a
// thread that the system gives no more threads, runs its slices together.
void run_in_pool(int64_t slices, void* context, void (*body)(void* context, int64_t first, int64_t last));

}  // namespace rnnkit
