// The comparisons of checks.h but for the functions.

#include "checks.h"
#include "../../../csrc/cpu/worker_pool.h"

#include <atomic>
#include <sstream>
#include <stdexcept>

namespace harness {
namespace {

std::atomic<int64_t> calls{0};

template <rnnkit::Parallel parallel>
void counted(int64_t slices, void* context, Body body) {
  ++calls;
  parallel(slices, context, body);
}

std::vector<Way> ways_for(int64_t rows) {
  std::vector<Way> ways{{"2 threads", {2, &counted<&apart>}},
                        {"3 threads", {3, &counted<&apart>}},
                        {"7 threads", {7, &counted<&apart>}},
                        {"7 slices unevenly", {7, &counted<&uneven>}},
                        {"3 slices in halves", {3, &counted<&halves>}},
                        {"3 slices together", {3, &counted<&together>}},
                        {"5 in the pool", {5, &counted<&rnnkit::run_in_pool>}}};
  // With four rows for each slice threads take rows, if anything: then slices need not run at once.
  if (rows >= 8) ways.push_back({"in turn", {std::min<int64_t>(7, rows / 4), &counted<&in_turn>}});
  return ways;
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

template <class R>
[[noreturn]] void off(const char* name, int64_t index, double got, R want, R budget) {
  std::ostringstream out;
  out.precision(17);
  out << name << "[" << index << "] is " << got << ", must be " << static_cast<double>(want) << " within "
      << static_cast<double>(budget) << ", is off by " << static_cast<double>(std::fabs(got - want));
  fail(out.str());
}

// `got`, in the type that is computed in, against a value with its budget.
template <class R>
void hold(const char* name, int64_t index, double got, Near<R> want) {
  if (want.v != want.v && got != got) return;
  if (!(std::fabs(got - want.v) <= want.e)) off(name, index, got, want.v, want.e);
}

void exactly(const char* name, int64_t index, double got, double want) {
  if (!same(got, want)) off<double>(name, index, got, want, 0);
}

void compare(const std::string& how, const char* name, const Values& got, const Values& want) {
  if (got.size() != want.size()) fail(how + ": " + name + " has another size");
  for (size_t k = 0; k < got.size(); ++k) {
    if (same(got[k], want[k])) continue;
    std::ostringstream out;
    out.precision(17);
    out << how << ": " << name << "[" << k << "] is " << got[k] << ", alone and in one chunk " << want[k];
    fail(out.str());
  }
}

void compare(const std::string& how, const Ran& got, const Ran& want) {
  compare(how, "y", got.saved.y, want.saved.y);
  compare(how, "h_n", got.h.back(), want.h.back());
  compare(how, "c_n", got.c.back(), want.c.back());
  compare(how, "c_all", got.c_all, want.c_all);
  if (!got.saved.gates.empty()) compare(how, "gates", got.saved.gates, want.saved.gates);
  if (!got.saved.c.empty()) compare(how, "c_kept", got.saved.c, want.saved.c);
}

void compare(const std::string& how, const Gradients& got, const Gradients& want) {
  for (int k = 0; k < 7; ++k) compare(how, result_names[k], got.of[k], want.of[k]);
}

// Each step against the plain one from the engine's own state before it.
template <class R>
void hold_forward(const Problem& p, const Ran& ran) {
  using X = Near<R>;
  const int64_t N = p.N(), H = p.H, width = p.G() * H, L = p.saved() * H;
  const Recurrent<double> w{p.w_hh, p.w_hr, p.b_ih, p.b_hh};
  const Format& stored = format(p.dtype);
  for (int64_t k = 0; k < p.T; ++k) {
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t t = p.time(k), at = t * p.B + b;
      const Values &h_old = ran.h[k], &h_new = ran.h[k + 1], &c_old = ran.c[k], &c_new = ran.c[k + 1];
      const bool valid = p.valid(t, b), reset = p.resets_before(t, b);
      std::vector<X> gx, h, c;
      for (int64_t j = 0; j < width; ++j) gx.emplace_back(p.gx[at * width + j]);
      for (int64_t j = 0; j < N; ++j)
        h.emplace_back(reset ? (p.has_h_r ? p.h_r[b * N + j] : 0) : h_old[b * N + j]);
      for (int64_t j = 0; j < H && p.lstm(); ++j) {
        c.emplace_back(reset ? (p.has_c_r ? p.c_r[b * H + j] : 0) : c_old[b * H + j]);
      }
      const Step<X> s = valid ? plain_step<X>(p, w, gx.data(), h.data(), c.data()) : Step<X>{};
      for (int64_t j = 0; j < N; ++j) {
        const double now = h_new[b * N + j];
        if (valid) {
          hold("h", at * N + j, now, s.h[j]);
        } else {
          exactly("h at padding", at * N + j, now, h_old[b * N + j]);
        }
        exactly("y", at * N + j, ran.saved.y[at * N + j], valid ? rounded(now, stored) : 0);
      }
      for (int64_t j = 0; j < H && p.lstm(); ++j) {
        const double now = c_new[b * H + j];
        if (valid) {
          hold("c", at * H + j, now, s.c[j]);
        } else {
          exactly("c at padding", at * H + j, now, c_old[b * H + j]);
        }
        exactly("c_kept", at * H + j, ran.saved.c[at * H + j], valid ? now : 0);
        if (p.all_states)
          exactly("c_all", at * H + j, ran.c_all[at * H + j], valid ? rounded(now, stored) : 0);
      }
      for (int64_t j = 0; j < L; ++j) {
        if (valid) {
          hold("gates", at * L + j, ran.saved.gates[at * L + j], s.gates[j]);
        } else {
          exactly("gates at padding", at * L + j, ran.saved.gates[at * L + j], 0);
        }
      }
    }
  }
}

// Holds each gradient as soon as the plain backward has it. Then goes on with the engine's own, where that is
// exact, or with what its rounding leaves possible, so that budgets do not grow with T.
template <class R>
struct Settle {
  using X = Near<R>;
  const Problem& p;
  const Gradients& got;

  X operator()(Result which, int64_t index, X want) const {
    const double x = got.of[static_cast<int>(which)][index];
    const bool carried = which >= Result::dh;  // in the type that is computed in
    if (carried || !is_half(p.dtype)) {
      hold(result_names[static_cast<int>(which)], index, x, want);
      return x != x ? want : X(x);
    }
    const Format& f = format(p.dtype);
    const R half = static_cast<R>(f.u() * std::fabs(x) + f.eta());
    if (std::isinf(x) && std::fabs(want.v) + want.e >= std::ldexp(1.0, f.largest) * (1 - f.u())) return want;
    hold(result_names[static_cast<int>(which)], index, x, X(want.v, want.e + half));
    return want.e <= half || x != x ? want : X(x, half);
  }
  // A zero of either sign.
  void operator()(Result which, int64_t index, Exact) const {
    const double x = got.of[static_cast<int>(which)][index];
    if (x != 0) off<double>(result_names[static_cast<int>(which)], index, x, 0, 0);
  }
};

template <class R>
void hold_all(const Problem& p, const Ran& ran, const Gradients& gradients) {
  const Format& f = format(p.opmath());
  Near<R>::u = static_cast<R>(f.u()), Near<R>::eta = static_cast<R>(f.eta());
  hold_forward<R>(p, ran);
  for (int64_t b = 0; b < p.B; ++b) plain_backward<Near<R>>(p, ran.saved, b, Settle<R>{p, gradients});
}

// Rows of [steps, B, width].
Values some(const Values& v, int64_t rows, int64_t width, const std::vector<int64_t>& which) {
  Values out;
  for (int64_t first = 0; width > 0 && first < static_cast<int64_t>(v.size()); first += rows * width) {
    for (int64_t b : which)
      out.insert(out.end(), v.begin() + first + b * width, v.begin() + first + (b + 1) * width);
  }
  return out;
}

void check_rows(const rnnkit::Engine& engine, const Problem& p, const Ran& ran, const Gradients& g,
                Random& r) {
  std::vector<int64_t> rows;
  const double often = r.chance(0.3) ? 0.1 : 0.6;
  for (int64_t b = 0; b < p.B; ++b) {
    if (r.chance(often)) rows.push_back(b);
  }
  if (rows.empty()) return;
  const Problem q = with_rows(p, rows);
  const int64_t N = p.N(), H = p.H, width = p.G() * H;
  const auto chosen = [&](const Values& v, int64_t n) { return some(v, p.B, n, rows); };
  Ran want;
  want.saved = {chosen(ran.saved.y, N), chosen(ran.saved.gates, p.saved() * H), chosen(ran.saved.c, H)};
  want.c_all = chosen(ran.c_all, H);
  want.h = {chosen(ran.h.back(), N)}, want.c = {chosen(ran.c.back(), H)};
  compare("some rows", run_forward(engine, q, How{}), want);
  const int64_t widths[] = {width, H, N, N, H, N, H};
  Gradients gradients;
  for (int k = 0; k < 7; ++k) gradients.of[k] = chosen(g.of[k], widths[k]);
  compare("some rows", run_backward(engine, q, want.saved, Way{"alone", {1, &together}}), gradients);
}

std::vector<int64_t> random_chunks(int64_t T, Random& r) {
  std::vector<int64_t> chunks;
  for (int64_t left = T; left > 0; left -= chunks.back()) chunks.push_back(r.between(0, left));
  chunks.push_back(0);
  return chunks;
}

}  // namespace

int64_t parallel_calls() { return calls; }

void check_scan(const rnnkit::Engine& engine, const Problem& p, bool every_way) {
  Random r(p.seed ^ 0x5ca);
  const Way alone{"alone", 1, &together};
  How steps;
  steps.chunks.assign(p.T, 1);
  const Ran ran = run_forward(engine, p, steps);
  const Gradients gradients = run_backward(engine, p, ran.saved, alone);
  if (p.dtype == Dtype::f64) {
    hold_all<long double>(p, ran, gradients);
  } else {
    hold_all<double>(p, ran, gradients);
  }

  compare("one chunk", run_forward(engine, p, How{}), ran);
  How other;
  other.save = false;
  compare("without saving", run_forward(engine, p, other), ran);
  other.chunks = random_chunks(p.T, r);
  compare("without saving, in chunks", run_forward(engine, p, other), ran);
  if (!is_half(p.dtype) && p.saved() != 0) {
    How in_place;
    in_place.in_place = true;
    in_place.chunks = random_chunks(p.T, r);
    compare("in place", run_forward(engine, p, in_place), ran);
  }
  const bool may_multiply = !is_half(p.dtype) && !p.nan;  // 0 NaN is NaN
  if (may_multiply) {
    How inside;
    inside.inside = true;
    inside.save = r.chance(0.5);
    inside.chunks = random_chunks(p.T, r);
    compare("x in the scan", run_forward(engine, p, inside), ran);
  }
  check_rows(engine, p, ran, gradients, r);

  std::vector<Way> ways = ways_for(p.B);
  for (size_t k = ways.size(); k-- > 1;) std::swap(ways[k], ways[r.between(0, static_cast<int64_t>(k))]);
  if (!every_way) ways.resize(2);
  for (const Way& way : ways) {
    How among{way, r.chance(0.7), false, {}, false};
    if (r.chance(0.3)) among.chunks = random_chunks(p.T, r);
    among.inside = may_multiply && r.chance(0.3);
    compare(way.name, run_forward(engine, p, among), ran);
    const std::vector<int64_t> back = r.chance(0.5) ? random_chunks(p.T, r) : std::vector<int64_t>();
    compare(way.name, run_backward(engine, p, ran.saved, way, back), gradients);
    Gradients some_wanted = run_backward(engine, p, ran.saved, way, back, false);
    for (Result not_wanted :
         {Result::dh, Result::dc, Result::dh_r, Result::dc_r}) {  // of resets before the first step
      some_wanted.of[static_cast<int>(not_wanted)] = gradients.of[static_cast<int>(not_wanted)];
    }
    compare(std::string(way.name) + ", no gradient of the first state", some_wanted, gradients);
  }
}

void check_product(const rnnkit::Engine& engine, uint64_t seed) {
  Random r(seed);
  const Dtype dtype = r.chance(0.5) ? Dtype::f32 : Dtype::f64;
  const bool large = r.chance(0.1), shift = r.chance(0.5);
  const bool many_weights = r.chance(0.1);  // so much to pack that the workers share it
  const int64_t M = r.chance(0.1) ? r.between(0, 1) : r.between(1, many_weights ? 10 : large ? 250 : 40);
  const int64_t N = r.chance(0.05) ? 0 : r.between(many_weights ? 250 : 1, many_weights ? 300 : 90);
  const int64_t K = r.chance(0.05) ? 0 : r.between(many_weights ? 270 : 1, many_weights ? 300 : 90);
  const int64_t ldo = N + r.between(0, 3);
  Values a(M * K), w(N * K);
  for (double& x : a) x = rounded(r.normal(), format(dtype));
  for (double& x : w) x = rounded(r.normal(), format(dtype));
  const Buffer a_(a, dtype, shift), w_(w, dtype, shift);
  using X = Near<long double>;
  X::u = format(dtype).u(), X::eta = format(dtype).eta();
  std::ostringstream what;
  what << "product " << format(dtype).name << " M=" << M << " N=" << N << " K=" << K << " ldo=" << ldo;
  for (bool pack : {true, false}) {
    const auto run = [&](const char* from, int64_t rows, const Way& way) {
      const Buffer out(rows * ldo, dtype, shift);
      engine.gemm_nt(dtype, N, K, w_.data(), pack, way.workers)
          ->run(rows, from, K, out.data(), ldo, false, way.workers);
      return out.values();
    };
    const Values out = run(a_.data(), M, Way{"alone", {1, &together}});
    for (int64_t m = 0; m < M; ++m) {
      std::vector<X> row;
      for (int64_t k = 0; k < K; ++k) row.emplace_back(a[m * K + k]);
      for (int64_t n = 0; n < ldo; ++n) {
        const double got = out[m * ldo + n];
        if (n < N) {
          hold(what.str().c_str(), m * ldo + n, got, sum({X(0.0)}, w.data() + n * K, 1, row.data(), K));
        } else {
          exactly(what.str().c_str(), m * ldo + n, got, untouched);
        }
      }
    }
    for (const Way& way : ways_for(M))
      compare(what.str() + ", " + way.name, "out", run(a_.data(), M, way), out);
    if (M > 0) {
      const int64_t m = r.between(0, M - 1);
      const Values alone = run(a_.at(m * K), 1, Way{"alone", {1, &together}});
      compare(what.str() + ", a row alone", "out", alone, some(out, M, ldo, {m}));
    }
  }
}

}  // namespace harness
