// How problems are drawn: sizes, options and operands; and how one is told in a line.

#include "problem.h"

#include <sstream>

namespace harness {
namespace {

void choose_sizes(Problem& p, Random& r, Size size) {
  if (size == Size::small) {
    p.T = r.chance(0.15) ? 1 : r.chance(0.03) ? 0 : r.between(2, 9);
    p.B = r.chance(0.15) ? 1 : r.chance(0.03) ? 0 : r.between(1, 13);
    p.H = r.chance(0.1) ? 1 : r.chance(0.02) ? 0 : r.between(1, r.chance(0.2) ? 90 : 40);
    if (p.lstm() && r.chance(0.4) && p.H > 0) p.P = r.between(1, r.chance(0.2) ? 70 : p.H);
  } else if (size == Size::rows) {  // B >= 4 threads, or few weights and many steps
    p.B = r.chance(0.5) ? r.between(8, 34) : r.between(2, 4);
    p.H = p.B >= 8 ? r.between(20, 60) : r.between(20, 36);
    p.T = (1 << 17) / (p.B * p.G() * p.H * p.H) + r.between(1, 3);
    if (p.lstm() && r.chance(0.3)) p.P = p.H;
  } else {  // above one panel of float32 with AVX-512, 64 units; 2^16 multiply-adds in a step
    p.H = r.between(66, 150);
    const int64_t other = p.lstm() && r.chance(0.4) ? p.P = r.between(66, 120) : p.H;
    p.B = (1 << 16) / (p.G() * p.H * other) + 1;
    p.T = r.between(2, 4);
  }
}

Values draw(Random& r, int64_t count, double scale, Dtype dtype) {
  Values v(count);
  for (double& x : v) x = rounded(scale * r.normal(), format(dtype));
  return v;
}

void choose_gradients(Problem& p, Random& r) {
  const int64_t all = p.T * p.B, N = p.N();
  p.has_gy = r.chance(0.85);
  const int layout = static_cast<int>(r.between(0, 5));
  if (layout <= 2 || p.N() == 1) {
    p.gy_strides = {p.B * N, N, 1};
    p.gy = draw(r, all * N, 1, p.dtype);
  } else if (layout == 3) {  // batch first
    p.gy_strides = {N, p.T * N, 1};
    p.gy = draw(r, all * N, 1, p.dtype);
  } else if (layout == 4) {  // one number a row
    p.gy_strides = {p.B, 1, 0};
    p.gy = draw(r, all, 1, p.dtype);
  } else {  // one number
    p.gy_strides = {0, 0, 0};
    p.gy = draw(r, 1, 1, p.dtype);
  }
  p.has_gc_all = p.lstm() && r.chance(0.5);
  if (p.has_gc_all) p.gc_all = draw(r, all * p.H, 1, p.dtype);
  const double none = r.chance(0.3) ? 0 : 1;
  p.gh_n = draw(r, p.B * N, none, p.opmath());
  if (p.lstm()) p.gc_n = draw(r, p.B * p.H, none, p.opmath());
  if (!p.has_gy || p.gy_strides.row != N || p.gy_strides.step != p.B * N) return;
  for (int64_t row = 0; row < all; ++row) {  // rows that no gradient reaches
    if (r.chance(0.8)) continue;
    std::fill_n(p.gy.begin() + row * N, N, 0.0);
  }
}

// NaN in the input of one step of a row. What it spoils lasts until the next reset; where there is one, no
// gradient enters before it, so that none may come out.
void poison(Problem& p, Random& r) {
  const int64_t width = p.G() * p.H;
  for (int64_t b = 0; b < p.B; ++b) {
    if (p.T == 0 || p.H == 0 || r.chance(0.5)) continue;
    const int64_t bad = r.between(0, p.T - 1);
    int64_t next = bad + 1;  // in the order of the steps
    while (next < p.T && !p.resets_before(p.time(next), b)) ++next;
    p.gx[(p.time(bad) * p.B + b) * width + r.between(0, width - 1)] = NAN;
    if (next == p.T || p.gy_strides.row == 0 || p.gy_strides.step == 0) continue;
    for (int64_t k = 0; k < next; ++k) {
      const int64_t t = p.time(k);
      const int64_t count = p.gy_strides.unit ? p.N() : 1;
      std::fill_n(p.gy.begin() + t * p.gy_strides.step + b * p.gy_strides.row, count, 0.0);
      if (p.has_gc_all) std::fill_n(p.gc_all.begin() + (t * p.B + b) * p.H, p.H, 0.0);
    }
  }
}

}  // namespace

Problem random_problem(uint64_t seed, Size size) {
  Random r(seed);
  Problem p;
  p.seed = seed;
  p.cell = static_cast<Cell>(r.between(0, rnnkit::cell_count - 1));
  p.dtype = static_cast<Dtype>(r.between(0, 3));
  choose_sizes(p, r, size);
  const int64_t N = p.N(), G = p.G(), all = p.T * p.B;
  p.reverse = r.chance(0.4);
  p.bias = r.chance(0.7);
  p.has_lengths = r.chance(0.4);
  p.has_reset = r.chance(0.4);
  p.has_h_r = r.chance(0.6);
  p.has_c_r = p.lstm() && r.chance(0.6);
  p.has_h_0 = r.chance(0.8);
  p.has_c_0 = r.chance(0.8);
  p.asks_h_r = r.chance(0.7);
  p.asks_c_r = p.lstm() && r.chance(0.7);
  p.all_states = p.lstm() && r.chance(0.5);
  p.unaligned = r.chance(0.5);
  p.gap = r.chance(0.5) ? r.between(1, 5) : 0;
  if (p.has_lengths) {
    p.lengths.resize(p.B);
    for (int64_t& n : p.lengths) n = r.between(0, p.T);
  }
  if (p.has_reset) {
    p.reset.resize(all);
    const double often = r.chance(0.2) ? 1.0 : 0.3;
    for (uint8_t& x : p.reset) x = r.chance(often);
  }
  const double scales[] = {1, 1, 1, 0.01, 20};
  p.gx = draw(r, all * G * p.H, scales[r.between(0, 4)], p.dtype);
  p.w_hh = draw(r, G * p.H * N, 1 / std::sqrt(N + 1.0), p.dtype);
  if (p.P) p.w_hr = draw(r, p.P * p.H, 1 / std::sqrt(p.H + 1.0), p.dtype);
  if (p.bias) p.b_ih = draw(r, G * p.H, 1, p.dtype), p.b_hh = draw(r, G * p.H, 1, p.dtype);
  p.h_0 = draw(r, p.B * N, p.has_h_0 ? 1 : 0, p.opmath());
  if (p.lstm()) p.c_0 = draw(r, p.B * p.H, p.has_c_0 ? 1 : 0, p.opmath());
  if (p.has_h_r) p.h_r = draw(r, p.B * N, 1, p.opmath());
  if (p.has_c_r) p.c_r = draw(r, p.B * p.H, 1, p.opmath());
  choose_gradients(p, r);
  p.nan = r.chance(0.15);
  if (p.nan) poison(p, r);
  return p;
}

Problem with_rows(const Problem& p, const std::vector<int64_t>& rows) {
  Problem q = p;
  q.B = static_cast<int64_t>(rows.size());
  const int64_t N = p.N(), width = p.G() * p.H;
  const auto take = [&](const Values& from, int64_t steps, int64_t n, Values& to) {
    if (from.empty()) return;
    to.clear();
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t b : rows) {
        const auto at = from.begin() + (t * p.B + b) * n;
        to.insert(to.end(), at, at + n);
      }
    }
  };
  take(p.gx, p.T, width, q.gx);
  take(p.gc_all, p.T, p.H, q.gc_all);
  take(p.h_0, 1, N, q.h_0), take(p.h_r, 1, N, q.h_r), take(p.gh_n, 1, N, q.gh_n);
  take(p.c_0, 1, p.H, q.c_0), take(p.c_r, 1, p.H, q.c_r), take(p.gc_n, 1, p.H, q.gc_n);
  q.lengths.clear(), q.reset.clear(), q.gy.clear();
  for (int64_t b : rows) {
    if (p.has_lengths) q.lengths.push_back(p.lengths[b]);
  }
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t b : rows) {
      if (p.has_reset) q.reset.push_back(p.reset[t * p.B + b]);
      for (int64_t j = 0; j < N; ++j) q.gy.push_back(p.incoming(t, b, j));
    }
  }
  q.gy_strides = {q.B * N, N, 1};
  return q;
}

std::string describe(const Problem& p) {
  std::ostringstream out;
  out << rnnkit::cell_names[static_cast<int>(p.cell)] << " " << format(p.dtype).name << " T=" << p.T
      << " B=" << p.B << " H=" << p.H << " P=" << p.P << " seed=" << p.seed;
  const std::pair<bool, const char*> flags[] = {{p.reverse, "reverse"},
                                                {p.bias, "bias"},
                                                {p.has_lengths, "lengths"},
                                                {p.has_reset, "reset"},
                                                {p.has_h_r, "h_r"},
                                                {p.has_c_r, "c_r"},
                                                {p.has_h_0, "h_0"},
                                                {p.has_c_0, "c_0"},
                                                {p.has_gy, "gy"},
                                                {p.has_gc_all, "gc_all"},
                                                {p.all_states, "all_states"},
                                                {p.nan, "nan"},
                                                {p.unaligned, "unaligned"},
                                                {p.gap != 0, "gap"},
                                                {p.gy_strides.unit == 0, "expanded"}};
  for (const auto& [set, name] : flags) {
    if (set) out << " " << name;
  }
  return out.str();
}

}  // namespace harness
