// What is asked of an engine on one problem. Each throws std::runtime_error with what was found.

#pragma once

#include "run.h"

namespace harness {

// That the plain backward is the transpose of the derivative of the plain forward, by dual numbers: the judge
// judged.
void check_plain(const Problem& p);

// Forward and backward against the plain loops, and bitwise against one another in every way they can be run:
// chunks of time, in place, without saving, among threads, some rows alone. `every_way`: all ways to run
// slices, not two of them.
void check_scan(const rnnkit::Engine& engine, const Problem& p, bool every_way);

// The product of rows with packed and unpacked weights.
void check_product(const rnnkit::Engine& engine, uint64_t seed);

// That memory which runs out in one slice of a scan is an error for the caller, and nobody waits for ever;
// how often it ran out.
int64_t check_failing(const rnnkit::Engine& engine, const Problem& p);

// sigmoid and tanh of every float32 on every engine; the largest errors in ulp are printed. False beyond 4
// ulp.
bool check_functions();

// Calls of `Parallel` so far.
int64_t parallel_calls();

}  // namespace harness
