// The forward of the regime for any size: what happens to the sums of a step. step.cuh has the picture and
// the product.

#pragma once

#include "step.cuh"

namespace rnnkit::cuda {

// What is kept between the launches of a scan.
template <class S>
struct StepForward {
  using O = typename S::O;
  using Cell = typename S::Cell;
  using Stored = typename S::Stored;
  using Real = typename S::Real;
  using Mem = Memory<O>;
  Forward f;
  Workspace workspace;
  Real *h, *c;               // [B, N], [B, H] the state, in the type of the computation
  Stored* double_buffer[2];  // [B, N] the state as operands: one is read while the other is written
  Stored* second_operand;    // [B, H] operands of a step's second product: r h, or what W_hr multiplies
  Real* z;                   // [B, H], of the original GRU

  StepForward(const Forward& forward, void* memory) : f(forward), workspace(memory) {
    const int64_t state = f.B * f.N, cells = f.B * f.H;
    h = workspace.take<Real>(state);
    c = workspace.take<Real>(Cell::has_c ? cells : 0);
    for (Stored*& v : double_buffer) v = workspace.take<Stored>(state);
    second_operand = workspace.take<Stored>(Cell::two_products || f.w_hr != nullptr ? cells : 0);
    z = workspace.take<Real>(Cell::two_products ? cells : 0);
  }

  RNNKIT_DEVICE bool reset_before(int64_t k, int64_t row) const {
    return k < f.n && resets_before(f, f.t0 + time_index(f, k, false), row, length_of(f, row));
  }
  // The state of a row from entering step k to entering the one after it; `new_state` is what the step made.
  RNNKIT_DEVICE void carry(int64_t k, int64_t unit, int64_t row, Real new_state) const {
    const int64_t j = time_index(f, k, false), at = row * f.N + unit;
    const bool valid = f.t0 + j < length_of(f, row);
    Mem::store(f.y, j * f.B * f.N + at, valid ? new_state : Real(0));
    Real v = valid ? new_state : h[at];
    if (reset_before(k + 1, row)) v = Mem::load(f.h_r, at);
    h[at] = v;
    double_buffer[(k + 1) % 2][at] = O::narrow(v);
  }
  RNNKIT_DEVICE void carry_c(int64_t k, int64_t unit, int64_t row, Real new_state) const {
    const int64_t j = time_index(f, k, false), at = row * f.H + unit;
    const bool valid = f.t0 + j < length_of(f, row);
    if (f.c_all != nullptr) Mem::store(f.c_all, j * f.B * f.H + at, valid ? new_state : Real(0));
    Real v = valid ? new_state : c[at];
    if (reset_before(k + 1, row)) v = Mem::load(f.c_r, at);
    c[at] = v;
  }
  // gx of a cell, zeros at padding.
  RNNKIT_DEVICE void inputs(int64_t k, int64_t unit, int64_t row, Real (&x)[Cell::G]) const {
    const int64_t j = time_index(f, k, false);
    const bool valid = f.t0 + j < length_of(f, row);
    RNNKIT_UNROLL
    for (int gate = 0; gate < Cell::G; ++gate) {
      x[gate] = valid ? Mem::load(f.gx, ((j * f.B + row) * Cell::G + gate) * f.H + unit) : Real(0);
    }
  }
  RNNKIT_DEVICE void save(int64_t k, int64_t unit, int64_t row, int block, Real v) const {
    if (f.gates == nullptr) return;
    Mem::store(f.gates, ((time_index(f, k, false) * f.B + row) * Cell::K + block) * f.H + unit, v);
  }

  // The state before the first step.
  struct Begin {
    StepForward s;
    RNNKIT_DEVICE void operator()(int64_t i) const {
      const Forward& f = s.f;
      if (i < f.B * f.N) {
        const bool reset = s.reset_before(0, i / f.N);
        const Real v = Mem::load(reset ? f.h_r : f.h_0, i);
        s.h[i] = v;
        s.double_buffer[0][i] = O::narrow(v);
      }
      if (Cell::has_c && i < f.B * f.H) s.c[i] = Mem::load(s.reset_before(0, i / f.H) ? f.c_r : f.c_0, i);
    }
  };
  // And after the last.
  struct End {
    StepForward s;
    RNNKIT_DEVICE void operator()(int64_t i) const {
      if (i < s.f.B * s.f.N) Mem::store(s.f.h_n, i, s.h[i]);
      if (Cell::has_c && i < s.f.B * s.f.H) Mem::store(s.f.c_n, i, s.c[i]);
    }
  };

  // A step of a cell with one product.
  struct Gates {
    StepForward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sums)[Cell::G]) const {
      const Forward& f = s.f;
      constexpr int SAVED = Cell::K > 0 ? Cell::K : 1;
      const int64_t at = row * f.H + unit;
      Real x[Cell::G], total[Cell::G], saved[SAVED], next_c = Cell::has_c ? s.c[at] : Real(0);
      s.inputs(k, unit, row, x);
      RNNKIT_UNROLL
      for (int gate = 0; gate < Cell::G; ++gate) total[gate] = sums[gate];
      if (f.b_hn != nullptr) total[Cell::G - 1] += Mem::load(f.b_hn, unit);
      const Real before = Cell::from_h ? s.h[at] : Real(0);
      const Real new_state =
          Cell::template forward<typename O::Math>(f.relu, x, total, before, next_c, saved);
      RNNKIT_UNROLL
      for (int block = 0; block < Cell::K; ++block) s.save(k, unit, row, block, saved[block]);
      if (Cell::has_c) s.carry_c(k, unit, row, next_c);
      if (f.w_hr != nullptr) {
        s.second_operand[at] = O::narrow(new_state);
      } else {
        s.carry(k, unit, row, new_state);
      }
    }
  };
  // The projected state of a step.
  struct Project {
    StepForward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      s.carry(k, unit, row, sum[0]);
    }
  };
  // The two halves of a step of the original GRU.
  struct First {
    StepForward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sums)[2]) const {
      const int64_t at = row * s.f.H + unit;
      Real x[Cell::G], saved[3];
      s.inputs(k, unit, row, x);
      Cell::template forward_gates<typename O::Math>(x, sums, saved);
      s.save(k, unit, row, 0, saved[0]);
      s.save(k, unit, row, 1, saved[1]);
      s.z[at] = saved[1];
      s.second_operand[at] = O::narrow(saved[0] * s.h[at]);
    }
  };
  struct Second {
    StepForward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      const int64_t at = row * s.f.H + unit;
      Real x[Cell::G], saved[3] = {Real(0), s.z[at], Real(0)};
      s.inputs(k, unit, row, x);
      const Real new_state = Cell::template forward_state<typename O::Math>(x, sum[0], s.h[at], saved);
      s.save(k, unit, row, 2, saved[2]);
      s.carry(k, unit, row, new_state);
    }
  };
};

template <class S>
void run_step_forward(const char* name, const Forward& f, Stream stream) {
  using Scan = StepForward<S>;
  using Stored = typename S::Stored;
  using Cell = typename S::Cell;
  const Scan s(f, f.workspace);
  const auto of = [name](const char* function, int64_t k = -1) {
    return Launch(name, "forward", function, k);
  };
  const int64_t most = f.B * (f.H > f.N ? f.H : f.N);
  const auto* w_hh = static_cast<const Stored*>(f.w_hh);
  launch_each(of("each<Begin>"), most, stream, typename Scan::Begin{s});
  for (int64_t k = 0; k < f.n; ++k) {
    const Operands state = operands<Stored>(s.double_buffer[k % 2], f.N);
    if constexpr (Cell::two_products) {
      const int64_t inside = 2 * f.H * f.H;  // where the rows of gate n begin
      launch_step<S, 2>(of("step<First>", k), matrix<Stored>(w_hh, f.H, f.H * f.H, f.H, f.H), state, f.B,
                        stream, typename Scan::First{s, k});
      launch_step<S, 1>(of("step<Second>", k), matrix<Stored>(w_hh + inside, f.H, 0, f.H, f.H),
                        operands<Stored>(s.second_operand, f.H), f.B, stream, typename Scan::Second{s, k});
    } else {
      launch_step<S, Cell::G>(of("step<Gates>", k), matrix<Stored>(w_hh, f.H, f.H * f.N, f.N, f.N), state,
                              f.B, stream, typename Scan::Gates{s, k});
      if (Cell::has_c && f.w_hr != nullptr) {
        launch_step<S, 1>(of("step<Project>", k), matrix<Stored>(f.w_hr, f.N, 0, f.H, f.H),
                          operands<Stored>(s.second_operand, f.H), f.B, stream, typename Scan::Project{s, k});
      }
    }
  }
  launch_each(of("each<End>"), most, stream, typename Scan::End{s});
}

}  // namespace rnnkit::cuda
