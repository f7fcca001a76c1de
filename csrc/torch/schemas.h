// The operators of schemas.cpp as functions, for python_module.cpp to call as well. What they take and give
// is in layer.h.

#pragma once

#include <tuple>

#include "../layer/layer.h"

namespace rnnkit {

std::vector<Tensor> cpu_layer_forward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                      Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                      OptionalTensor w_hr, OptionalTensor lengths, OptionalTensor reset,
                                      OptionalTensor h_r, OptionalTensor c_r, bool reverse, bool all_states,
                                      bool save, int64_t chunk_steps);

std::vector<Tensor> cpu_layer_backward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                       Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                       OptionalTensor w_hr, OptionalTensor lengths, OptionalTensor reset,
                                       OptionalTensor h_r, OptionalTensor c_r, bool reverse, Tensor y,
                                       OptionalTensor gates, OptionalTensor c_kept, OptionalTensor gy,
                                       OptionalTensor gh_n, OptionalTensor gc_n, OptionalTensor gc_all,
                                       int64_t needs);

// A module's only layer in the module's layouts: x and y [T, B, .], or [B, T, .] where batch_first, states
// [1, B, .]. Gives y, h_n, c_n of an LSTM, and with save what the backward wants.
std::vector<Tensor> cpu_single(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0, Tensor w_ih,
                               Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, bool batch_first,
                               bool save);

// The gradients in the same layouts, those of `needs`, see layer_backward.
std::vector<Tensor> cpu_single_backward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                        Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                        bool batch_first, Tensor y, OptionalTensor gates,
                                        OptionalTensor c_kept, OptionalTensor gy, OptionalTensor gh_n,
                                        OptionalTensor gc_n, int64_t needs);

Tensor cpu_step(int64_t cell, Tensor x, OptionalTensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                OptionalTensor b_hh);

std::tuple<Tensor, Tensor> cpu_lstm_step(Tensor x, OptionalTensor h, OptionalTensor c, Tensor w_ih,
                                         Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh);

}  // namespace rnnkit
