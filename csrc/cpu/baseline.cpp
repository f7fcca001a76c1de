// The variant that every processor of an architecture runs: SSE2 on x86-64, NEON on aarch64.
// Only the choice of instructions stands here; the code is in simd.h, panels.h, forward.h and backward.h,
// which variant.h includes.

#include "headers.h"

#define RNNKIT_VARIANT baseline
#define RNNKIT_NAME "baseline"
#define RNNKIT_BYTES 16
#if defined(__aarch64__)
#define RNNKIT_REGISTERS 32
#else
#define RNNKIT_REGISTERS 16
#endif

namespace rnnkit::baseline {
static bool supported() { return true; }
}  // namespace rnnkit::baseline

#include "variant.h"
