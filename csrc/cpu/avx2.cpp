// The variant for x86-64 processors with AVX2 and FMA.
// Only the choice of instructions stands here; the code is in simd.h, panels.h, forward.h and backward.h,
// which variant.h includes.

#if defined(__x86_64__)

#include <immintrin.h>

#include "headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define RNNKIT_VARIANT avx2
#define RNNKIT_NAME "avx2"
#define RNNKIT_AVX2
#define RNNKIT_BYTES 32
#define RNNKIT_REGISTERS 16

namespace rnnkit::avx2 {
static bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace rnnkit::avx2

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
