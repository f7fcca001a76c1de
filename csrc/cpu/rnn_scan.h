// The recurrence of the vanilla RNN over time on plain pointers, float32. Callers give a range of rows: rows
// are independent of one another, so ranges may run in any number of threads with bitwise the same result.
//
// Shapes: T steps in all, n of them in a range, B rows, H hidden size; everything is contiguous, rows of H
// last.

#pragma once

#include <cstdint>

namespace rnnkit {

// Which rows live at which step, and where their state is replaced before a step.
struct Cuts {
  const int64_t* lengths;  // [B], or null: every row lives at every step
  const bool* reset;       // [T, B], or null
  int64_t T;               // steps of `reset`

  bool any() const { return lengths != nullptr || reset != nullptr; }

  bool live(int64_t t, int64_t b) const { return lengths == nullptr || t < lengths[b]; }

  // A reset at step s separates s - 1 from s: backwards that is before s - 1 is processed.
  bool cut(int64_t t, int64_t b, int64_t B, bool reverse) const {
    const int64_t s = reverse ? t + 1 : t;
    return reset != nullptr && s < T && live(s, b) && reset[s * B + b];
  }
};

struct RnnForward {
  int64_t n, B, H, t0;  // the steps t0 .. t0 + n - 1
  bool relu, reverse;
  Cuts cuts;
  const float* gx;      // [n, B, H] x W_ih^T with both biases
  const float* w_hh_t;  // [H, H] W_hh transposed
  const float* h;       // [B, H] the state before the first step that is processed
  const float* h_r;     // [B, H] the state at a reset, or null: zeros
  float* y;             // [n, B, H] 0 where the row does not live
  float* h_n;           // [B, H]
};

struct RnnBackward {
  int64_t T, B, H;
  bool relu, reverse;  // as the forward ran
  Cuts cuts;
  const float* gy;    // [T, B, H]
  const float* gh_n;  // [B, H]
  const float* y;     // [T, B, H] as the forward gave it
  const float* w_hh;  // [H, H]
  float* dg;          // [T, B, H] of the pre-activation, 0 where the row does not live
  float* dh_0;        // [B, H]
  float* dh_r;        // [B, H] summed over the resets
};

// The rows first .. last - 1.
void rnn_scan_forward(const RnnForward& s, int64_t first, int64_t last);
void rnn_scan_backward(const RnnBackward& s, int64_t first, int64_t last);

// out[j, i] = in[i, j], both [H, H].
void transpose(const float* in, float* out, int64_t H);

}  // namespace rnnkit
