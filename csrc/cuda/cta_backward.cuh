// The backward kernel of the regime that keeps W_hh^T on one multiprocessor; cta.cuh has the picture.
// Included by it.
//
// Of a cell without a loss behind it (all that arrives is 0) no gradient goes on, by selection: what the
// forward saved there may be NaN, beyond a reset or a length.

#pragma once

#include "cta.cuh"

namespace rnnkit::cuda {

// sums [block] += W_hh^T of gates FIRST .. FIRST + COUNT - 1 by the gradients in shared memory. Sums take
// turns, as in the forward.
template <class C, int FIRST, int COUNT>
RNNKIT_DEVICE void product_back(typename C::Real (&acc)[C::blocks][4], const Weights<C>& w,
                                const typename C::Stored* rows, int lane) {
  using F = Fragments<typename C::O>;
  constexpr int LONG = COUNT * C::k_tiles;
  constexpr int WANTED = C::blocks >= 4 ? 1 : C::blocks >= 2 ? 2 : 4;
  constexpr int CHAINS = WANTED < LONG ? WANTED : LONG;
  typename C::Real sums[CHAINS][C::blocks][4] = {};
  RNNKIT_UNROLL
  for (int gate = 0; gate < COUNT; ++gate) {
    RNNKIT_UNROLL
    for (int k_tile = 0; k_tile < C::k_tiles; ++k_tile) {
      Vec16B b[F::columns];
      w.batch(b, rows, C::backward_pitch, (FIRST + gate) * C::width + k_tile * F::terms, lane);
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        const int n = w.number(k_tile, block, FIRST + gate);
        F::multiply(sums[(gate * C::k_tiles + k_tile) % CHAINS][block], w.get(n, 0), w.get(n, 1), b);
      }
    }
  }
  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      acc[block][j] = sums[0][block][j];
      RNNKIT_UNROLL
      for (int chain = 1; chain < CHAINS; ++chain) acc[block][j] += sums[chain][block][j];
    }
  }
}

template <class C>
RNNKIT_KERNEL(C::threads)
cta_backward(const Backward b, const bool paired, const bool aligned16) {
  using O = typename C::O;
  using Cell = typename C::Cell;
  using Mem = Memory<O>;
  using Math = typename O::Math;
  using Real = typename C::Real;
  using Stored = typename C::Stored;
  using Two = typename Mem::Two;
  constexpr int G = C::G, K = Cell::K, SAVED = K > 0 ? K : 1;
  constexpr int BUFFERS = Cell::two_products ? 1 : 2;
  RNNKIT_SHARED(memory);
  auto* const buffers =
      reinterpret_cast<Stored*>(memory);  // [BUFFERS][8][pitch], a gate's units `width` apart
  const Lane<C> me(b, paired);
  const Weights<C> w(memory + BUFFERS * C::backward_buffer * sizeof(Stored), me, b.w_t, b.H, G * b.H,
                     aligned16);
  clear<C>(buffers, BUFFERS * C::backward_buffer);
  const bool guarded = b.lengths != nullptr || b.reset != nullptr;

  Real dh[C::blocks][4], dc[C::blocks][4];
  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bool there = j / 2 < me.inside(block) && me.row[j % 2] < b.B;
      const int64_t at = me.row[j % 2] * b.H + me.unit(block) + j / 2;
      dh[block][j] = there ? Mem::load(b.gh_n, at) : Real(0);
      dc[block][j] = there && Cell::has_c ? Mem::load(b.gc_n, at) : Real(0);
      if (there && b.dh_r.data != nullptr) {
        Mem::store(b.dh_r, at, Real(0));
        if (Cell::has_c) Mem::store(b.dc_r, at, Real(0));
      }
    }
  }
  arch::sync();

  // What the step to come reads, [block][...][row].
  Two saved[C::blocks][SAVED][2], gy[C::blocks][2], gc[C::blocks][2], before[C::blocks][2],
      after[C::blocks][2];
  // Whether the state before the step that is processed, the next one, the one after that was replaced: known
  // a step ahead of what depends on it.
  const auto reset_before = [&](int64_t k, int i) {
    return k < b.n && resets_before(b, time_index(b, k, true), me.row[i], me.length[i]);
  };
  bool reset[3][2] = {{reset_before(0, 0), reset_before(0, 1)}, {reset_before(0, 0), reset_before(0, 1)}};
  const auto fetch = [&](int64_t k) {
    const int64_t t = time_index(b, k, true);
    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool valid = t < me.length[i];
      const int64_t at = t * b.B + me.row[i];
      const int64_t earlier = previous_time(b, t, me.length[i]);
      const bool replaced = reset[1][i];
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        const int inside = valid ? me.inside(block) : 0;
        const int64_t unit = me.unit(block), cell = at * b.H + unit;
        RNNKIT_UNROLL
        for (int s = 0; s < K; ++s) {
          saved[block][s][i] = Mem::load(b.gates, (at * K + s) * b.H + unit, inside, paired);
        }
        gy[block][i] = Mem::load(b.gy, cell, b.gy != nullptr ? inside : 0, paired);
        if (Cell::has_c) gc[block][i] = Mem::load(b.gc_all, cell, b.gc_all != nullptr ? inside : 0, paired);
        if (!Cell::from_h) after[block][i] = Mem::load(Cell::has_c ? b.c_all : b.y, cell, inside, paired);
        if (Cell::has_c || Cell::from_h) {
          const State& first = replaced ? (Cell::has_c ? b.c_r : b.h_r) : (Cell::has_c ? b.c_0 : b.h_0);
          if (earlier >= 0 && !replaced) {
            before[block][i] = Mem::load(Cell::has_c ? b.c_all : b.y,
                                         (earlier * b.B + me.row[i]) * b.H + unit, inside, paired);
          } else {
            RNNKIT_UNROLL
            for (int u = 0; u < 2; ++u) {
              before[block][i].v[u] =
                  O::narrow(u < inside ? Mem::load(first, me.row[i] * b.H + unit + u) : Real(0));
            }
          }
        }
      }
      reset[2][i] = reset_before(k + 1, i);
    }
  };
  if (b.n > 0) fetch(0);

  for (int64_t k = 0; k < b.n; ++k) {
    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) reset[0][i] = reset[1][i], reset[1][i] = reset[2][i];
    Stored* const rows = buffers + (Cell::two_products ? 0 : k % 2 * C::backward_buffer);
    const int64_t t = time_index(b, k, true);
    const bool valid[2] = {t < me.length[0], t < me.length[1]};
    Real direct[C::blocks][4] = {}, back[C::blocks][4];
    // Gradients of some gates, as operands and in memory; v [block][2 unit + row][gate].
    const auto store_operands = [&](const auto& v, int gate, int index, bool operand, void* out) {
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Real a = v[block][i][index], e = v[block][2 + i][index];
          if (operand) {
            store_operand_pair<O>(
                rows + (me.lane % 4 * 2 + i) * C::backward_pitch + gate * C::width + me.unit(block), a, e);
          }
          if (out != nullptr) {
            const int inside = me.row[i] < b.B ? me.inside(block) : 0;
            Mem::store(out, ((t * b.B + me.row[i]) * G + gate) * b.H + me.unit(block), inside, paired, a, e);
          }
        }
      }
    };
    const auto read = [&](int block, int j, Real& d, Real(&kept)[SAVED], Real& was) {
      d = valid[j % 2] && j / 2 < me.inside(block) ? dh[block][j] + O::widen(gy[block][j % 2].v[j / 2])
                                                   : Real(0);
      RNNKIT_UNROLL
      for (int s = 0; s < K; ++s) kept[s] = O::widen(saved[block][s][j % 2].v[j / 2]);
      was = Cell::has_c || Cell::from_h ? O::widen(before[block][j % 2].v[j / 2]) : Real(0);
    };

    if constexpr (Cell::two_products) {
      Real dn[C::blocks][4][1], drz[C::blocks][4][2], drh[C::blocks][4];
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Real d, kept[SAVED], was;
          read(block, j, d, kept, was);
          dn[block][j][0] = Cell::template backward_state<Math>(d, kept, was);
          if (guarded && d == Real(0)) dn[block][j][0] = Real(0);
        }
      }
      store_operands(dn, 2, 0, true, b.dgx);
      arch::sync();
      product_back<C, 2, 1>(drh, w, rows, me.lane);
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Real d, kept[SAVED], was;
          read(block, j, d, kept, was);
          Cell::template backward_gates<Math>(d, drh[block][j], kept, was, drz[block][j], direct[block][j]);
          if (guarded && d == Real(0) && drh[block][j] == Real(0)) {
            drz[block][j][0] = drz[block][j][1] = direct[block][j] = Real(0);
          }
        }
      }
      store_operands(drz, 0, 0, true, b.dgx);
      store_operands(drz, 1, 1, true, b.dgx);
      if (k + 1 < b.n) fetch(k + 1);
      arch::sync();
      product_back<C, 0, 2>(back, w, rows, me.lane);
    } else {
      Real dx[C::blocks][4][G], ds[C::blocks][4][G];
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          Real d, kept[SAVED], was;
          read(block, j, d, kept, was);
          const bool active = valid[j % 2] && j / 2 < me.inside(block);
          Real d_c = Real(0);
          if (Cell::has_c && active) d_c = dc[block][j] + O::widen(gc[block][j % 2].v[j / 2]);
          const bool idle = guarded && d == Real(0) && d_c == Real(0);
          const Real now = Cell::from_h ? Real(0) : O::widen(after[block][j % 2].v[j / 2]);
          Cell::template backward<Math>(b.relu, d, d_c, kept, was, now, dx[block][j], ds[block][j],
                                        direct[block][j]);
          RNNKIT_UNROLL
          for (int gate = 0; gate < G; ++gate) {
            if (idle) dx[block][j][gate] = ds[block][j][gate] = Real(0);
          }
          if (idle) d_c = direct[block][j] = Real(0);
          if (active) dc[block][j] = d_c;
        }
      }
      RNNKIT_UNROLL
      for (int gate = 0; gate < G; ++gate) {
        store_operands(ds, gate, gate, true, b.dgh != b.dgx ? b.dgh : nullptr);
        store_operands(dx, gate, gate, false, b.dgx);
      }
      if (k + 1 < b.n) fetch(k + 1);
      arch::sync();
      product_back<C, 0, G>(back, w, rows, me.lane);
    }

    RNNKIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      RNNKIT_UNROLL
      for (int block = 0; block < C::blocks; ++block) {
        RNNKIT_UNROLL
        for (int u = 0; u < 2; ++u) {
          const int j = 2 * u + i;
          if (!valid[i] || u >= me.inside(block)) continue;
          dh[block][j] = back[block][j] + direct[block][j];
          if (!reset[0][i]) continue;
          const int64_t at = me.row[i] * b.H + me.unit(block) + u;
          Mem::store(b.dh_r, at, Mem::load(b.dh_r, at) + dh[block][j]);
          dh[block][j] = Real(0);
          if (Cell::has_c) {
            Mem::store(b.dc_r, at, Mem::load(b.dc_r, at) + dc[block][j]);
            dc[block][j] = Real(0);
          }
        }
      }
    }
  }

  RNNKIT_UNROLL
  for (int block = 0; block < C::blocks; ++block) {
    RNNKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (j / 2 >= me.inside(block) || me.row[j % 2] >= b.B) continue;
      const int64_t at = me.row[j % 2] * b.H + me.unit(block) + j / 2;
      Mem::store(b.dh_0, at, dh[block][j]);
      if (Cell::has_c) Mem::store(b.dc_0, at, dc[block][j]);
    }
  }
}

template <class C>
void run_cta_backward(const char* name, const Backward& b, Stream stream) {
  expect_held<C>(name, b);
  constexpr int stored = static_cast<int>(sizeof(typename C::Stored));
  const bool paired =
      b.H % 2 == 0 && aligned(2 * stored, {b.gy, b.gc_all, b.y, b.c_all, b.gates, b.dgx, b.dgh});
  const bool aligned16 = b.H * stored % 16 == 0 && aligned(16, {b.w_t});
  arch::launch(Launch(name, "backward", "cta_backward"), cta_backward<C>,
               Grid{(b.B + C::rows - 1) / C::rows, 1}, C::threads, C::backward_bytes, stream, b, paired,
               aligned16);
}

}  // namespace rnnkit::cuda
