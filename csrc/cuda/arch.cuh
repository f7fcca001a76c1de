// Everything that a kernel asks of the machine, behind one namespace with two back ends: a GPU
// (arch_gpu.cuh), and a CPU that runs the same source, a fiber for each thread (tests/cuda/simt). Rules for a
// kernel that runs on both:
//
//   - thread and block numbers, barriers, matrix products and conversions only through `arch`;
//   - shared memory only as what RNNKIT_SHARED names, and nothing in it is zero at the start;
//   - warp collectives (mma) and barriers in control flow that is the same for the whole warp, the whole
//     block;
//   - no exit before a barrier that others wait at.
//
// Both define: RNNKIT_KERNEL(threads), RNNKIT_DEVICE, RNNKIT_SHARED(name), RNNKIT_UNROLL, and in `arch`:
//
// clang-format off
//   int thread(), block_x(), block_y()
//   void sync()                                      all threads of the block
//   uint16_t to_bf16(float), to_fp16(float)          rounded to nearest even
//   float from_bf16(uint16_t), from_fp16(uint16_t)
//   uint32_t to_tf32(float)                          rounded to nearest, ties away; 13 low bits are zero
//   float exp(float), tanh(float); the same double   a few ulp
//   float exp_fast(float)                            some 1e-6, relative
//   float tanh_fast(float)                           2^-11, relative; one instruction
//   void mma_bf16, mma_fp16(float (&d)[4], a0, a1, a2, a3, b0, b1)    m16n8k16, two values a word
//   void mma_tf32(float (&d)[4], a0, a1, a2, a3, b0, b1)              m16n8k8, one value a word
//   launch(Launch, kernel, Grid, threads, shared bytes, stream, arguments...)    throws where it fails
// clang-format on
//
// A matrix product is d += A B with lane = 4 g + q: d[j] is row g + 8 (j / 2), column 2 q + j % 2. In
// m16n8k16 a0, a1 are columns 2q, 2q + 1 of rows g and g + 8, a2, a3 columns 2q + 8, 2q + 9; b0 rows 2q, 2q +
// 1 and b1 rows 2q + 8, 2q + 9 of column g; the first value is in the word's low half. In m16n8k8 a0, a1 are
// column q of rows g and g + 8, a2, a3 column q + 4; b0 row q and b1 row q + 4 of column g.

#pragma once

#include <cstdint>

namespace rnnkit::cuda {

struct Grid {
  int64_t x, y;  // y at most 65,535
};

// What a launch is, for the words of one that fails: a row of the table, or a probe by its name alone; the
// pass and the function; and where it is one launch of many the step, counted from 0 in the order of
// processing.
struct Launch {
  Launch(const char* kernel, const char* pass = nullptr, const char* function = nullptr, int64_t step = -1)
      : kernel(kernel), pass(pass), function(function), step(step) {}
  operator const char*() const { return kernel; }  // all that the back end of a CPU asks

  const char *kernel, *pass, *function;
  int64_t step;
};

}  // namespace rnnkit::cuda

#if defined(RNNKIT_SIMT)
#include "simt/arch_cpu.h"
#else
#include "arch_gpu.cuh"
#endif
