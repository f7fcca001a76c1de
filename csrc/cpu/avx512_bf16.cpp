// The variant for x86-64 processors with AVX-512 and its dot products of bfloat16, which it takes for that
// dtype. For the others it is avx512.
// Only the choice of instructions stands here; the code is in simd.h, panels.h, forward.h and backward.h,
// which variant.h includes.

#include "native.h"

#if defined(RNNKIT_HAS_AVX512_BF16)

#include <immintrin.h>

#include "headers.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

#define RNNKIT_VARIANT avx512_bf16
#define RNNKIT_NAME "avx512_bf16"
#define RNNKIT_AVX512
#define RNNKIT_NATIVE_BF16
#define RNNKIT_BYTES 64
#define RNNKIT_REGISTERS 32

namespace rnnkit {
namespace avx512 {
extern const Engine engine;
}
namespace avx512_bf16 {
static const Engine& other_dtypes() { return avx512::engine; }
static bool supported() { return other_dtypes().supported() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace avx512_bf16
}  // namespace rnnkit

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
