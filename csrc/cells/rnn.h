// The gate math of the vanilla RNN: the activation of one pre-activation, and beside it the derivative. Pure
// functions on values; kernels only load, call and store. Mirrors rnnkit/reference/rnn.py.
//
// In every file of this folder M is the arithmetic: M::Value a number or a vector of numbers, M::set a
// constant, M::tanh, M::sigmoid, M::less, M::select. Names: a is a pre-activation, h a state, d... the
// gradient of ...

#pragma once

#include "where.h"

namespace rnnkit {

struct RnnTanh {
  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V step(V a) {
    return M::tanh(a);
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V step_vjp(V dh, V h) {
    return dh * (M::set(1) - h * h);
  }
};

struct RnnRelu {
  // Not `a > 0 ? a : 0`: a NaN has to stay one, as in torch.relu.
  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V step(V a) {
    return M::select(M::less(a, M::set(0)), M::set(0), a);
  }

  // A NaN passes the gradient on, as in torch.relu.
  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V step_vjp(V dh, V h) {
    return M::select(M::less_equal(h, M::set(0)), M::set(0), dh);
  }
};

}  // namespace rnnkit
