// One problem for a scan: its sizes, its options, and every operand as doubles that are exact in the dtype,
// so that the engine and the plain loops read the same numbers. Made at random from a seed.

#pragma once

#include <random>

#include "numbers.h"

namespace harness {

using Values = std::vector<double>;

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  int64_t between(int64_t first, int64_t last) {
    return first + static_cast<int64_t>(bits_() % static_cast<uint64_t>(last - first + 1));
  }
  bool chance(double p) { return unit() < p; }
  double unit() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }
  // About normal, of variance 1.
  double normal() {
    double s = 0;
    for (int k = 0; k < 12; ++k) s += unit();
    return s - 6;
  }

 private:
  std::mt19937_64 bits_;
};

struct Problem {
  uint64_t seed = 0;
  Cell cell = Cell::lstm;
  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, H = 0, P = 0;
  bool reverse = false, bias = false;
  bool has_lengths = false, has_reset = false, has_h_r = false, has_c_r = false;
  bool has_h_0 = true, has_c_0 = true;  // to the backward null where false; to the forward zeros
  bool has_gy = true, has_gc_all = true;
  bool asks_h_r = true, asks_c_r = true;  // for the gradients of the states at a reset
  bool all_states = true;
  bool nan = false;        // some gx are NaN
  bool unaligned = false;  // operands start one element after an aligned address
  int64_t gap = 0;         // elements between rows of gx and of gates

  std::vector<int64_t> lengths;  // [B]
  std::vector<uint8_t> reset;    // [T, B]
  Values gx;                     // [T, B, G H]
  Values w_hh, w_hr, b_ih, b_hh;
  Values h_0, h_r, c_0, c_r;  // [B, N], [B, H]; exact in the compute type
  Values gy;                  // by gy_strides
  rnnkit::Strides gy_strides{0, 0, 1};
  Values gc_all;      // [T, B, H]
  Values gh_n, gc_n;  // [B, N], [B, H]

  int64_t G() const {
    return cell == Cell::lstm ? 4 : cell == Cell::gru || cell == Cell::gru_reset_before ? 3 : 1;
  }
  int64_t N() const { return P ? P : H; }
  // Blocks of H that the forward keeps: i f g o; r z n and W_hn h + b_hn; r z n.
  int64_t saved() const {
    return cell == Cell::lstm || cell == Cell::gru ? 4 : cell == Cell::gru_reset_before ? 3 : 0;
  }
  bool lstm() const { return cell == Cell::lstm; }
  bool guarded() const { return has_lengths || has_reset; }
  Dtype opmath() const { return computed_in(dtype); }
  int64_t length(int64_t b) const { return has_lengths ? lengths[b] : T; }
  bool valid(int64_t t, int64_t b) const { return t < length(b); }

  // Whether the row's state is replaced before step t: a reset at s stands between s - 1 and s.
  bool resets_before(int64_t t, int64_t b) const {
    if (!has_reset) return false;
    const int64_t s = reverse ? t + 1 : t;
    return s < length(b) && reset[s * B + b] != 0;
  }
  // The k-th step in the order of the forward.
  int64_t time(int64_t k) const { return reverse ? T - 1 - k : k; }
  double incoming(int64_t t, int64_t b, int64_t j) const {
    return gy[t * gy_strides.step + b * gy_strides.row + j * gy_strides.unit];
  }
};

// small: every option, odd sizes. rows, units: of a size that is split among threads by rows, or by units.
enum class Size { small, rows, units };

Problem random_problem(uint64_t seed, Size size);

// The same with only some of the rows; what comes by strides gets a place of its own.
Problem with_rows(const Problem& p, const std::vector<int64_t>& rows);

std::string describe(const Problem& p);

}  // namespace harness
