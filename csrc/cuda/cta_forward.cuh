// The forward kernel of the regime that keeps W_hh on one multiprocessor; cta.cuh has the picture. Included
// by it.

#pragma once

#include "cta.cuh"

namespace rnnkit::cuda {

// acc [block][gate] += W_hh of gates FIRST .. FIRST + COUNT - 1 by the rows in shared memory. CHAINS sums of
// each take turns, where there are few: a product waits for the one before it into the same sum.
template <class C, int FIRST, int COUNT>
RNNKIT_DEVICE void product(typename C::Real (&acc)[C::blocks][COUNT][4], const Weights<C>& w,
                           const typename C::Stored* rows, int lane) {
  using F = Fragments<typename C::O>;
  constexpr int CHAINS = C::blocks * COUNT >= 4 || C::k_tiles < 2 ? 1 : 2;
  typename C::Real sums[CHAINS][C::blocks][COUNT][4] = {};
  RNNKIT_UNROLL
  for (int k_tile = 0; k_tile < C::k_tiles; ++k_tile) {
    Vec16B b[F::columns];
    w.batch(b, rows, C::forward_pitch, k_tile * F::terms, lane);
    RNNKIT_UNROLL
    for (int block = 0; block < C::blocks; ++block) {
      RNNKIT_UNROLL
      for (int gate = 0; gate < COUNT; ++gate) {
        const int n = w.number(k_tile, block, FIRST + gate);
        F::multiply(sums[k_tile % CHAINS][block][gate], w.get(n, 0), w.get(n, 1), b);
      }
    }
  }
  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int gate = 0; gate < COUNT; ++gate) {
      RNNKIT_UNROLL
      for (int j = 0; j < 4; ++j) {
        acc[block][gate][j] = sums[0][block][gate][j] + (CHAINS == 2 ? sums[CHAINS - 1][block][gate][j] : 0);
      }
    }
  }
}

template <class C>
RNNKIT_KERNEL(C::threads)
cta_forward(const Forward f, const bool paired, const bool aligned16) {
  using O = typename C::O;
  using Cell = typename C::Cell;
  using Mem = Memory<O>;
  using Real = typename C::Real;
  using Stored = typename C::Stored;
  constexpr int G = C::G, K = Cell::K, SAVED = K > 0 ? K : 1;
  RNNKIT_SHARED(memory);
  auto* const buffers = reinterpret_cast<Stored*>(memory);  // [2][8][pitch]
  const Lane<C> me(f, paired);
  const Weights<C> w(memory + 2 * C::forward_buffer * sizeof(Stored), me, f.w_hh, f.H * f.H, f.H, aligned16);
  clear<C>(buffers, 2 * C::forward_buffer);
  arch::sync();

  // A lane's cells, [block][2 unit + row].
  Real h[C::blocks][4], c[C::blocks][4], bias[C::blocks][2] = {};
  typename Mem::Two x[C::blocks][G][2];  // gx of the step to come, [block][gate][row]
  const auto fetch = [&](int64_t k) {
    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t j = time_index(f, k, false);
      const bool valid = f.t0 + j < me.length[i];
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int gate = 0; gate < G; ++gate) {
          const int64_t at = ((j * f.B + me.row[i]) * G + gate) * f.H + me.unit(block);
          x[block][gate][i] = Mem::load(f.gx, at, valid ? me.inside(block) : 0, paired);
        }
      }
    }
  };
  // Whether the state of a row is replaced before the k-th step. Asked a product before it is needed.
  const auto reset_before = [&](int64_t k, int i) {
    return k < f.n && resets_before(f, f.t0 + time_index(f, k, false), me.row[i], me.length[i]);
  };
  // Replaces it.
  const auto apply_reset = [&](int i) {
    RNNKIT_UNROLL
    for (int block = 0; block < C::blocks; ++block) {
      RNNKIT_UNROLL
      for (int u = 0; u < 2; ++u) {
        if (u >= me.inside(block)) continue;
        const int64_t at = me.row[i] * f.H + me.unit(block) + u;
        h[block][2 * u + i] = Mem::load(f.h_r, at);
        if (Cell::has_c) c[block][2 * u + i] = Mem::load(f.c_r, at);
      }
    }
  };
  // h, or r h, as operands of the next product.
  const auto store_operands = [&](Stored* to, const Real(&v)[C::blocks][4]) {
    RNNKIT_UNROLL
    for (int block = 0; block < C::blocks; ++block) {
      RNNKIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        store_operand_pair<O>(to + (me.lane % 4 * 2 + i) * C::forward_pitch + me.unit(block), v[block][i],
                              v[block][2 + i]);
      }
    }
  };

  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bool there = j / 2 < me.inside(block) && me.row[j % 2] < f.B;
      const int64_t at = me.row[j % 2] * f.H + me.unit(block) + j / 2;
      h[block][j] = there ? Mem::load(f.h_0, at) : Real(0);
      c[block][j] = there && Cell::has_c ? Mem::load(f.c_0, at) : Real(0);
      if (j < 2 && f.b_hn != nullptr && j < me.inside(block))
        bias[block][j] = Mem::load(f.b_hn, me.unit(block) + j);
    }
  }
  if (f.n > 0) {
    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (reset_before(0, i)) apply_reset(i);
    }
    fetch(0);
  }
  store_operands(buffers, h);
  arch::sync();

  for (int64_t k = 0; k < f.n; ++k) {
    // A cell with two products has h in the first buffer and r h in the second; others use both by turns.
    Stored* const now = buffers + (Cell::two_products ? 0 : k % 2 * C::forward_buffer);
    Stored* const other = buffers + (Cell::two_products || k % 2 == 0 ? C::forward_buffer : 0);
    const int64_t t = f.t0 + time_index(f, k, false);
    const bool reset[2] = {reset_before(k + 1, 0), reset_before(k + 1, 1)};
    Real saved[C::blocks][4][SAVED], new_state[C::blocks][4];

    if constexpr (Cell::two_products) {
      Real acc[C::blocks][2][4], last[C::blocks][1][4], rh[C::blocks][4];
      product<C, 0, 2>(acc, w, now, me.lane);
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          const Real sums[2] = {acc[block][0][j], acc[block][1][j]};
          Real in[G];
          RNNKIT_UNROLL
          for (int gate = 0; gate < G; ++gate) in[gate] = O::widen(x[block][gate][j % 2].v[j / 2]);
          Cell::template forward_gates<typename O::Math>(in, sums, saved[block][j]);
          rh[block][j] = j / 2 < me.inside(block) ? saved[block][j][0] * h[block][j] : Real(0);
        }
      }
      store_operands(other, rh);
      arch::sync();
      product<C, 2, 1>(last, w, other, me.lane);
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Real in[G] = {};
          in[2] = O::widen(x[block][2][j % 2].v[j / 2]);
          new_state[block][j] = Cell::template forward_state<typename O::Math>(in, last[block][0][j],
                                                                               h[block][j], saved[block][j]);
        }
      }
    } else {
      Real acc[C::blocks][G][4];
      product<C, 0, G>(acc, w, now, me.lane);
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Real in[G], sums[G], next_c = c[block][j];
          RNNKIT_UNROLL
          for (int gate = 0; gate < G; ++gate) {
            in[gate] = O::widen(x[block][gate][j % 2].v[j / 2]);
            sums[gate] = acc[block][gate][j];
          }
          sums[G - 1] += bias[block][j / 2];
          new_state[block][j] = Cell::template forward<typename O::Math>(f.relu, in, sums, h[block][j],
                                                                         next_c, saved[block][j]);
          if (Cell::has_c && t < me.length[j % 2]) c[block][j] = next_c;
        }
      }
    }
    if (k + 1 < f.n) fetch(k + 1);

    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool valid = t < me.length[i];
      const int64_t at = (t - f.t0) * f.B + me.row[i];
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        const int inside = me.row[i] < f.B ? me.inside(block) : 0;
        const int64_t unit = me.unit(block);
        RNNKIT_UNROLL
        for (int u = 0; u < 2; ++u) {
          if (valid && u < inside) h[block][2 * u + i] = new_state[block][2 * u + i];
        }
        const Real(&v)[4] = h[block];
        Mem::store(f.y, at * f.H + unit, inside, paired, valid ? v[i] : Real(0), valid ? v[2 + i] : Real(0));
        if (Cell::has_c && f.c_all != nullptr) {
          Mem::store(f.c_all, at * f.H + unit, inside, paired, valid ? c[block][i] : Real(0),
                     valid ? c[block][2 + i] : Real(0));
        }
        if (K > 0 && f.gates != nullptr) {
          RNNKIT_UNROLL
          for (int s = 0; s < K; ++s) {
            Mem::store(f.gates, (at * K + s) * f.H + unit, inside, paired, saved[block][i][s],
                       saved[block][2 + i][s]);
          }
        }
      }
      if (reset[i]) apply_reset(i);
    }
    store_operands(Cell::two_products ? now : other, h);
    arch::sync();
  }

  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (j / 2 >= me.inside(block) || me.row[j % 2] >= f.B) continue;
      const int64_t at = me.row[j % 2] * f.H + me.unit(block) + j / 2;
      Mem::store(f.h_n, at, h[block][j]);
      if (Cell::has_c) Mem::store(f.c_n, at, c[block][j]);
    }
  }
}

template <class C>
void run_cta_forward(const char* name, const Forward& f, Stream stream) {
  expect_held<C>(name, f);
  constexpr int stored = static_cast<int>(sizeof(typename C::Stored));
  const bool paired = f.H % 2 == 0 && aligned(2 * stored, {f.gx, f.y, f.c_all, f.gates});
  const bool aligned16 = f.H * stored % 16 == 0 && aligned(16, {f.w_hh});
  arch::launch(Launch(name, "forward", "cta_forward"), cta_forward<C>, Grid{(f.B + C::rows - 1) / C::rows, 1},
               C::threads, C::forward_bytes, stream, f, paired, aligned16);
}

}  // namespace rnnkit::cuda
