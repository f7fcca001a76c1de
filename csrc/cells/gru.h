// The gate math of the GRU, blocks r, z, n, in its two forms, and beside each the derivative. Mirrors
// rnnkit/reference/gru.py.
//
//     reset after:   n = tanh(x_n + r hn), hn = W_hn h + b_hn          (torch.nn, cuDNN)
//     reset before:  n = tanh(x_n + W_hn (r h) + b_hn)                 (the original)
//     both:          h = (1 - z) n + z h_before

#pragma once

#include "where.h"

namespace rnnkit {

template <class M, class V = typename M::Value>
RNNKIT_VALUE inline V gru_state(V z, V n, V h_before) {
  return (M::set(1) - z) * n + z * h_before;
}

struct GruResetAfter {
  template <class V>
  struct Step {
    V r, z, n, h;
  };

  template <class V>
  struct Gradients {
    V r, z, n;   // of the pre-activations, as the input projection made them
    V hn;        // of W_hn h + b_hn
    V h_before;  // what does not pass the recurrent product
  };

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V candidate(V r, V xn, V hn) {
    return M::tanh(xn + r * hn);
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static Step<V> step(V ar, V az, V xn, V hn, V h_before) {
    Step<V> s;
    s.r = M::sigmoid(ar);
    s.z = M::sigmoid(az);
    s.n = candidate<M>(s.r, xn, hn);
    s.h = gru_state<M>(s.z, s.n, h_before);
    return s;
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static Gradients<V> step_vjp(V dh, V r, V z, V n, V hn, V h_before) {
    const V one = M::set(1);
    Gradients<V> d;
    d.n = dh * (one - z) * (one - n * n);
    d.z = dh * (h_before - n) * z * (one - z);
    d.r = d.n * hn * r * (one - r);
    d.hn = d.n * r;
    d.h_before = dh * z;
    return d;
  }
};

struct GruResetBefore {
  template <class V>
  struct Gradients {
    V z, n;      // of the pre-activations
    V h_before;  // what passes neither recurrent product
  };

  template <class V>
  struct ResetGradients {
    V r;         // of the pre-activation
    V h_before;  // what came through r h
  };

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static V candidate(V an) {
    return M::tanh(an);
  }

  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static Gradients<V> step_vjp(V dh, V z, V n, V h_before) {
    const V one = M::set(1);
    Gradients<V> d;
    d.n = dh * (one - z) * (one - n * n);
    d.z = dh * (h_before - n) * z * (one - z);
    d.h_before = dh * z;
    return d;
  }

  // drh: the gradient of r h.
  template <class M, class V = typename M::Value>
  RNNKIT_VALUE static ResetGradients<V> reset_vjp(V drh, V r, V h_before) {
    ResetGradients<V> d;
    d.r = drh * h_before * r * (M::set(1) - r);
    d.h_before = drh * r;
    return d;
  }
};

}  // namespace rnnkit
