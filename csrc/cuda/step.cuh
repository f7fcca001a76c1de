// The regime for any size: at each step a product over all multiprocessors with the gate math behind it in
// the same kernel, one launch a step (two for an LSTM with a projection and for the original GRU, which have
// two products). The state lies in memory. Nothing waits for the host, so a CUDA graph can hold a scan.
//
// clang-format off
//     grid: rows of the batch / (8 TILES)  x  units / 16       a block: 16 units of every gate
//
//     warp 0  terms 0 .. 31,  256 .. 287 ..  |  W_hh straight from memory (the cache, where it fits) to
//     warp 1  terms 32 .. 63, 288 .. 319 ..  |  registers, 16 bytes a lane: each element once for 8 TILES rows
//     ...                                    |  sums through shared memory, added in one order
//     warp 7                                 |  gate math, a thread a cell; the new state to the other buffer
// clang-format on
//
// Here is the product and what both passes share; step_forward.cuh and step_backward.cuh say what happens to
// the sums.

#pragma once

#include "cells.cuh"

namespace rnnkit::cuda {

template <class Cell_, class Kind, int WARPS, int TILES_>
struct Step {
  using Cell = Cell_;
  using O = Kind;
  using Stored = typename O::Stored;
  using Real = typename O::Real;
  static constexpr int warps = WARPS, threads = 32 * WARPS;
  static constexpr int TILES = TILES_;  // of 8 rows
  static constexpr int rows = 8 * TILES;
};

// Weights in memory: `blocks` blocks of `units` rows, `block_stride` elements from one to the next.
struct Matrix {
  const void* data;
  int64_t units, block_stride, pitch, terms;
  bool aligned16;  // rows begin at multiples of 16 bytes
};

// Operands in memory, a row for each row of the batch; data null: no product, all sums are 0.
struct Operands {
  const void* data;
  int64_t pitch;
  bool aligned16;
};

template <class Stored>
Matrix matrix(const void* data, int64_t units, int64_t block_stride, int64_t pitch, int64_t terms) {
  const bool aligned16 = pitch * static_cast<int64_t>(sizeof(Stored)) % 16 == 0 && aligned(16, {data});
  return {data, units, block_stride, pitch, terms, aligned16};
}
template <class Stored>
Operands operands(const void* data, int64_t pitch) {
  return {data, pitch, pitch * static_cast<int64_t>(sizeof(Stored)) % 16 == 0 && aligned(16, {data})};
}

// epilogue(unit, row, sums of the BLOCKS gates), once for each cell inside.
template <class S, int BLOCKS, class Epilogue>
RNNKIT_KERNEL(S::threads)
step(const Matrix m, const Operands a, const int64_t B, const Epilogue epilogue) {
  using F = Fragments<typename S::O>;
  using Real = typename S::Real;
  using Stored = typename S::Stored;
  RNNKIT_SHARED(memory);
  auto* const shared = reinterpret_cast<Real*>(memory);  // [warps][BLOCKS][TILES][4][32 lanes]
  const int lane = arch::thread() % 32, warp = arch::thread() / 32;
  const int64_t first_row = static_cast<int64_t>(arch::block_x()) * S::rows;
  const int64_t first_unit = static_cast<int64_t>(arch::block_y()) * 16;

  Real sums[BLOCKS][S::TILES][4] = {};
  const int64_t k_tiles = a.data == nullptr ? 0 : (m.terms + F::terms - 1) / F::terms;
  for (int64_t k_tile = warp; k_tile < k_tiles; k_tile += S::warps) {
    const int64_t k = k_tile * F::terms + F::term(lane);
    Vec16B w[BLOCKS][2], b[S::TILES][F::columns];
    RNNKIT_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      RNNKIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t unit = first_unit + lane / 4 * 2 + i;
        const auto* row = static_cast<const Stored*>(m.data) + block * m.block_stride + unit * m.pitch;
        w[block][i] = F::load(row, k, unit < m.units ? m.terms : 0, m.aligned16);
      }
    }
    RNNKIT_UNROLL
    for (int tile = 0; tile < S::TILES; ++tile) {
      RNNKIT_UNROLL
      for (int i = 0; i < F::columns; ++i) {
        const int64_t row = first_row + tile * 8 + F::column(lane, i);
        b[tile][i] = F::load(static_cast<const Stored*>(a.data) + row * a.pitch, k, row < B ? m.terms : 0,
                             a.aligned16);
      }
    }
    RNNKIT_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      RNNKIT_UNROLL
      for (int tile = 0; tile < S::TILES; ++tile)
        F::multiply(sums[block][tile], w[block][0], w[block][1], b[tile]);
    }
  }
  RNNKIT_UNROLL
  for (int block = 0; block < BLOCKS; ++block) {
    RNNKIT_UNROLL
    for (int tile = 0; tile < S::TILES; ++tile) {
      RNNKIT_UNROLL
      for (int j = 0; j < 4; ++j) {
        shared[(((warp * BLOCKS + block) * S::TILES + tile) * 4 + j) * 32 + lane] = sums[block][tile][j];
      }
    }
  }
  arch::sync();
  for (int cell = arch::thread(); cell < S::TILES * 128; cell += S::threads) {
    const int of = cell % 32, j = cell / 32 % 4, tile = cell / 128;
    const int64_t unit = first_unit + of / 4 * 2 + j / 2, row = first_row + tile * 8 + of % 4 * 2 + j % 2;
    if (unit >= m.units || row >= B) continue;
    Real total[BLOCKS];
    RNNKIT_UNROLL
    for (int block = 0; block < BLOCKS; ++block) {
      total[block] = shared[((block * S::TILES + tile) * 4 + j) * 32 + of];
      for (int other = 1; other < S::warps; ++other) {
        total[block] += shared[(((other * BLOCKS + block) * S::TILES + tile) * 4 + j) * 32 + of];
      }
    }
    epilogue(unit, row, total);
  }
}

// Shared memory of a product of so many blocks.
template <class S>
constexpr int step_bytes(int blocks) {
  return S::warps * blocks * S::TILES * 128 * static_cast<int>(sizeof(typename S::Real));
}

template <class S, int BLOCKS, class Epilogue>
void launch_step(const Launch& what, const Matrix& m, const Operands& a, int64_t B, Stream stream,
                 const Epilogue& epilogue) {
  const Grid grid{(B + S::rows - 1) / S::rows, (m.units + 15) / 16};
  arch::launch(what, step<S, BLOCKS, Epilogue>, grid, S::threads, step_bytes<S>(BLOCKS), stream, m, a, B,
               epilogue);
}

// epilogue(i) for i in 0 .. count - 1, a thread each.
template <class Epilogue>
RNNKIT_KERNEL(256)
each(const int64_t count, const Epilogue epilogue) {
  const int64_t i = static_cast<int64_t>(arch::block_x()) * 256 + arch::thread();
  if (i < count) epilogue(i);
}

template <class Epilogue>
void launch_each(const Launch& what, int64_t count, Stream stream, const Epilogue& epilogue) {
  if (count > 0)
    arch::launch(what, each<Epilogue>, Grid{(count + 255) / 256, 1}, 256, 0, stream, count, epilogue);
}

// Pieces of a workspace, at multiples of 256 bytes; without one it counts them.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(memory_ == nullptr ? nullptr : memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

}  // namespace rnnkit::cuda

#include "step_backward.cuh"
#include "step_forward.cuh"

// One row of the table, the whole of a source.
#define RNNKIT_STEP(NAME, CELL, KIND, WARPS, TILES)                                                          \
  namespace rnnkit::cuda {                                                                                   \
  namespace {                                                                                                \
  constexpr char name[] = #NAME;                                                                             \
  using Configuration = Step<cell::CELL, kind::KIND, WARPS, TILES>;                                          \
  int64_t bytes(const Forward& f) { return StepForward<Configuration>(f, nullptr).workspace.used(); }        \
  int64_t bytes_back(const Backward& b) { return StepBackward<Configuration>(b, nullptr).workspace.used(); } \
  void run(const Forward& f, Stream stream) { run_step_forward<Configuration>(name, f, stream); }            \
  void run_back(const Backward& b, Stream stream) { run_step_backward<Configuration>(name, b, stream); }     \
  Kernel kernel = {name, bytes, run, bytes_back, run_back, nullptr};                                         \
  const Entry entry(kernel);                                                                                 \
  }                                                                                                          \
  }
