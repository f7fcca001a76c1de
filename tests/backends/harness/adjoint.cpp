// The plain loops against themselves: with L = <gy, y> + ..., the derivative of L along a random direction of
// all inputs and weights, by dual numbers through the plain forward, is the product of that direction with
// the gradients of the plain backward. So a formula that is wrong in plain.h cannot agree with the same error
// in the engine.

#include <stdexcept>

#include "checks.h"

namespace harness {
namespace {

using Duals = std::vector<Dual>;

Duals directed(const Values& v, Random& r) {
  Duals d;
  for (double x : v) d.emplace_back(x, r.normal());
  return d;
}

double dot(const Values& gradient, const Duals& along) {
  double s = 0;
  for (size_t k = 0; k < gradient.size(); ++k) s += gradient[k] * along[k].d;
  return s;
}

}  // namespace

void check_plain(const Problem& p) {
  const int64_t N = p.N(), H = p.H, G = p.G(), width = G * H, L = p.saved();
  Random r(p.seed ^ 0xad);
  const Recurrent<Dual> w{directed(p.w_hh, r), directed(p.w_hr, r), directed(p.b_ih, r), directed(p.b_hh, r)};
  const Duals gx = directed(p.gx, r), h_0 = directed(p.h_0, r), c_0 = directed(p.c_0, r);
  const Duals h_r = directed(p.h_r, r), c_r = directed(p.c_r, r);

  Saved saved;
  saved.y.assign(p.T * p.B * N, 0), saved.gates.assign(p.T * p.B * L * H, 0);
  if (p.lstm()) saved.c.assign(p.T * p.B * H, 0);
  Duals before(p.T * p.B * N),
      second_operand(p.T * p.B * H);  // the state of each step; what a second product multiplied
  Dual loss;
  for (int64_t b = 0; b < p.B; ++b) {
    Duals h(h_0.begin() + b * N, h_0.begin() + (b + 1) * N), c(p.lstm() ? H : 0);
    for (size_t j = 0; j < c.size(); ++j) c[j] = c_0[b * H + static_cast<int64_t>(j)];
    for (int64_t k = 0; k < p.T; ++k) {
      const int64_t t = p.time(k), at = t * p.B + b;
      if (!p.valid(t, b)) continue;
      if (p.resets_before(t, b)) {
        for (int64_t j = 0; j < N; ++j) h[j] = p.has_h_r ? h_r[b * N + j] : Dual(0);
        for (size_t j = 0; j < c.size(); ++j)
          c[j] = p.has_c_r ? c_r[b * H + static_cast<int64_t>(j)] : Dual(0);
      }
      std::copy(h.begin(), h.end(), before.begin() + at * N);
      const Step<Dual> s = plain_step<Dual>(p, w, gx.data() + at * width, h.data(), c.data());
      for (int64_t j = 0; j < H; ++j) {
        if (p.lstm()) second_operand[at * H + j] = s.gates[3 * H + j] * tanh(s.c[j]);
        if (p.cell == Cell::gru_reset_before) second_operand[at * H + j] = s.gates[j] * h[j];
      }
      h = s.h, c = s.c;
      for (int64_t j = 0; j < N; ++j) saved.y[at * N + j] = h[j].v;
      for (int64_t j = 0; j < L * H; ++j) saved.gates[at * L * H + j] = s.gates[j].v;
      for (int64_t j = 0; j < N && p.has_gy; ++j) loss = loss + Dual(p.incoming(t, b, j)) * h[j];
      for (size_t j = 0; j < c.size(); ++j) {
        const int64_t unit = at * H + static_cast<int64_t>(j);
        saved.c[unit] = c[j].v;
        if (p.has_gc_all) loss = loss + Dual(p.gc_all[unit]) * c[j];
      }
    }
    for (int64_t j = 0; j < N; ++j) loss = loss + Dual(p.gh_n[b * N + j]) * h[j];
    for (size_t j = 0; j < c.size(); ++j) loss = loss + Dual(p.gc_n[b * H + static_cast<int64_t>(j)]) * c[j];
  }

  Problem asks = p;
  asks.asks_h_r = true, asks.asks_c_r = p.lstm();
  Gradients g;
  const int64_t all = p.T * p.B,
                sizes[] = {all * width, all * H, all * N, p.B * N, p.B * H, p.B * N, p.B * H};
  for (int k = 0; k < 7; ++k) g.of[k].assign(sizes[k], 0);
  struct Settle {
    Gradients& g;
    double operator()(Result which, int64_t index, double x) {
      return g.of[static_cast<int>(which)][index] = x;
    }
    void operator()(Result, int64_t, Exact) {}
  };
  for (int64_t b = 0; b < p.B; ++b) plain_backward<double>(asks, saved, b, Settle{g});

  const auto of = [&](Result which) -> const Values& { return g.of[static_cast<int>(which)]; };
  const Values& dgx = of(Result::dgx);
  double sum = dot(dgx, gx) + dot(of(Result::dh), h_0);
  if (p.lstm()) sum += dot(of(Result::dc), c_0);
  if (p.has_h_r) sum += dot(of(Result::dh_r), h_r);
  if (p.has_c_r) sum += dot(of(Result::dc_r), c_r);
  for (int64_t at = 0; at < all; ++at) {
    for (int64_t k = 0; k < width; ++k) {
      const bool candidate = k >= 2 * H && p.cell == Cell::gru,
                 textbook = k >= 2 * H && p.cell == Cell::gru_reset_before;
      const double da = dgx[at * width + k], dah = candidate ? of(Result::dgn)[at * H + k - 2 * H] : da;
      if (p.bias) sum += da * w.b_ih[k].d + dah * w.b_hh[k].d;
      for (int64_t j = 0; j < N; ++j) {
        sum += dah * w.w_hh[k * N + j].d * (textbook ? second_operand[at * H + j] : before[at * N + j]).v;
      }
    }
    for (int64_t k = 0; k < p.P; ++k) {
      for (int64_t j = 0; j < H; ++j)
        sum += of(Result::dp)[at * N + k] * w.w_hr[k * H + j].d * second_operand[at * H + j].v;
    }
  }
  // Both are the same sum of products in another order; 1e-10 of the largest terms' size is 2^20 roundings.
  const double size = 1 + std::fabs(loss.d) + static_cast<double>(all * width + p.B * N);
  if (!(std::fabs(sum - loss.d) <= 1e-10 * size)) {
    throw std::runtime_error("the plain backward is not the plain forward's: " + std::to_string(sum) +
                             " and " + std::to_string(loss.d));
  }
}

}  // namespace harness
