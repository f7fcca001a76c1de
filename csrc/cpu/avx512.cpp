// The variant for x86-64 processors with AVX-512 F, BW, DQ and VL.
// Only the choice of instructions stands here; the code is in simd.h, panels.h, forward.h and backward.h,
// which variant.h includes.

#if defined(__x86_64__)

#include <immintrin.h>

#include "headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define RNNKIT_VARIANT avx512
#define RNNKIT_NAME "avx512"
#define RNNKIT_AVX512
#define RNNKIT_BYTES 64
#define RNNKIT_REGISTERS 32

namespace rnnkit::avx512 {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace rnnkit::avx512

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
