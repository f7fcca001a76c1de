// The back end of arch.cuh for a CPU: the wrappers that need a scheduler ask simt.h, the others are plain
// functions that give what the instruction gives. Compiled with tests/ and csrc/cuda/ in the include path.
// Include arch.cuh.

#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#include "simt.h"

#define RNNKIT_DEVICE inline
#define RNNKIT_KERNEL(threads) void
#define RNNKIT_SHARED(name) unsigned char* const name = ::simt::current->block->shared
#define RNNKIT_UNROLL

namespace rnnkit::cuda::arch {

inline int thread() { return ::simt::current->index; }
inline int block_x() { return static_cast<int>(::simt::current->block->x); }
inline int block_y() { return static_cast<int>(::simt::current->block->y); }
inline void sync(::simt::Place place = ::simt::Place::here()) { ::simt::barrier(place); }

inline uint32_t bits(float v) {
  uint32_t r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline float from_bits(uint32_t v) {
  float r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

// A NaN becomes the one of cvt, all bits of the significand set.
inline uint16_t to_bf16(float v) {
  const uint32_t u = bits(v);
  if (v != v) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t v) { return from_bits(static_cast<uint32_t>(v) << 16); }

inline uint16_t to_fp16(float v) {
  if (v != v) return 0x7fff;
  const uint16_t sign = static_cast<uint16_t>(bits(v) >> 16 & 0x8000);
  const uint32_t u = bits(v) & 0x7fffffff;
  if (u >= 0x477ff000) return sign | 0x7c00;  // 65520, halfway beyond the largest, and above
  // Below 2^-14: in units of 2^-24, which are those of 0.5 as a float; the addition rounds.
  if (u < 0x38800000) return sign | static_cast<uint16_t>(bits(from_bits(u) + 0.5f) - bits(0.5f));
  return sign | static_cast<uint16_t>((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}
inline float from_fp16(uint16_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000) << 16, u = static_cast<uint32_t>(v & 0x7fff) << 13;
  if (u >= 0x7c00u << 13) return from_bits(sign | u | 0x7f800000);
  return from_bits(sign | bits(from_bits(u) * 0x1p112f));
}

// As sm_80 and sm_90 do it: past the largest finite float comes infinity, and a NaN of which only low bits
// say so becomes infinity too.
inline uint32_t to_tf32(float v) {
  const uint32_t u = bits(v);
  return ((u & 0x7fffffff) < 0x7f800000 ? u + 0x1000 : u) & ~0x1fffu;
}

inline float exp(float v) { return std::exp(v); }
inline double exp(double v) { return std::exp(v); }
inline float tanh(float v) { return std::tanh(v); }
inline double tanh(double v) { return std::tanh(v); }

// Instructions that approximate are wrong by as much as PTX allows them, or less: by how much, the argument's
// bits say.
inline double off(float v, double bound) {
  if (v == 0 || std::isinf(v)) return 1;
  const uint32_t h = bits(v) * 0x9e3779b1u;
  return 1 + bound * ((h >> 8) * 0x1p-23 - 1);
}
inline float tanh_fast(float v) {  // tanh.approx
  const float r = static_cast<float>(std::tanh(v) * off(v, 0x1p-11));
  return std::fabs(r) > 1 ? std::copysign(1.f, r) : r;
}
inline float exp_fast(float v) {  // ex2.approx of a product that is rounded
  return static_cast<float>(std::exp2(v * 1.44269502f) * off(v, 0x1p-22));
}

// The operands of one lane; d is its accumulators.
struct Product {
  float* d;
  uint32_t a[4], b[2];
};
#define RNNKIT_SHARED_LIBRARY __attribute__((visibility("default")))
RNNKIT_SHARED_LIBRARY void multiply_bf16(void* const* lanes);
RNNKIT_SHARED_LIBRARY void multiply_fp16(void* const* lanes);
RNNKIT_SHARED_LIBRARY void multiply_tf32(void* const* lanes);
#undef RNNKIT_SHARED_LIBRARY

inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1, ::simt::Place place = ::simt::Place::here()) {
  Product mine{d, {a0, a1, a2, a3}, {b0, b1}};
  ::simt::collective("mma_bf16", place, &mine, multiply_bf16);
}
inline void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1, ::simt::Place place = ::simt::Place::here()) {
  Product mine{d, {a0, a1, a2, a3}, {b0, b1}};
  ::simt::collective("mma_fp16", place, &mine, multiply_fp16);
}
inline void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1, ::simt::Place place = ::simt::Place::here()) {
  Product mine{d, {a0, a1, a2, a3}, {b0, b1}};
  ::simt::collective("mma_tf32", place, &mine, multiply_tf32);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared,
            const void* stream, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, std::tuple<Parameters...>(arguments...)};
  const auto body = [](const void* c) {
    const Call& call = *static_cast<const Call*>(c);
    std::apply(call.kernel, call.parameters);
  };
  ::simt::run(
      {name, grid.x, grid.y, threads, shared, static_cast<const ::simt::Schedule*>(stream), body, &call});
}

}  // namespace rnnkit::cuda::arch
