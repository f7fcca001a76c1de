// One layer in one direction over all T on the CPU: what torch/schemas.cpp registers. Shapes as in
// rnnkit/backends/spec.py.

#pragma once

#include <vector>

#include "gemm.h"

namespace rnnkit {

// Everything a layer reads, as it came in.
struct LayerInputs {
  Cell cell = Cell::rnn_tanh;
  Tensor x;                   // [T, B, I]
  OptionalTensor h_0, c_0;    // [B, N], [B, H]; zeros where missing
  Tensor w_ih, w_hh;          // [G H, I], [G H, N]
  OptionalTensor b_ih, b_hh;  // [G H]
  OptionalTensor w_hr;        // [P, H]
  OptionalTensor lengths;     // [B] Long
  OptionalTensor reset;       // [T, B] Bool
  OptionalTensor h_r, c_r;    // [B, N], [B, H]
  bool reverse = false;

  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, N = 0, G = 0;

  // Checks every tensor, makes them contiguous but x, and fills in the sizes.
  void check();
  // What the scans are told of it. It points into `h_r_opmath` and `c_r_opmath`.
  Layer layer();

  OptionalTensor h_r_opmath, c_r_opmath;  // h_r and c_r in the compute type
};

// y [T, B, N], h_n [B, N]; for an LSTM c_n [B, H]; with all_states c_all [T, B, H]; with save what the
// backward wants: gates [T, B, saved H] in the compute type, and for an LSTM c [T, B, H] in it. chunk_steps:
// steps that are projected at a time, 0: as many as serve the caches. into: where y shall be written, its
// rows in equal distances; new memory where missing.
std::vector<Tensor> layer_forward(LayerInputs in, bool all_states, bool save, int64_t chunk_steps,
                                  OptionalTensor into = std::nullopt);

// A copy in the compute type; `v` itself where it is in it.
Tensor to_opmath(const Tensor& v, Dtype dtype);

// x W_ih^T, without biases, for some steps at a time.
class Projection {
 public:
  // in: outlives it.
  explicit Projection(const LayerInputs& in) : in_(in), gemm_(in.w_ih, false, in.T * in.B, in.T > 1) {}
  // The steps t0 .. t0 + n - 1 into [n B, G H], rows `stride` apart, from the first of `gx` on plus `offset`.
  // The first of them.
  const void* run(int64_t t0, int64_t n, const Tensor& gx, int64_t stride, int64_t offset) const;

 private:
  const LayerInputs& in_;
  PackedGemm gemm_;
};

struct LayerGradients {
  Tensor y;  // [T, B, N] as the forward gave it, its rows in equal distances or not
  // As the forward saved them. Without gates they are made again, chunk by chunk of time, and c_kept is
  // c_all, [T, B, H] in the dtype of x.
  OptionalTensor gates, c_kept;
  OptionalTensor gy, gh_n, gc_n, gc_all;
};

// The gradients of x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, h_r, c_r, in this order, of those whose bit in
// `needs` is set (bit 0: x).
std::vector<Tensor> layer_backward(LayerInputs in, LayerGradients g, int64_t needs);

}  // namespace rnnkit
