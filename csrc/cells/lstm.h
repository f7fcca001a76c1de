// The gate math of the LSTM, blocks i, f, g, o, and beside it the derivative. Mirrors
// rnnkit/reference/lstm.py.
//
//     c = f c_before + i g        m = o tanh(c)        h = m, or W_hr m with a projection

#pragma once

#include "where.h"

namespace rnnkit {

struct Lstm {
  template <class V>
  struct State {
    V c, m;
  };

  template <class V>
  struct Step {
    V i, f, g, o, c, m;
  };

  template <class V>
  struct Gradients {
    V ai, af, ag, ao;  // of the pre-activations
    V c_before;
  };

  // The gate of block `at`, of its pre-activation.
  template <int at, class M, class V = typename M::Value>
  RNNKIT_VALUE static V gate(V a) {
    if constexpr (at == 2) {
      return M::tanh(a);
    } else {
      return M::sigmoid(a);
    }
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static State<V> state(V i, V f, V g, V o, V c_before) {
    const V c = f * c_before + i * g;
    return {c, o * M::tanh(c)};
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static Step<V> step(V ai, V af, V ag, V ao, V c_before) {
    const V i = gate<0, M>(ai), f = gate<1, M>(af), g = gate<2, M>(ag), o = gate<3, M>(ao);
    const State<V> s = state<M>(i, f, g, o, c_before);
    return {i, f, g, o, s.c, s.m};
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static Gradients<V> step_vjp(V dm, V dc_after, V i, V f, V g, V o, V c_before, V c) {
    const V one = M::set(1);
    const V tc = M::tanh(c);
    const V dc = dc_after + dm * o * (one - tc * tc);
    Gradients<V> d;
    d.ai = dc * g * i * (one - i);
    d.af = dc * c_before * f * (one - f);
    d.ag = dc * i * (one - g * g);
    d.ao = dm * tc * o * (one - o);
    d.c_before = dc * f;
    return d;
  }

  // m = o tanh(c), what W_hr multiplies.
  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V before_projection(V o, V c) {
    return o * M::tanh(c);
  }
};

}  // namespace rnnkit
