// The operators of schemas.cpp as functions, for python_module.cpp to call as well. What they take and give
// is in layer.h.

#pragma once

#include "../layer/stack.h"

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

// stack_forward and stack_backward of layer/stack.h with their arguments by place. P, the size of a
// projection, is 0 where there is none. tensors: x, h_0, c_0, lengths, reset, h_r, c_r and the weights, none
// of which is missing; `needs` has a byte for each.
std::vector<Tensor> cpu_stack_forward(int64_t cell, int64_t layers, int64_t directions, int64_t P,
                                      int64_t layout, int64_t all_states, int64_t recompute, double dropout,
                                      std::string_view needs, const std::vector<OptionalTensor>& tensors,
                                      const std::vector<Tensor>& masks);

// saved: the tensors, then y where stack_backward reads it, then what the forward gave to be kept. grads: of
// the forward's results, as many as there are. Gives as many as there are tensors.
std::vector<OptionalTensor> cpu_stack_backward(int64_t cell, int64_t layers, int64_t directions, int64_t P,
                                               int64_t layout, int64_t all_states, int64_t recompute,
                                               double dropout, std::string_view needs,
                                               const std::vector<OptionalTensor>& saved,
                                               const std::vector<OptionalTensor>& grads);

}  // namespace rnnkit
