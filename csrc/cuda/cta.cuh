// The regime for small sizes: one block keeps W_hh on its multiprocessor for the whole sequence, in registers
// and shared memory, and carries 8 rows of the batch through all of time. Blocks never wait for one another.
//
// clang-format off
//     a block: 8 rows           W_hh, once                      at each step
//     +----------------------+  a warp has 16 units of every    product: W_hh by h (shared memory, 2 buffers)
//     | warp 0: units 0..15  |  gate: fragments in registers    gate math, on sums that never left registers
//     | warp 1: units 16..31 |  as far as they go, the others   h back to the other buffer; one barrier
//     | ...                  |  in shared memory                y, gates, c to memory; gx of the next step
//     +----------------------+
// clang-format on
//
// The backward is the same with W_hh^T, and with the gradients of the gates where h was. cta_forward.cuh and
// cta_backward.cuh hold the kernels; here is what a configuration is, its weights and its product.

#pragma once

#include <sstream>
#include <stdexcept>

#include "cells.cuh"

namespace rnnkit::cuda {

// UNITS: the most it can hold; KEPT: fragments that a warp keeps in registers.
template <class Cell_, class Kind, int UNITS, int WARPS, int KEPT>
struct Cta {
  using Cell = Cell_;
  using O = Kind;
  using F = Fragments<O>;
  using Stored = typename O::Stored;
  using Real = typename O::Real;
  static constexpr int units = UNITS;
  static constexpr int G = Cell::G;
  static constexpr int rows = 8;
  static constexpr int threads = 32 * WARPS;
  static constexpr int blocks = UNITS / 16 / WARPS;                  // of 16 units, a warp's
  static constexpr int k_tiles = (UNITS + F::terms - 1) / F::terms;  // fragments along the terms of a gate
  static constexpr int width = k_tiles * F::terms;                   // terms of a gate, padded
  static constexpr int fragments = blocks * G * k_tiles;             // of weights, a warp's
  static constexpr int kept = KEPT;
  static constexpr int shared_fragments = fragments - KEPT;
  static constexpr int fragment_bytes = 2 * F::pieces * 16;
  static constexpr int weight_bytes = WARPS * shared_fragments * fragment_bytes;
  static_assert(UNITS % (16 * WARPS) == 0 && KEPT <= fragments && (O::tensor || KEPT == 0), "configuration");

  // Rows of operands in shared memory, so far apart that a warp's loads meet all banks once: 64 bytes beyond
  // a multiple of 128 for a lane's four pieces of eight rows, 16 beyond for one piece of every second row.
  static constexpr int pitch_of(int columns) {
    const int bytes = columns * static_cast<int>(sizeof(Stored));
    const int aligned = (bytes + 127) / 128 * 128;
    if (!O::tensor) return (aligned + 16) / static_cast<int>(sizeof(Stored));
    return (bytes % 128 == 64 ? bytes : aligned + 64) / static_cast<int>(sizeof(Stored));
  }

  static constexpr int forward_pitch = pitch_of(width), forward_buffer = rows * forward_pitch;
  static constexpr int backward_pitch = pitch_of(G * width), backward_buffer = rows * backward_pitch;
  static constexpr int forward_bytes = 2 * forward_buffer * static_cast<int>(sizeof(Stored)) + weight_bytes;
  static constexpr int backward_bytes =
      (Cell::two_products ? 1 : 2) * backward_buffer * static_cast<int>(sizeof(Stored)) + weight_bytes;
};

// What is the same at every step for a lane: its units, its rows and where they stand.
template <class C>
struct Lane {
  int lane, warp;
  int64_t H, row[2], length[2];
  bool paired;  // two units at a time in memory

  RNNKIT_DEVICE Lane(const Sequence& s, bool pairs) : H(s.H), paired(pairs) {
    lane = arch::thread() % 32, warp = arch::thread() / 32;
    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      row[i] = static_cast<int64_t>(arch::block_x()) * C::rows + lane % 4 * 2 + i;
      length[i] = length_of(s, row[i]);
    }
  }
  // The first of a lane's two units of a block of 16, and how many of the two there are.
  RNNKIT_DEVICE int unit(int block) const { return (warp * C::blocks + block) * 16 + lane / 4 * 2; }
  RNNKIT_DEVICE int inside(int block) const {
    const int64_t left = H - unit(block);
    return left < 0 ? 0 : left > 2 ? 2 : static_cast<int>(left);
  }
};

// A warp's fragments of W_hh or W_hh^T. Those in registers and those in shared memory alternate evenly, so
// that loads spread over the product.
template <class C>
struct Weights {
  using F = Fragments<typename C::O>;
  Vec16B kept[C::kept > 0 ? C::kept : 1][2];
  Vec16B* shared;

  // The fragment of 16 units, one gate, some terms.
  RNNKIT_DEVICE static constexpr int number(int k_tile, int block, int gate) {
    return (k_tile * C::blocks + block) * C::G + gate;
  }
  RNNKIT_DEVICE static constexpr bool in_registers(int n) {
    return (n + 1) * C::kept / C::fragments != n * C::kept / C::fragments;
  }
  RNNKIT_DEVICE static constexpr int kept_at(int n) { return n * C::kept / C::fragments; }

  // w: rows of units, `gate_stride` elements from one gate's rows to the next gate's, `pitch` from a row to
  // the next; terms 0 .. H - 1 of each. aligned16: its rows begin at multiples of 16 bytes.
  RNNKIT_DEVICE Weights(unsigned char* memory, const Lane<C>& at, const void* w, int64_t gate_stride,
                        int64_t pitch, bool aligned16) {
    shared = reinterpret_cast<Vec16B*>(memory + at.warp * C::shared_fragments * C::fragment_bytes) +
             F::piece(at.lane);
    const auto* from = static_cast<const typename C::Stored*>(w);
    RNNKIT_UNROLL
    for (int k_tile = 0; k_tile < C::k_tiles; ++k_tile) {
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int gate = 0; gate < C::G; ++gate) {
          const int n = number(k_tile, block, gate);
          RNNKIT_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int64_t unit = at.unit(block) + i, end = unit < at.H ? at.H : 0;
            const Vec16B v = F::load(from + gate * gate_stride + unit * pitch,
                                     k_tile * F::terms + F::term(at.lane), end, aligned16);
            if (in_registers(n)) {
              kept[kept_at(n)][i] = v;
            } else if (C::O::tensor || at.lane % 4 == 0) {  // one of the lanes that have the same piece
              shared[((n - kept_at(n)) * 2 + i) * F::pieces] = v;
            }
          }
        }
      }
    }
  }

  RNNKIT_DEVICE Vec16B get(int n, int i) const {
    return in_registers(n) ? kept[kept_at(n)][i] : shared[((n - kept_at(n)) * 2 + i) * F::pieces];
  }

  // A lane's pieces of the batch: rows of `pitch` elements in shared memory, from a column on.
  RNNKIT_DEVICE static void batch(Vec16B (&b)[F::columns], const typename C::Stored* rows, int pitch,
                                  int column, int lane) {
    RNNKIT_UNROLL
    for (int i = 0; i < F::columns; ++i) {
      b[i] = *reinterpret_cast<const Vec16B*>(rows + F::column(lane, i) * pitch + column + F::term(lane));
    }
  }
};

// Two operands of neighbouring units, into a row in shared memory.
template <class O>
RNNKIT_DEVICE void store_operand_pair(typename O::Stored* to, typename O::Real a, typename O::Real b) {
  using Two = typename Memory<O>::Two;
  Two two = {{O::narrow(a), O::narrow(b)}};
  if constexpr (sizeof(typename O::Stored) == 4) {
    uint32_t words[2];
    memcpy(words, &two, sizeof words);
    words[0] = O::operand(words[0]), words[1] = O::operand(words[1]);
    memcpy(&two, words, sizeof words);
  }
  *reinterpret_cast<Two*>(to) = two;
}

// Refuses what a configuration does not hold.
template <class C>
void expect_held(const char* name, const Sequence& s) {
  if (s.H <= C::units && s.N == s.H) return;
  std::ostringstream message;
  message << "rnnkit: CUDA kernel " << name << " holds up to " << C::units
          << " units and no projection, got H=" << s.H << " and a state of " << s.N
          << "; a kernel of the regime step takes any";
  throw std::runtime_error(message.str());
}

// Zeros in shared memory, by all threads.
template <class C>
RNNKIT_DEVICE void clear(typename C::Stored* memory, int count) {
  for (int i = arch::thread(); i < count; i += C::threads) memory[i] = typename C::Stored{};
}

}  // namespace rnnkit::cuda

#include "cta_backward.cuh"
#include "cta_forward.cuh"

// One row of the table, the whole of a source.
#define RNNKIT_CTA(NAME, CELL, KIND, UNITS, WARPS, FORWARD_KEPT, BACKWARD_KEPT)                         \
  namespace rnnkit::cuda {                                                                              \
  namespace {                                                                                           \
  constexpr char name[] = #NAME;                                                                        \
  using ForwardConfiguration = Cta<cell::CELL, kind::KIND, UNITS, WARPS, FORWARD_KEPT>;                 \
  using BackwardConfiguration = Cta<cell::CELL, kind::KIND, UNITS, WARPS, BACKWARD_KEPT>;               \
  int64_t no_bytes(const Forward&) { return 0; }                                                        \
  int64_t no_bytes_back(const Backward&) { return 0; }                                                  \
  void run(const Forward& f, Stream stream) { run_cta_forward<ForwardConfiguration>(name, f, stream); } \
  void run_back(const Backward& b, Stream stream) {                                                     \
    run_cta_backward<BackwardConfiguration>(name, b, stream);                                           \
  }                                                                                                     \
  Kernel kernel = {name, no_bytes, run, no_bytes_back, run_back, nullptr};                              \
  const Entry entry(kernel);                                                                            \
  }                                                                                                     \
  }
