// The variant for aarch64 processors with dot products of bfloat16 (BFDOT), which it takes for that dtype.
// For the others it is baseline. Only the choice of instructions stands here; the code is in simd.h,
// panels.h, forward.h and backward.h, which variant.h includes.

#include "native.h"

#if defined(RNNKIT_HAS_NEON_BF16)

#include <arm_neon.h>
#include <sys/auxv.h>

#include "headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+bf16")
#pragma GCC optimize( \
    "no-schedule-insns")  // which loads all rows of a tile at once, and its sums leave registers
#endif

#define RNNKIT_VARIANT neon_bf16
#define RNNKIT_NAME "neon_bf16"
#define RNNKIT_NATIVE_BF16
#define RNNKIT_BYTES 16
#define RNNKIT_REGISTERS 32

namespace rnnkit {
namespace baseline {
extern const Engine engine;
}
namespace neon_bf16 {
static const Engine& other_dtypes() { return baseline::engine; }
static bool supported() {
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & bf16) != 0;
}
}  // namespace neon_bf16
}  // namespace rnnkit

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
