// The cells as the kernels of every regime see them: how many gates, what is saved, and the gate math of
// csrc/cells on arrays of gates, forward and backward next to one another. And time: which step is processed
// when, which steps are valid, where a state is replaced.
//
// x: gx of the step; s: the recurrent sums; K blocks are saved. `before` is the state before the step that a
// derivative needs (c of an LSTM, h of a GRU), `after` the one after it (c of an LSTM, y of an RNN).

#pragma once

#include "operands.cuh"

namespace rnnkit::cuda {

namespace cell {

struct rnn {
  static constexpr int G = 1, K = 0;
  static constexpr bool has_c = false, two_products = false, from_h = false;

  template <class M, class T>
  RNNKIT_DEVICE static T forward(bool relu, const T (&x)[1], const T (&s)[1], T, T&, T (&)[1]) {
    return relu ? RnnRelu::step<M>(x[0] + s[0]) : RnnTanh::step<M>(x[0] + s[0]);
  }
  template <class M, class T>
  RNNKIT_DEVICE static void backward(bool relu, T d, T&, const T (&)[1], T, T after, T (&dx)[1], T (&ds)[1],
                                     T&) {
    dx[0] = ds[0] = relu ? RnnRelu::step_vjp<M>(d, after) : RnnTanh::step_vjp<M>(d, after);
  }
};

struct lstm {
  static constexpr int G = 4, K = 4;
  static constexpr bool has_c = true, two_products = false, from_h = false;

  template <class M, class T>
  RNNKIT_DEVICE static T forward(bool, const T (&x)[4], const T (&s)[4], T, T& c, T (&saved)[4]) {
    const auto v = Lstm::step<M>(x[0] + s[0], x[1] + s[1], x[2] + s[2], x[3] + s[3], c);
    saved[0] = v.i, saved[1] = v.f, saved[2] = v.g, saved[3] = v.o;
    c = v.c;
    return v.m;
  }
  template <class M, class T>
  RNNKIT_DEVICE static void backward(bool, T d, T& dc, const T (&saved)[4], T before, T after, T (&dx)[4],
                                     T (&ds)[4], T&) {
    const auto v = Lstm::step_vjp<M>(d, dc, saved[0], saved[1], saved[2], saved[3], before, after);
    dx[0] = ds[0] = v.ai, dx[1] = ds[1] = v.af, dx[2] = ds[2] = v.ag, dx[3] = ds[3] = v.ao;
    dc = v.c_before;
  }
};

struct gru {
  static constexpr int G = 3, K = 4;
  static constexpr bool has_c = false, two_products = false, from_h = true;

  // s[2] has b_hn in it.
  template <class M, class T>
  RNNKIT_DEVICE static T forward(bool, const T (&x)[3], const T (&s)[3], T h, T&, T (&saved)[4]) {
    const auto v = GruResetAfter::step<M>(x[0] + s[0], x[1] + s[1], x[2], s[2], h);
    saved[0] = v.r, saved[1] = v.z, saved[2] = v.n, saved[3] = s[2];
    return v.h;
  }
  template <class M, class T>
  RNNKIT_DEVICE static void backward(bool, T d, T&, const T (&saved)[4], T before, T, T (&dx)[3], T (&ds)[3],
                                     T& direct) {
    const auto v = GruResetAfter::step_vjp<M>(d, saved[0], saved[1], saved[2], saved[3], before);
    dx[0] = ds[0] = v.r, dx[1] = ds[1] = v.z, dx[2] = v.n, ds[2] = v.hn;
    direct = v.h_before;
  }
};

// Two products in a step: gates r and z by h, then n by r h; backward dn first, then the others by what W_hn
// makes of it.
struct gru_reset_before {
  static constexpr int G = 3, K = 3;
  static constexpr bool has_c = false, two_products = true, from_h = true;

  template <class M, class T>
  RNNKIT_DEVICE static void forward_gates(const T (&x)[3], const T (&s)[2], T (&saved)[3]) {
    saved[0] = M::sigmoid(x[0] + s[0]), saved[1] = M::sigmoid(x[1] + s[1]);
  }
  template <class M, class T>
  RNNKIT_DEVICE static T forward_state(const T (&x)[3], T s, T h, T (&saved)[3]) {
    saved[2] = GruResetBefore::candidate<M>(x[2] + s);
    return gru_state<M>(saved[1], saved[2], h);
  }
  template <class M, class T>
  RNNKIT_DEVICE static T backward_state(T d, const T (&saved)[3], T before) {
    return GruResetBefore::step_vjp<M>(d, saved[1], saved[2], before).n;
  }
  template <class M, class T>
  RNNKIT_DEVICE static void backward_gates(T d, T drh, const T (&saved)[3], T before, T (&dx)[2], T& direct) {
    const auto v = GruResetBefore::step_vjp<M>(d, saved[1], saved[2], before);
    const auto r = GruResetBefore::reset_vjp<M>(drh, saved[0], before);
    dx[0] = r.r, dx[1] = v.z;
    direct = v.h_before + r.h_before;
  }
};

}  // namespace cell

// The index in time of the k-th step that is processed, of the forward or of the backward.
RNNKIT_DEVICE int64_t time_index(const Sequence& s, int64_t k, bool backward) {
  return s.reverse != backward ? s.n - 1 - k : k;
}

// The steps of a row; 0 for one that only fills a tile.
RNNKIT_DEVICE int64_t length_of(const Sequence& s, int64_t row) {
  if (row >= s.B) return 0;
  return s.lengths != nullptr && s.lengths[row] < s.total ? s.lengths[row] : s.total;
}

// Whether the state is replaced before step t. Backwards in time a reset at t + 1 lies there, between t and t
// + 1.
RNNKIT_DEVICE bool resets_before(const Sequence& s, int64_t t, int64_t row, int64_t length) {
  const int64_t at = t + (s.reverse ? 1 : 0);
  return s.reset != nullptr && at < length && s.reset[at * s.B + row];
}

// The step before t as it was processed, -1 where t was a row's first.
RNNKIT_DEVICE int64_t previous_time(const Sequence& s, int64_t t, int64_t length) {
  const int64_t at = s.reverse ? t + 1 : t - 1;
  return at < length ? at : -1;
}

}  // namespace rnnkit::cuda
