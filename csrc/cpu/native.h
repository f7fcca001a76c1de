// Which variants with dot products of bfloat16 there are: the compiler must know the instructions, and how to
// ask the processor for them (gcc since 11).

#pragma once

#if defined(__clang__) || __GNUC__ >= 11
#if defined(__x86_64__)
#define RNNKIT_HAS_AVX512_BF16
#elif defined(__aarch64__) && defined(__linux__)
#define RNNKIT_HAS_NEON_BF16
#endif
#endif
