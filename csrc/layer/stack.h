// A whole call on the CPU: every layer, both directions, dropout between layers, in the layout that the
// caller has. What python_module.cpp gives to Python.

#pragma once

#include <string_view>

#include "layer.h"

namespace rnnkit {

// How x lies, [T, B, I], [B, T, I], [T, I] or [B, I] of one step; the other tensors lie accordingly.
enum class Layout : int64_t { time_major, batch_first, unbatched, step };

// L layers, D directions, P the size of a projection or 0, N that of the state; sizes are those of
// time_major. Unbatched all lack B; a step's states lack L D, which is 1.
struct StackInputs {
  Cell cell = Cell::rnn_tanh;
  int64_t layers = 1, directions = 1, P = 0;
  Layout layout = Layout::time_major;
  Tensor x;                     // [T, B, I]
  OptionalTensor h_0, c_0;      // [L D, B, N], [L D, B, H]; zeros where missing
  OptionalTensor lengths;       // [B] Long, within 0 and T
  OptionalTensor reset;         // [T, B] Bool
  OptionalTensor h_r, c_r;      // as h_0 and c_0: the states at a reset
  std::vector<Tensor> weights;  // for each layer and direction w_ih, w_hh[, b_ih, b_hh][, w_hr]
};

struct StackOptions {
  bool all_states = false, recompute = false;
  double dropout = 0;  // the probability between layers, 0 in evaluation
  // Whose gradients are wanted: a byte each for x, h_0, c_0, lengths, reset, h_r, c_r and the weights; empty:
  // nobody's.
  std::string_view needs;
};

// y [T, B, D N] (not of a step), h_n, for an LSTM c_n, with all_states h_all [L D, T, B, N] and for an LSTM
// c_all, in the caller's layout; then what stack_backward wants kept, where gradients are wanted. `masks`:
// those of an earlier call, to repeat it; else new ones are drawn by torch's generator, [T, B, D N] for each
// layer but the last.
std::vector<Tensor> stack_forward(StackInputs in, const StackOptions& o, std::vector<Tensor> masks);

struct StackGradients {
  OptionalTensor y;  // the forward's first result; not of a step
  std::vector<Tensor> kept;
  OptionalTensor gy, gh_n, gc_n, gh_all, gc_all;
};

// The gradients of what o.needs names, in its places.
std::vector<OptionalTensor> stack_backward(StackInputs in, const StackOptions& o, const StackGradients& g);

// Whether the forward's y is what the backward reads, so that it is not among what is kept. A step has none.
inline bool reads_output(const StackInputs& in) { return in.layout != Layout::step; }

}  // namespace rnnkit
