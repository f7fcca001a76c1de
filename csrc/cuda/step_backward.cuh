// The backward of the regime for any size: what happens to the sums of a step. step.cuh has the picture and
// the product.
//
// A launch multiplies the gradients of the gates at the step that was processed before it by W_hh^T: that is
// what reaches the state at its own step. So n steps are n + 1 launches, and what a cell needs of another
// launch (what of its gradient passes no product, dc) stays with its thread.

#pragma once

#include "step.cuh"

namespace rnnkit::cuda {

template <class S>
struct StepBackward {
  using O = typename S::O;
  using Cell = typename S::Cell;
  using Stored = typename S::Stored;
  using Real = typename S::Real;
  using Mem = Memory<O>;
  using Math = typename O::Math;
  Backward b;
  Workspace workspace;
  Real* direct_grad;  // [B, N] of the gradient of the state what passes no product; all of it at padding
  Real* dc;           // [B, H]
  Real* state_grad;   // [B, H] the original GRU: the gradient of the state at the step

  StepBackward(const Backward& backward, void* memory) : b(backward), workspace(memory) {
    direct_grad = workspace.take<Real>(b.B * b.N);
    dc = workspace.take<Real>(Cell::has_c ? b.B * b.H : 0);
    state_grad = workspace.take<Real>(Cell::two_products ? b.B * b.H : 0);
  }

  RNNKIT_DEVICE bool guarded() const { return b.lengths != nullptr || b.reset != nullptr; }
  RNNKIT_DEVICE bool valid(int64_t k, int64_t row) const {
    return time_index(b, k, true) < length_of(b, row);
  }

  // The gradient of the state after the k-th step; `sum` came through the product of the step before it. A
  // reset between the two sends it to the state at a reset.
  RNNKIT_DEVICE Real incoming_grad(int64_t k, int64_t unit, int64_t row, Real sum) const {
    const int64_t at = row * b.N + unit;
    if (k == 0 || !valid(k - 1, row)) return direct_grad[at];
    const Real d = direct_grad[at] + sum;
    if (!resets_before(b, time_index(b, k - 1, true), row, length_of(b, row))) return d;
    Mem::store(b.dh_r, at, Mem::load(b.dh_r, at) + d);
    return Real(0);
  }
  // The state from which step t started: c of an LSTM, h of a GRU.
  RNNKIT_DEVICE Real before(int64_t k, int64_t unit, int64_t row) const {
    const int64_t t = time_index(b, k, true), length = length_of(b, row), at = row * b.H + unit;
    if (resets_before(b, t, row, length)) return Mem::load(Cell::has_c ? b.c_r : b.h_r, at);
    const int64_t earlier = previous_time(b, t, length);
    if (earlier < 0) return Mem::load(Cell::has_c ? b.c_0 : b.h_0, at);
    return Mem::load(Cell::has_c ? b.c_all : b.y, earlier * b.B * b.H + at);
  }
  RNNKIT_DEVICE Real load_step(const void* g, int64_t width, int64_t k, int64_t unit, int64_t row) const {
    return g == nullptr ? Real(0) : Mem::load(g, (time_index(b, k, true) * b.B + row) * width + unit);
  }
  RNNKIT_DEVICE int64_t gate(int64_t k, int64_t unit, int64_t row, int block, int blocks) const {
    return ((time_index(b, k, true) * b.B + row) * blocks + block) * b.H + unit;
  }
  RNNKIT_DEVICE void read(int64_t k, int64_t unit, int64_t row,
                          Real (&saved)[Cell::K > 0 ? Cell::K : 1]) const {
    RNNKIT_UNROLL
    for (int block = 0; block < Cell::K; ++block) {
      saved[block] = Mem::load(b.gates, gate(k, unit, row, block, Cell::K));
    }
  }
  RNNKIT_DEVICE void write(void* out, int64_t k, int64_t unit, int64_t row, int block, Real v) const {
    Mem::store(out, gate(k, unit, row, block, Cell::G), v);
  }

  // Gradients of the last states.
  struct Begin {
    StepBackward s;
    RNNKIT_DEVICE void operator()(int64_t i) const {
      const Backward& b = s.b;
      if (i < b.B * b.N) {
        s.direct_grad[i] = Mem::load(b.gh_n, i);
        Mem::store(b.dh_r, i, Real(0));
      }
      if (Cell::has_c && i < b.B * b.H) {
        s.dc[i] = Mem::load(b.gc_n, i);
        Mem::store(b.dc_r, i, Real(0));
      }
    }
  };
  // And of the first.
  struct End {
    StepBackward s;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      Mem::store(s.b.dh_0, row * s.b.N + unit, s.incoming_grad(s.b.n, unit, row, sum[0]));
    }
  };
  struct EndOfC {
    StepBackward s;
    RNNKIT_DEVICE void operator()(int64_t i) const { Mem::store(s.b.dc_0, i, s.dc[i]); }
  };

  // A step of a cell with one product; `projected`: the sum is already the gradient of what W_hr multiplied.
  struct Gates {
    StepBackward s;
    int64_t k;
    bool projected;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      const Backward& b = s.b;
      constexpr int SAVED = Cell::K > 0 ? Cell::K : 1;
      const int64_t at = row * b.H + unit;
      const bool valid = s.valid(k, row);
      const Real incoming = projected ? sum[0] : s.incoming_grad(k, unit, row, sum[0]);
      Real dx[Cell::G] = {}, ds[Cell::G] = {}, direct = Real(0);
      if (valid) {
        Real saved[SAVED], d_c = Real(0);
        s.read(k, unit, row, saved);
        const Real d = projected ? incoming : incoming + s.load_step(b.gy, b.N, k, unit, row);
        if (Cell::has_c) d_c = s.dc[at] + s.load_step(b.gc_all, b.H, k, unit, row);
        const bool idle = s.guarded() && d == Real(0) && d_c == Real(0);
        const Real was = Cell::has_c || Cell::from_h ? s.before(k, unit, row) : Real(0);
        const Real now = Cell::from_h ? Real(0) : s.load_step(Cell::has_c ? b.c_all : b.y, b.H, k, unit, row);
        if (!idle) Cell::template backward<Math>(b.relu, d, d_c, saved, was, now, dx, ds, direct);
        if (Cell::has_c) {
          if (resets_before(b, time_index(b, k, true), row, length_of(b, row))) {
            Mem::store(b.dc_r, at, Mem::load(b.dc_r, at) + d_c);
            d_c = Real(0);
          }
          s.dc[at] = d_c;
        }
      }
      RNNKIT_UNROLL
      for (int gate = 0; gate < Cell::G; ++gate) {
        s.write(b.dgx, k, unit, row, gate, dx[gate]);
        if (b.dgh != b.dgx) s.write(b.dgh, k, unit, row, gate, ds[gate]);
      }
      if (!projected) s.direct_grad[at] = valid ? direct : incoming;
    }
  };
  // The full gradient of a projected state, for the product that sends it through W_hr.
  struct Arrive {
    StepBackward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      const Backward& b = s.b;
      const int64_t at = row * b.N + unit;
      const bool valid = s.valid(k, row);
      const Real incoming = s.incoming_grad(k, unit, row, sum[0]);
      Mem::store(b.dp, time_index(b, k, true) * b.B * b.N + at,
                 valid ? incoming + s.load_step(b.gy, b.N, k, unit, row) : Real(0));
      s.direct_grad[at] = valid ? Real(0) : incoming;
    }
  };
  // The two halves of a step of the original GRU.
  struct First {
    StepBackward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&sum)[1]) const {
      const Backward& b = s.b;
      const int64_t at = row * b.H + unit;
      const bool valid = s.valid(k, row);
      const Real incoming = s.incoming_grad(k, unit, row, sum[0]);
      const Real d = valid ? incoming + s.load_step(b.gy, b.N, k, unit, row) : Real(0);
      Real dn = Real(0);
      if (valid && !(s.guarded() && d == Real(0))) {
        Real saved[3];
        s.read(k, unit, row, saved);
        dn = Cell::template backward_state<Math>(d, saved, s.before(k, unit, row));
      }
      s.write(b.dgx, k, unit, row, 2, dn);
      s.state_grad[at] = d;
      s.direct_grad[at] = incoming;
    }
  };
  struct Second {
    StepBackward s;
    int64_t k;
    RNNKIT_DEVICE void operator()(int64_t unit, int64_t row, const Real (&drh)[1]) const {
      const int64_t at = row * s.b.H + unit;
      const bool valid = s.valid(k, row);
      const Real d = s.state_grad[at];
      Real dx[2] = {}, direct = Real(0);
      if (valid && !(s.guarded() && d == Real(0) && drh[0] == Real(0))) {
        Real saved[3];
        s.read(k, unit, row, saved);
        Cell::template backward_gates<Math>(d, drh[0], saved, s.before(k, unit, row), dx, direct);
      }
      s.write(s.b.dgx, k, unit, row, 0, dx[0]);
      s.write(s.b.dgx, k, unit, row, 1, dx[1]);
      if (valid) s.direct_grad[at] = direct;
    }
  };
};

template <class S>
void run_step_backward(const char* name, const Backward& b, Stream stream) {
  using Scan = StepBackward<S>;
  using Stored = typename S::Stored;
  using Cell = typename S::Cell;
  const Scan s(b, b.workspace);
  const auto of = [name](const char* function, int64_t k = -1) {
    return Launch(name, "backward", function, k);
  };
  const int64_t gates_width = Cell::G * b.H;
  const int64_t multiplied =
      Cell::two_products ? 2 * b.H : gates_width;  // columns of the gates that multiplied h itself
  const auto* w_t = static_cast<const Stored*>(b.w_t);
  const Matrix back = matrix<Stored>(w_t, b.N, 0, gates_width, multiplied);
  const auto gradients = [&](int64_t k) {  // of the gates at the step before the k-th
    if (k == 0) return Operands{nullptr, 0, false};
    const int64_t t = b.reverse ? k - 1 : b.n - k;
    return operands<Stored>(static_cast<const Stored*>(b.dgh) + t * b.B * gates_width, gates_width);
  };
  launch_each(of("each<Begin>"), b.B * (b.H > b.N ? b.H : b.N), stream, typename Scan::Begin{s});
  for (int64_t k = 0; k < b.n; ++k) {
    const int64_t t = b.reverse ? k : b.n - 1 - k;
    if constexpr (Cell::two_products) {
      const auto* dn = static_cast<const Stored*>(b.dgx) + t * b.B * gates_width + multiplied;
      launch_step<S, 1>(of("step<First>", k), back, gradients(k), b.B, stream, typename Scan::First{s, k});
      launch_step<S, 1>(of("step<Second>", k), matrix<Stored>(w_t + multiplied, b.H, 0, gates_width, b.H),
                        operands<Stored>(dn, gates_width), b.B, stream, typename Scan::Second{s, k});
    } else if (Cell::has_c && b.w_hr_t != nullptr) {
      const auto* dp = static_cast<const Stored*>(b.dp) + t * b.B * b.N;
      launch_step<S, 1>(of("step<Arrive>", k), back, gradients(k), b.B, stream, typename Scan::Arrive{s, k});
      launch_step<S, 1>(of("step<Gates>", k), matrix<Stored>(b.w_hr_t, b.H, 0, b.N, b.N),
                        operands<Stored>(dp, b.N), b.B, stream, typename Scan::Gates{s, k, true});
    } else {
      launch_step<S, 1>(of("step<Gates>", k), back, gradients(k), b.B, stream,
                        typename Scan::Gates{s, k, false});
    }
  }
  launch_step<S, 1>(of("step<End>"), back, gradients(b.n), b.B, stream, typename Scan::End{s});
  if (Cell::has_c) launch_each(of("each<EndOfC>"), b.B * b.H, stream, typename Scan::EndOfC{s});
}

}  // namespace rnnkit::cuda
