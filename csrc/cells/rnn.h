// The gate math of the vanilla RNN: the activation of one pre-activation, and beside it the derivative. Pure
// functions on values; the loops in csrc/cpu/ only load, call and store. Mirrors rnnkit/reference/rnn.py.

#pragma once

#include <cmath>

namespace rnnkit {

// a: pre-activation W_ih x + b_ih + W_hh h + b_hh. h: the new state. dh, da: gradients of h and a.

struct RnnTanh {
  template <class T>
  static T step(T a) {
    return std::tanh(a);
  }

  template <class T>
  static T step_vjp(T dh, T h) {
    return dh * (T(1) - h * h);
  }
};

struct RnnRelu {
  // Not `a > 0 ? a : 0`: a NaN has to stay one, as in torch.relu.
  template <class T>
  static T step(T a) {
    return a < T(0) ? T(0) : a;
  }

  template <class T>
  static T step_vjp(T dh, T h) {
    return h <= T(0) ? T(0) : dh;  // a NaN passes the gradient on, as in torch.relu
  }
};

}  // namespace rnnkit
