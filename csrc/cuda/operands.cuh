// The kinds of operands of the recurrent product, and the product of one fragment. The weights are the first
// operand of a matrix product and stay where they are; the batch is the second, 8 rows wide, so a batch of
// one wastes the least.
//
// A fragment is 16 units by 64 bytes of each (32 halfs, 16 floats). A lane = 4 g + q has units 2g and 2g + 1
// of it and the batch's rows (columns of the product) 2q and 2q + 1: of a sum acc[j] is unit 2g + j / 2, row
// 2q + j % 2, for every gate alike, so a lane has all gates of its cells and nothing is exchanged. The terms
// of a sum may come in any order, so what a lane has of a fragment is 16 bytes in one piece (elements 8q to
// 8q
// + 7 of 32), one wide load.
//
// Kinds without tensor cores (ieee, f64) have the same units and rows a lane, and each lane reads all terms
// of its own: a fragment is then 16 units by 16 bytes.

#pragma once

#include <cstring>
#include <initializer_list>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "arch.cuh"
#include "scan.h"

namespace rnnkit::cuda {

struct alignas(16) Vec16B {
  uint32_t w[4];
};

// What the gate math of csrc/cells computes with.
template <class T>
struct Plain {
  using Value = T;
  RNNKIT_DEVICE static T set(T v) { return v; }
  RNNKIT_DEVICE static bool less(T a, T b) { return a < b; }
  RNNKIT_DEVICE static bool less_equal(T a, T b) { return a <= b; }
  RNNKIT_DEVICE static T select(bool where, T a, T b) { return where ? a : b; }
  RNNKIT_DEVICE static T sigmoid(T v) { return T(1) / (T(1) + arch::exp(-v)); }
  RNNKIT_DEVICE static T tanh(T v) { return arch::tanh(v); }
};

// For operands of 11 bits and fewer: within 1e-6, relative, wherever the function is, since a forget gate is
// multiplied a thousand times. The special function unit makes 16 results a clock and is what gate math waits
// for, so it is asked once a function: of exp(-|v|), and 1 / (1 + that) comes from Newton's steps.
struct Fast : Plain<float> {
  // 1 / d for d in [1, 2]: a line within 1/17, and three steps that square the error.
  RNNKIT_DEVICE static float inverse(float d) {
    float r = 24.0f / 17.0f - 8.0f / 17.0f * d;
    RNNKIT_UNROLL
    for (int step = 0; step < 3; ++step) r += r * (1.0f - d * r);
    return r;
  }
  RNNKIT_DEVICE static float sigmoid(float v) {
    const float e = arch::exp_fast(v < 0.0f ? v : -v), r = inverse(1.0f + e);
    return v < 0.0f ? e * r : r;
  }
  // Near 0 an odd polynomial fitted to tanh, since 1 - e^-2x cancels.
  RNNKIT_DEVICE static float tanh(float v) {
    const float z = v * v, size = v < 0.0f ? -v : v;
    float p = -0.005583278834819794f * z + 0.020531065762043f;
    p = (p * z - 0.053706977516412735f) * z + 0.13331055641174316f;
    const float near = v + v * z * (p * z - 0.33333268761634827f);
    const float e = arch::exp_fast(-2.0f * size), far = (1.0f - e) * inverse(1.0f + e);
    return size < 0.64f ? near : v < 0.0f ? -far : far;
  }
};

// For bfloat16, whose own rounding is 2^-9: tanh is one instruction, within 2^-11. A sigmoid made of it would
// be off by 2^-12 beside 0 and 1, which is too much for a gate that is nearly shut.
struct Rough : Fast {
  RNNKIT_DEVICE static float tanh(float v) { return arch::tanh_fast(v); }
};

namespace kind {

struct Bits16 {
  uint16_t bits;
};

struct Tensor16 {
  using Stored = Bits16;
  using Real = float;
  using Math = Fast;
  static constexpr bool tensor = true;
  RNNKIT_DEVICE static uint32_t operand(uint32_t word) { return word; }  // of what is stored, an operand
};

struct bf16 : Tensor16 {
  using Math = Rough;
  RNNKIT_DEVICE static float widen(Bits16 v) { return arch::from_bf16(v.bits); }
  RNNKIT_DEVICE static Bits16 narrow(float v) { return {arch::to_bf16(v)}; }
  RNNKIT_DEVICE static void mma(float (&d)[4], const Vec16B& a0, const Vec16B& a1, const Vec16B& b, int s) {
    arch::mma_bf16(d, a0.w[s], a1.w[s], a0.w[s + 1], a1.w[s + 1], b.w[s], b.w[s + 1]);
  }
};

struct fp16 : Tensor16 {
  RNNKIT_DEVICE static float widen(Bits16 v) { return arch::from_fp16(v.bits); }
  RNNKIT_DEVICE static Bits16 narrow(float v) { return {arch::to_fp16(v)}; }
  RNNKIT_DEVICE static void mma(float (&d)[4], const Vec16B& a0, const Vec16B& a1, const Vec16B& b, int s) {
    arch::mma_fp16(d, a0.w[s], a1.w[s], a0.w[s + 1], a1.w[s + 1], b.w[s], b.w[s + 1]);
  }
};

template <class T>
struct Exact {
  using Stored = T;
  using Real = T;
  using Math = Plain<T>;
  static constexpr bool tensor = false;
  RNNKIT_DEVICE static T widen(T v) { return v; }
  RNNKIT_DEVICE static T narrow(T v) { return v; }
  RNNKIT_DEVICE static uint32_t operand(uint32_t word) { return word; }
};

struct ieee : Exact<float> {};
struct f64 : Exact<double> {};

struct tf32 : Exact<float> {
  using Math = Fast;
  static constexpr bool tensor = true;
  RNNKIT_DEVICE static uint32_t operand(uint32_t word) {
    float v;
    memcpy(&v, &word, sizeof v);
    return arch::to_tf32(v);
  }
  RNNKIT_DEVICE static void mma(float (&d)[4], const Vec16B& a0, const Vec16B& a1, const Vec16B& b, int s) {
    arch::mma_tf32(d, a0.w[s], a1.w[s], a0.w[s + 1], a1.w[s + 1], b.w[s], b.w[s + 1]);
  }
};

}  // namespace kind

// How the fragments of a kind lie; `lane` is that of the warp.
template <class O>
struct Fragments {
  using Stored = typename O::Stored;
  using Real = typename O::Real;
  static constexpr int count = 16 / sizeof(Stored);            // elements of a lane's piece
  static constexpr int terms = O::tensor ? 4 * count : count;  // terms of a sum in a fragment
  static constexpr int columns = O::tensor ? 1 : 2;            // pieces of the batch that a lane takes
  static constexpr int pieces = O::tensor ? 32 : 8;            // different pieces of each half of the weights

  // Where a lane's piece begins within the fragment's terms.
  RNNKIT_DEVICE static int term(int lane) { return O::tensor ? lane % 4 * count : 0; }
  // The row of the batch whose piece `i` a lane takes.
  RNNKIT_DEVICE static int column(int lane, int i) { return O::tensor ? lane / 4 : lane % 4 * 2 + i; }
  // Which of the different pieces is a lane's.
  RNNKIT_DEVICE static int piece(int lane) { return O::tensor ? lane : lane / 4; }

  // acc += units 2g (a0) and 2g + 1 (a1) by the batch.
  RNNKIT_DEVICE static void multiply(Real (&acc)[4], const Vec16B& a0, const Vec16B& a1,
                                     const Vec16B (&b)[columns]) {
    if constexpr (O::tensor) {
      O::mma(acc, a0, a1, b[0], 0);
      O::mma(acc, a0, a1, b[0], 2);
    } else {
      Real a[2][count], v[2][count];
      memcpy(a[0], &a0, 16), memcpy(a[1], &a1, 16);
      memcpy(v[0], &b[0], 16), memcpy(v[1], &b[1], 16);
      RNNKIT_UNROLL
      for (int i = 0; i < count; ++i) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) acc[j] += a[j / 2][i] * v[j % 2][i];
      }
    }
  }

  // 16 bytes of a matrix's row from column k on, as operands; zeros from column `end` on. `aligned16`: rows
  // begin at multiples of 16 bytes.
  RNNKIT_DEVICE static Vec16B load(const Stored* row, int64_t k, int64_t end, bool aligned16) {
    Vec16B v;
    if (aligned16 && k + count <= end) {
      v = *reinterpret_cast<const Vec16B*>(row + k);
    } else {
      Stored elements[count];
      RNNKIT_UNROLL
      for (int i = 0; i < count; ++i) elements[i] = k + i < end ? row[k + i] : Stored{};
      memcpy(&v, elements, 16);
    }
    RNNKIT_UNROLL
    for (int i = 0; i < 4; ++i) v.w[i] = O::operand(v.w[i]);
    return v;
  }
};

// Elements of a matrix in memory, and two neighbours at once where both are inside and `paired` says that
// they are aligned. What is outside is 0.
template <class O>
struct Memory {
  using Stored = typename O::Stored;
  using Real = typename O::Real;
  struct alignas(2 * sizeof(Stored)) Two {
    Stored v[2];
  };

  RNNKIT_DEVICE static Real load(const void* p, int64_t at) {
    return O::widen(static_cast<const Stored*>(p)[at]);
  }
  RNNKIT_DEVICE static void store(void* p, int64_t at, Real v) { static_cast<Stored*>(p)[at] = O::narrow(v); }

  // inside: how many of the two are.
  RNNKIT_DEVICE static Two load(const void* p, int64_t at, int inside, bool paired) {
    const Stored* from = static_cast<const Stored*>(p) + at;
    Two two = {};
    if (inside == 2 && paired) return *reinterpret_cast<const Two*>(from);
    if (inside > 0) two.v[0] = from[0];
    if (inside > 1) two.v[1] = from[1];
    return two;
  }
  RNNKIT_DEVICE static void store(void* p, int64_t at, int inside, bool paired, Real a, Real b) {
    Stored* to = static_cast<Stored*>(p) + at;
    const Two two = {{O::narrow(a), O::narrow(b)}};
    if (inside == 2 && paired) {
      *reinterpret_cast<Two*>(to) = two;
    } else {
      if (inside > 0) to[0] = two.v[0];
      if (inside > 1) to[1] = two.v[1];
    }
  }

  RNNKIT_DEVICE static Real load(const State& s, int64_t at) {
    if (s.data == nullptr) return Real(0);
    return s.opmath ? static_cast<const Real*>(s.data)[at] : load(s.data, at);
  }
  RNNKIT_DEVICE static void store(const State& s, int64_t at, Real v) {
    if (s.data == nullptr) return;
    if (s.opmath) {
      static_cast<Real*>(s.data)[at] = v;
    } else {
      store(s.data, at, v);
    }
  }
};

// Whether every one of these may be read two elements, or 16 bytes, at a time.
inline bool aligned(int bytes, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) return false;
  }
  return true;
}

}  // namespace rnnkit::cuda
