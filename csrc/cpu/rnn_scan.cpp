// The plain loops behind rnn_scan.h. Both products add multiples of a row of the weight, so the inner loop
// runs over contiguous memory and the compiler vectorises it without reordering a sum.

#include "rnn_scan.h"

#include <algorithm>

#include "../cells/rnn.h"

namespace rnnkit {
namespace {

// out += v M, with v [H] and M [H, H].
void add_product(const float* __restrict v, const float* __restrict m, float* __restrict out, int64_t H) {
  for (int64_t i = 0; i < H; ++i) {
    const float* row = m + i * H;
    for (int64_t j = 0; j < H; ++j) out[j] += v[i] * row[j];
  }
}

template <class Cell>
void forward_row(const RnnForward& s, int64_t b) {
  const int64_t H = s.H;
  float* h = s.h_n + b * H;
  std::copy_n(s.h + b * H, H, h);
  for (int64_t k = 0; k < s.n; ++k) {
    const int64_t step = s.reverse ? s.n - 1 - k : k;
    const int64_t t = s.t0 + step;
    const int64_t at = (step * s.B + b) * H;
    float* y = s.y + at;
    if (!s.cuts.live(t, b)) {
      std::fill_n(y, H, 0.0f);
      continue;
    }
    if (s.cuts.cut(t, b, s.B, s.reverse)) {
      if (s.h_r != nullptr) {
        std::copy_n(s.h_r + b * H, H, h);
      } else {
        std::fill_n(h, H, 0.0f);
      }
    }
    std::copy_n(s.gx + at, H, y);
    add_product(h, s.w_hh_t, y, H);
    for (int64_t j = 0; j < H; ++j) y[j] = Cell::step(y[j]);
    std::copy_n(y, H, h);
  }
}

template <class Cell>
void backward_row(const RnnBackward& s, int64_t b) {
  const int64_t H = s.H;
  float* dh = s.dh_0 + b * H;
  float* dh_r = s.dh_r + b * H;
  std::copy_n(s.gh_n + b * H, H, dh);
  std::fill_n(dh_r, H, 0.0f);
  for (int64_t k = 0; k < s.T; ++k) {
    const int64_t t = s.reverse ? k : s.T - 1 - k;
    const int64_t at = (t * s.B + b) * H;
    float* dg = s.dg + at;
    if (!s.cuts.live(t, b)) {
      std::fill_n(dg, H, 0.0f);
      continue;
    }
    const float* gy = s.gy + at;
    const float* y = s.y + at;
    bool dead = s.cuts.any();
    for (int64_t j = 0; j < H; ++j) {
      dg[j] = dh[j] + gy[j];
      dead = dead && dg[j] == 0.0f;
    }
    std::fill_n(dh, H, 0.0f);
    if (dead) {  // no gradient came here: y may hold NaN, and 0 * NaN would not be 0
      std::fill_n(dg, H, 0.0f);
    } else {
      for (int64_t j = 0; j < H; ++j) dg[j] = Cell::step_vjp(dg[j], y[j]);
      add_product(dg, s.w_hh, dh, H);
    }
    if (s.cuts.cut(t, b, s.B, s.reverse)) {
      for (int64_t j = 0; j < H; ++j) dh_r[j] += dh[j];
      std::fill_n(dh, H, 0.0f);
    }
  }
}

}  // namespace

void rnn_scan_forward(const RnnForward& s, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) s.relu ? forward_row<RnnRelu>(s, b) : forward_row<RnnTanh>(s, b);
}

void rnn_scan_backward(const RnnBackward& s, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) s.relu ? backward_row<RnnRelu>(s, b) : backward_row<RnnTanh>(s, b);
}

void transpose(const float* in, float* out, int64_t H) {
  for (int64_t i = 0; i < H; ++i) {
    for (int64_t j = 0; j < H; ++j) out[j * H + i] = in[i * H + j];
  }
}

}  // namespace rnnkit
