// The backward scan of every cell: at each step the derivative of the gate math on the gradient that has
// arrived, then one GEMM with the recurrent weights (for the textbook GRU and for an LSTM's projection a
// second one). Included once per variant, inside its namespace.

template <class S>
class TypedBackwardScan final : public BackwardScan {
  using A = opmath_t<S>;
  using Element = element_t<S>;
  using V = vector_t<S>;
  using M = Math<A>;
  static constexpr int L = lanes<A>;

 public:
  explicit TypedBackwardScan(const Backward& q)
      : q_(q),
        l_(q.layer),
        H_(l_.H),
        N_(l_.P ? l_.P : l_.H),
        G_(gates_of(l_.cell)),
        masked_(l_.masks.any()),
        dgx_is_operand_(std::is_same_v<S, Element> && l_.cell != Cell::gru && H_ % per_operand<S> == 0) {
    const S* w = static_cast<const S*>(l_.w_hh);
    const bool pack = q.T * l_.B > few_rows, last = q.T > 1 || q.wants_initial_grads;
    if (l_.cell == Cell::gru_reset_before) {
      inner_weights_.gemm_nn(w + 2 * H_ * H_, H_, H_, H_, l_.B, pack, l_.workers);
      if (last) state_weights_.gemm_nn(w, H_, H_, 2 * H_, l_.B, pack, l_.workers);
    } else {
      if (l_.P) inner_weights_.gemm_nn(static_cast<const S*>(l_.w_hr), H_, H_, l_.P, l_.B, pack, l_.workers);
      if (last) state_weights_.gemm_nn(w, N_, N_, G_ * H_, l_.B, pack, l_.workers);
    }
    dh_ = PaddedMatrix<A>(l_.B, N_);
    dh_.fill(q.dh, l_.B, N_);
    if (l_.cell == Cell::lstm) {
      dc_ = PaddedMatrix<A>(l_.B, H_);
      dc_.fill(q.dc, l_.B, H_);
    }
    if (q.dh_r != nullptr) std::fill_n(static_cast<A*>(q.dh_r), l_.B * N_, A(0));
    if (q.dc_r != nullptr) std::fill_n(static_cast<A*>(q.dc_r), l_.B * H_, A(0));
    if (!dgx_is_operand_) {
      for (PaddedMatrix<Element>& da : da_) da = PaddedMatrix<Element>(l_.B, G_ * H_);
    }
    if (l_.P && !std::is_same_v<Element, A>) rounded_dh_ = PaddedMatrix<Element>(l_.B, N_);
  }

  void run(const BackwardChunk& chunk) override {
    r_ = chunk;
    const Partition partition(l_.workers.threads, l_.B, ceil_div(ceil_div(std::min(H_, N_), L), max_vectors),
                              G_ * H_ * N_, q_.T);
    has_grad_.assign(masked_ ? partition.slices * l_.B : 0, 0);
    run_slices(partition, l_.workers.parallel, [&](int64_t first, int64_t last, SpinBarrier& barrier) {
      std::vector<ActiveRows> rows(last - first);
      for (int64_t k = 0; k < r_.n; ++k) {
        const int64_t t = r_.t0 + (l_.reverse ? k : r_.n - 1 - k);
        const int now = static_cast<int>(k & 1);
        const auto each = [&](auto phase) {
          for (int64_t p = first; p < last; ++p) phase(partition.slice(p, l_.B), rows[p - first]);
        };
        each([&](const ThreadSlice& slice, ActiveRows& own) {
          if (k == 0 || masked_) own.find(l_.masks, l_.reverse, slice, t);
          add_output_grad(slice, own, t);
        });
        if (masked_ || l_.P) barrier.wait(last - first);
        each([&](const ThreadSlice& slice, ActiveRows& own) {
          if (masked_) drop_rows_without_grad(partition, slice, own, t);
          if (!l_.P) gate_vjp(slice, own, t, now);
          if (l_.P) backprop_projection(slice, own, t, now);
        });
        barrier.wait(last - first);
        if (l_.cell == Cell::gru_reset_before) {
          each([&](const ThreadSlice& slice, ActiveRows& own) { backprop_reset_gate(slice, own, t, now); });
          barrier.wait(last - first);
        }
        const bool end = t == (l_.reverse ? q_.T - 1 : 0);
        if (end && !q_.wants_initial_grads) continue;
        each([&](const ThreadSlice& slice, ActiveRows& own) { backprop_state(slice, own, t, now); });
      }
    });
    dh_.copy_to(q_.dh, l_.B, N_);
    if (l_.cell == Cell::lstm) dc_.copy_to(q_.dc, l_.B, H_);
  }

 private:
  struct UnitVector {
    int64_t at;   // row of [T, B, ...]
    int64_t out;  // row of the chunk's gates, c and results
    int64_t b, j;
    int n;  // units that exist
  };

  UnitVector unit_vector(int64_t t, int32_t b, int u, int64_t width) const {
    const int64_t j = static_cast<int64_t>(u) * L;
    return {t * l_.B + b, (t - r_.t0) * l_.B + b, b, j, static_cast<int>(std::min<int64_t>(L, width - j))};
  }

  // Calls use(unit_vector) for each vector of `width` units of the slice, of each row.
  template <class Use>
  void each_vector(const ThreadSlice& slice, const std::vector<int32_t>& rows, int64_t t, int64_t width,
                   Use use) const {
    int first, last;
    slice.vectors(width, L, &first, &last);
    for (int32_t b : rows) {
      for (int u = first; u < last; ++u) use(unit_vector(t, b, u, width));
    }
  }

  V output_grad(const UnitVector& p, int64_t t) const {
    const Strides& s = q_.gy_strides;
    const S* from = static_cast<const S*>(q_.gy) + t * s.step + p.b * s.row;
    return s.unit ? load(from + p.j, p.n) : load_one(from) - V{};
  }

  // Adds the gate_grads of this step's results to what came from later steps.
  void add_output_grad(const ThreadSlice& slice, const ActiveRows& rows, int64_t t) {
    uint8_t* const has_grad = grad_flags(slice.by_units ? slice.index : 0);
    if (masked_) {
      for (int32_t b : rows.valid) has_grad[b] = 0;
    }
    each_vector(slice, rows.valid, t, N_, [&](const UnitVector& p) {
      A* to = dh_.row(p.b) + p.j;
      V dh = loadu<V>(to);
      if (q_.gy != nullptr) {
        dh += output_grad(p, t);
        store(to, dh, L);
      }
      if (r_.dp != nullptr) store(static_cast<S*>(r_.dp) + p.out * N_ + p.j, dh, p.n);
      if (rounded_dh_.stride != 0) store(rounded_dh_.row(p.b) + p.j, dh, p.n);  // zeros after them
      if (masked_) has_grad[p.b] |= nonzero(dh, p.n);
    });
    if (l_.cell != Cell::lstm) return;
    each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
      A* to = dc_.row(p.b) + p.j;
      V dc = loadu<V>(to);
      if (q_.gc_all != nullptr) {
        dc += load(static_cast<const S*>(q_.gc_all) + p.at * H_ + p.j, p.n);
        store(to, dc, L);
      }
      if (masked_) has_grad[p.b] |= nonzero(dc, p.n);
    });
  }

  static bool nonzero(V v, int n) {
    const auto zero = v == V{};
    for (int k = 0; k < n; ++k) {
      if (!zero[k]) return true;
    }
    return false;
  }

  uint8_t* grad_flags(int64_t slice) { return has_grad_.data() + slice * l_.B; }

  // At padding, and where no gradient came to a row, none leaves it: what was saved there may be NaN,
  // and 0 * NaN would not be 0.
  void drop_rows_without_grad(const Partition& partition, const ThreadSlice& slice, ActiveRows& rows,
                              int64_t t) {
    int first, last;
    slice.vectors(H_, L, &first, &last);
    const int64_t j0 = static_cast<int64_t>(first) * L;
    const int64_t n = std::max<int64_t>(0, std::min<int64_t>(static_cast<int64_t>(last) * L, H_) - j0);
    const auto clear = [&](int64_t b) {
      const int64_t at = (t - r_.t0) * l_.B + b;
      for (int64_t g = 0; g < G_; ++g) std::fill_n(static_cast<S*>(r_.dgx) + (at * G_ + g) * H_ + j0, n, S{});
      if (r_.dgn != nullptr) std::fill_n(static_cast<S*>(r_.dgn) + at * H_ + j0, n, S{});
    };
    size_t kept = 0;
    for (int32_t b : rows.valid) {
      bool found = false;
      for (int64_t p = 0; p < (partition.by_units ? partition.slices : 1); ++p)
        found = found || grad_flags(p)[b];
      if (found) {
        rows.valid[kept++] = b;
      } else {
        clear(b);
      }
    }
    rows.valid.resize(kept);
    if (l_.masks.lengths == nullptr) return;
    for (int64_t b = slice.row0; b < slice.row1; ++b) {
      if (l_.masks.valid(t, b)) continue;
      clear(b);
      if (r_.dp == nullptr) continue;
      slice.vectors(N_, L, &first, &last);
      for (int u = first; u < last; ++u) {
        const UnitVector p = unit_vector(t, static_cast<int32_t>(b), u, N_);
        store(static_cast<S*>(r_.dp) + p.out * N_ + p.j, V{}, p.n);
      }
    }
  }

  // The state that a step started from.
  bool is_first_step(int64_t t, int64_t b) const {
    if (!l_.reverse) return t == 0;
    return t == (l_.masks.lengths != nullptr ? std::min(l_.masks.lengths[b], q_.T) : q_.T) - 1;
  }
  V h_before(const UnitVector& p, int64_t t) const {
    if (l_.masks.resets_before(t, p.b, l_.reverse)) return state(l_.h_r, p, N_);
    if (is_first_step(t, p.b)) return state(q_.h_0, p, N_);
    const int64_t before = p.at + (l_.reverse ? l_.B : -l_.B);
    return load(static_cast<const S*>(q_.y) + before * q_.y_stride + p.j, p.n);
  }
  V c_before(const UnitVector& p, int64_t t) const {
    if (l_.masks.resets_before(t, p.b, l_.reverse)) return state(l_.c_r, p, H_);
    if (is_first_step(t, p.b)) return state(q_.c_0, p, H_);
    const int64_t before = p.out + (l_.reverse ? l_.B : -l_.B);
    return load(static_cast<const A*>(r_.c_kept) + before * H_ + p.j, p.n);
  }
  static V state(const void* from, const UnitVector& p, int64_t width) {
    return from == nullptr ? V{} : load(static_cast<const A*>(from) + p.b * width + p.j, p.n);
  }

  V gate(const UnitVector& p, int64_t g) const {
    return load(static_cast<const A*>(r_.gates) + p.out * r_.gates_stride + g * H_ + p.j, p.n);
  }
  // The gradient of a pre-activation: out, and for the GEMM with the recurrent weights.
  void store_gate_grad(const UnitVector& p, int now, int64_t g, V da) { store_gate_grad(p, now, g, da, da); }
  void store_gate_grad(const UnitVector& p, int now, int64_t g, V dgx, V dgh) {
    store(static_cast<S*>(r_.dgx) + (p.out * G_ + g) * H_ + p.j, dgx, p.n);
    if (!dgx_is_operand_) store(da_[now].row(p.b) + g * H_ + p.j, dgh, p.n);
  }

  // What the recurrent products of step t multiply: [B, G H], rows stride() apart.
  const Element* gate_grads(int64_t t, int now) const {
    if (dgx_is_operand_) return static_cast<const Element*>(r_.dgx) + (t - r_.t0) * l_.B * G_ * H_;
    return da_[now].row(0);
  }
  int64_t stride() const { return dgx_is_operand_ ? G_ * H_ : da_[0].stride; }

  void gate_vjp(const ThreadSlice& slice, const ActiveRows& rows, int64_t t, int now) {
    switch (l_.cell) {
      case Cell::rnn_tanh:
        each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
          const A* dh = dh_.row(p.b) + p.j;
          store_gate_grad(p, now, 0, RnnTanh::step_vjp<M>(loadu<V>(dh), output(p)));
        });
        break;
      case Cell::rnn_relu:
        each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
          const A* dh = dh_.row(p.b) + p.j;
          store_gate_grad(p, now, 0, RnnRelu::step_vjp<M>(loadu<V>(dh), output(p)));
        });
        break;
      case Cell::lstm:
        each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
          const A* dh = dh_.row(p.b) + p.j;
          lstm(p, t, now, loadu<V>(dh));
        });
        break;
      case Cell::gru:
        each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
          A* dh = dh_.row(p.b) + p.j;
          const auto d = GruResetAfter::step_vjp<M>(loadu<V>(dh), gate(p, 0), gate(p, 1), gate(p, 2),
                                                    gate(p, 3), h_before(p, t));
          store_gate_grad(p, now, 0, d.r);
          store_gate_grad(p, now, 1, d.z);
          store_gate_grad(p, now, 2, d.n, d.hn);
          store(static_cast<S*>(r_.dgn) + p.out * H_ + p.j, d.hn, p.n);
          store(dh, d.h_before, L);
        });
        break;
      case Cell::gru_reset_before:
        each_vector(slice, rows.valid, t, H_, [&](const UnitVector& p) {
          A* dh = dh_.row(p.b) + p.j;
          const auto d = GruResetBefore::step_vjp<M>(loadu<V>(dh), gate(p, 1), gate(p, 2), h_before(p, t));
          store_gate_grad(p, now, 1, d.z);
          store_gate_grad(p, now, 2, d.n);
          store(dh, d.h_before, L);
        });
        break;
    }
  }

  V output(const UnitVector& p) const {
    return load(static_cast<const S*>(q_.y) + p.at * q_.y_stride + p.j, p.n);
  }

  void lstm(const UnitVector& p, int64_t t, int now, V dm) {
    A* dc = dc_.row(p.b) + p.j;
    const V c = load(static_cast<const A*>(r_.c_kept) + p.out * H_ + p.j, p.n);
    const auto d = Lstm::step_vjp<M>(dm, loadu<V>(dc), gate(p, 0), gate(p, 1), gate(p, 2), gate(p, 3),
                                     c_before(p, t), c);
    store_gate_grad(p, now, 0, d.ai);
    store_gate_grad(p, now, 1, d.af);
    store_gate_grad(p, now, 2, d.ag);
    store_gate_grad(p, now, 3, d.ao);
    store(dc, d.c_before, L);
    if (l_.P)
      store(static_cast<S*>(r_.second_operand) + p.out * H_ + p.j, Lstm::before_projection<M>(gate(p, 3), c),
            p.n);
  }

  // What the product with W_hr multiplies.
  const PaddedMatrix<Element>& projected_grad() const {
    if constexpr (std::is_same_v<Element, A>) {
      return dh_;
    } else {
      return rounded_dh_;
    }
  }

  void backprop_projection(const ThreadSlice& slice, const ActiveRows& rows, int64_t t, int now) {
    const PaddedMatrix<Element>& dh = projected_grad();
    gemm(slice, rows, inner_weights_, dh.row(0), dh.stride, [&](int32_t b, int u, const A* z, const A*) {
      lstm(unit_vector(t, b, u, H_), t, now, loadu<V>(z));
    });
  }

  void backprop_reset_gate(const ThreadSlice& slice, const ActiveRows& rows, int64_t t, int now) {
    gemm(slice, rows, inner_weights_, gate_grads(t, now) + 2 * H_, stride(),
         [&](int32_t b, int u, const A* z, const A*) {
           const UnitVector p = unit_vector(t, b, u, H_);
           const V r = gate(p, 0), h = h_before(p, t);
           const auto d = GruResetBefore::reset_vjp<M>(loadu<V>(z), r, h);
           store_gate_grad(p, now, 0, d.r);
           store(static_cast<S*>(r_.second_operand) + p.out * H_ + p.j, r * h, p.n);
           A* dh = dh_.row(b) + p.j;
           store(dh, loadu<V>(dh) + d.h_before, L);
         });
  }

  // The gradient of the state before the step; where that was a reset's, it goes there and no further.
  void backprop_state(const ThreadSlice& slice, const ActiveRows& rows, int64_t t, int now) {
    const bool gru =
        l_.cell == Cell::gru || l_.cell == Cell::gru_reset_before;  // some of whose dh does not pass the GEMM
    gemm(slice, rows, state_weights_, gate_grads(t, now), stride(),
         [&](int32_t b, int u, const A* z, const A*) {
           A* dh = dh_.row(b) + static_cast<int64_t>(u) * L;
           store(dh, gru ? loadu<V>(dh) + loadu<V>(z) : loadu<V>(z), L);
         });
    each_vector(slice, rows.reset, t, N_,
                [&](const UnitVector& p) { move_to_reset_grad(dh_, q_.dh_r, N_, p); });
    if (l_.cell == Cell::lstm) {
      each_vector(slice, rows.reset, t, H_,
                  [&](const UnitVector& p) { move_to_reset_grad(dc_, q_.dc_r, H_, p); });
    }
  }

  void move_to_reset_grad(PaddedMatrix<A>& d, void* sum, int64_t width, const UnitVector& p) {
    A* from = d.row(p.b) + p.j;
    if (sum != nullptr) {
      A* to = static_cast<A*>(sum) + p.b * width + p.j;
      store(to, load(to, p.n) + loadu<V>(from), p.n);
    }
    store(from, V{}, L);
  }

  template <class Epilogue>
  void gemm(const ThreadSlice& slice, const ActiveRows& rows, const GemmWeights<S>& w, const Element* a,
            int64_t lda, Epilogue epilogue) {
    int first, last;
    slice.vectors(w.units, L, &first, &last);
    gemm_panels<1>(w, first / w.panel_width(), static_cast<int>(ceil_div(last, w.panel_width())),
                   rows.valid.data(), static_cast<int>(rows.valid.size()), a, lda, epilogue,
                   [](int32_t, int) {});
  }

  const Backward q_;
  BackwardChunk r_{};
  const Layer l_;
  const int64_t H_, N_, G_;
  const bool masked_;
  const bool dgx_is_operand_;  // the recurrent GEMM reads dgx itself
  GemmWeights<S> inner_weights_, state_weights_;
  PaddedMatrix<A> dh_, dc_;           // [B, N], [B, H]
  PaddedMatrix<Element> rounded_dh_;  // [B, N] dh as the product with W_hr reads it, where that is rounded
  PaddedMatrix<Element> da_[2];       // [B, G H] what the recurrent GEMM multiplies, a double buffer
  std::vector<uint8_t> has_grad_;  // [slices, B]: whether a gradient came to the row, as far as a slice sees
};
