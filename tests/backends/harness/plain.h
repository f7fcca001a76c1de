// The scans as plain loops, written from the formulas in rnnkit/reference and not from csrc/cells: what the
// engine is held against. X is the kind of number (numbers.h). One row at a time, since rows are independent.
//
// The forward is one step from a given state: the engine's state before a step is known exactly (it is run
// one step at a time), so no error grows with T and every budget is that of one step. The backward starts
// from what the engine's forward saved, and hands every result to `settle` as soon as it is known, which may
// narrow it.

#pragma once

#include "problem.h"

namespace harness {

// The recurrent weights as numbers of a kind: doubles, or duals with a direction.
template <class W>
struct Recurrent {
  std::vector<W> w_hh, w_hr, b_ih, b_hh;  // [G H, N], [P, H], [G H] or empty
};

template <class X>
struct Step {
  std::vector<X> gates;  // [saved H]
  std::vector<X> h, c;   // [N], [H]
};

// One step of a row from h and c with the input gx [G H].
template <class X, class W>
Step<X> plain_step(const Problem& p, const Recurrent<W>& w, const X* gx, const X* h, const X* c) {
  const int64_t H = p.H, N = p.N();
  Step<X> s;
  s.h.resize(N), s.gates.resize(p.saved() * H), s.c.resize(p.lstm() ? H : 0);
  const auto bias = [&](const std::vector<W>& b, int64_t k) { return p.bias ? X(b[k]) : X(0.0); };
  std::vector<X> read;  // of h, by the product
  for (int64_t k = 0; k < N; ++k) read.push_back(operand(h[k]));
  const auto both = [&](int64_t k) {  // the pre-activation of unit k of the G H
    return sum({gx[k], bias(w.b_ih, k), bias(w.b_hh, k)}, w.w_hh.data() + k * N, 1, read.data(), N);
  };
  std::vector<X> second_operand(H);  // what a second product multiplies
  for (int64_t j = 0; j < H; ++j) {
    switch (p.cell) {
      case Cell::rnn_tanh:
        s.h[j] = tanh(both(j));
        break;
      case Cell::rnn_relu:
        s.h[j] = relu(both(j));
        break;
      case Cell::lstm: {
        const X i = sigmoid(both(j)), f = sigmoid(both(H + j)), g = tanh(both(2 * H + j));
        const X o = sigmoid(both(3 * H + j));
        s.gates[j] = i, s.gates[H + j] = f, s.gates[2 * H + j] = g, s.gates[3 * H + j] = o;
        s.c[j] = f * c[j] + i * g;
        second_operand[j] = o * tanh(s.c[j]);
        break;
      }
      case Cell::gru: {
        const X r = sigmoid(both(j)), z = sigmoid(both(H + j));
        const X hn = sum({bias(w.b_hh, 2 * H + j)}, w.w_hh.data() + (2 * H + j) * N, 1, read.data(), N);
        const X n = tanh(sum({gx[2 * H + j], bias(w.b_ih, 2 * H + j), r * hn}));
        s.gates[j] = r, s.gates[H + j] = z, s.gates[2 * H + j] = n, s.gates[3 * H + j] = hn;
        s.h[j] = (X(1.0) - z) * n + z * h[j];
        break;
      }
      case Cell::gru_reset_before:
        s.gates[j] = sigmoid(both(j));
        s.gates[H + j] = sigmoid(both(H + j));
        second_operand[j] = s.gates[j] * h[j];
        break;
    }
  }
  if (p.lstm() && !p.P) s.h = second_operand;
  for (X& x : second_operand) x = operand(x);
  for (int64_t k = 0; k < p.P; ++k) {
    s.h[k] = sum({X(0.0)}, w.w_hr.data() + k * H, 1, second_operand.data(), H);
  }
  for (int64_t j = 0; j < H && p.cell == Cell::gru_reset_before; ++j) {
    const int64_t k = 2 * H + j;
    const X z = s.gates[H + j];
    s.gates[k] = tanh(
        sum({gx[k], bias(w.b_ih, k), bias(w.b_hh, k)}, w.w_hh.data() + k * N, 1, second_operand.data(), H));
    s.h[j] = (X(1.0) - z) * s.gates[k] + z * h[j];
  }
  return s;
}

// What a forward gave and a backward reads: y [T, B, N], gates [T, B, saved H], c [T, B, H].
struct Saved {
  Values y, gates, c;
};

enum class Result { dgx, dgn, dp, dh, dc, dh_r, dc_r };
constexpr const char* result_names[] = {"dgx", "dgn", "dp", "dh", "dc", "dh_r", "dc_r"};

// The gradients of one row b. settle(which, index, X) gives the number to go on with. Where a gradient must
// be exactly zero, `settle` is given nothing but Exact.
struct Exact {};

template <class X, class Settle>
void plain_backward(const Problem& p, const Saved& saved, int64_t b, Settle settle) {
  const int64_t H = p.H, N = p.N(), G = p.G(), L = p.saved();
  std::vector<X> dh(N), dc(p.lstm() ? H : 0), dh_r(N, X(0.0)), dc_r(dc.size(), X(0.0)), da(G * H), dm(H);
  for (int64_t j = 0; j < N; ++j) dh[j] = X(p.gh_n[b * N + j]);
  for (size_t j = 0; j < dc.size(); ++j) dc[j] = X(p.gc_n[b * H + j]);
  const auto zero = [](const std::vector<X>& v) {
    return std::all_of(v.begin(), v.end(), [](const X& x) { return value(x) == 0; });
  };
  const X one(1.0);
  for (int64_t k = p.T - 1; k >= 0; --k) {
    const int64_t t = p.time(k), at = t * p.B + b;
    const auto nothing = [&] {
      for (int64_t j = 0; j < G * H; ++j) settle(Result::dgx, at * G * H + j, Exact{});
      for (int64_t j = 0; j < H && p.cell == Cell::gru; ++j) settle(Result::dgn, at * H + j, Exact{});
    };
    if (!p.valid(t, b)) {
      nothing();
      for (int64_t j = 0; j < p.P; ++j) settle(Result::dp, at * N + j, Exact{});
      continue;
    }
    for (int64_t j = 0; j < N && p.has_gy; ++j) dh[j] = dh[j] + X(p.incoming(t, b, j));
    for (int64_t j = 0; j < H && p.has_gc_all; ++j) dc[j] = dc[j] + X(p.gc_all[at * H + j]);
    for (int64_t j = 0; j < p.P; ++j) dh[j] = settle(Result::dp, at * N + j, dh[j]);
    if (p.guarded() && zero(dh) && zero(dc)) {
      nothing();
      continue;  // and zeros go on
    }
    const bool reset = p.resets_before(t, b), start = k == 0 || !p.valid(p.time(k - 1), b);
    const int64_t before = k > 0 ? p.time(k - 1) * p.B + b : 0;
    const auto state = [&](bool there, const Values& at_reset, const Values& first, const Values& all,
                           int64_t width, int64_t j) {
      if (reset) return X(there ? at_reset[b * width + j] : 0.0);
      return X(start ? first[b * width + j] : all[before * width + j]);
    };
    const auto h_before = [&](int64_t j) { return state(p.has_h_r, p.h_r, p.h_0, saved.y, N, j); };
    const auto gate = [&](int64_t g, int64_t j) { return X(saved.gates[at * L * H + g * H + j]); };
    const auto give = [&](int64_t g, int64_t j, X x) {
      da[g * H + j] = settle(Result::dgx, at * G * H + g * H + j, x);
    };
    if (p.P) {
      for (int64_t j = 0; j < H; ++j) dm[j] = sum({X(0.0)}, p.w_hr.data() + j, H, dh.data(), N);
    } else {
      dm = dh;
    }
    std::vector<X> direct(N, X(0.0));  // of the gradient of h_before, what passes no product
    for (int64_t j = 0; j < H; ++j) {
      switch (p.cell) {
        case Cell::rnn_tanh: {
          const X h(saved.y[at * N + j]);
          give(0, j, dm[j] * (one - h * h));
          break;
        }
        case Cell::rnn_relu:
          give(0, j, saved.y[at * N + j] <= 0 ? X(0.0) : dm[j]);
          break;
        case Cell::lstm: {
          const X i = gate(0, j), f = gate(1, j), g = gate(2, j), o = gate(3, j),
                  tc = tanh(X(saved.c[at * H + j]));
          const X c_before = state(p.has_c_r, p.c_r, p.c_0, saved.c, H, j);
          const X d = dc[j] + dm[j] * o * (one - tc * tc);
          give(0, j, d * g * (i * (one - i)));
          give(1, j, d * c_before * (f * (one - f)));
          give(2, j, d * i * (one - g * g));
          give(3, j, dm[j] * tc * (o * (one - o)));
          dc[j] = d * f;
          break;
        }
        case Cell::gru: {
          const X r = gate(0, j), z = gate(1, j), n = gate(2, j), hn = gate(3, j);
          const X dn = dm[j] * (one - z) * (one - n * n);
          give(0, j, dn * hn * (r * (one - r)));
          give(1, j, dm[j] * (h_before(j) - n) * (z * (one - z)));
          give(2, j, dn);
          da[2 * H + j] = settle(Result::dgn, at * H + j, dn * r);
          direct[j] = dm[j] * z;
          break;
        }
        case Cell::gru_reset_before: {
          const X z = gate(1, j), n = gate(2, j);
          give(1, j, dm[j] * (h_before(j) - n) * (z * (one - z)));
          give(2, j, dm[j] * (one - z) * (one - n * n));
          direct[j] = dm[j] * z;
          break;
        }
      }
    }
    int64_t through = G * H;  // rows of w_hh that h_before itself is multiplied by
    for (int64_t j = 0; j < H && p.cell == Cell::gru_reset_before; ++j) {
      through = 2 * H;
      const X drh = sum({X(0.0)}, p.w_hh.data() + 2 * H * N + j, N, da.data() + 2 * H, H), r = gate(0, j);
      give(0, j, drh * h_before(j) * (r * (one - r)));
      direct[j] = direct[j] + drh * r;
    }
    for (int64_t j = 0; j < N; ++j) dh[j] = sum({direct[j]}, p.w_hh.data() + j, N, da.data(), through);
    if (!reset) continue;
    for (int64_t j = 0; j < N; ++j) dh_r[j] = dh_r[j] + dh[j], dh[j] = X(0.0);
    for (size_t j = 0; j < dc.size(); ++j) dc_r[j] = dc_r[j] + dc[j], dc[j] = X(0.0);
  }
  for (int64_t j = 0; j < N; ++j) {
    settle(Result::dh, b * N + j, dh[j]);
    if (p.asks_h_r) settle(Result::dh_r, b * N + j, dh_r[j]);
  }
  for (size_t j = 0; j < dc.size(); ++j) {
    settle(Result::dc, b * H + static_cast<int64_t>(j), dc[j]);
    if (p.asks_c_r) settle(Result::dc_r, b * H + static_cast<int64_t>(j), dc_r[j]);
  }
}

}  // namespace harness
