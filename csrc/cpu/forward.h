// The forward scan of every cell. A step is one GEMM with the recurrent weights, whose epilogue makes the new
// state of a tile while it is in the first-level cache, and for two cells a second one: the textbook GRU's
// product with r h, and an LSTM's projection. Included once per variant, inside its namespace.

template <class S>
class TypedForwardScan final : public ForwardScan {
  using A = opmath_t<S>;
  using Element = element_t<S>;
  using V = vector_t<S>;
  using M = Math<A>;
  static constexpr int L = lanes<A>;
  static constexpr bool rounded = !std::is_same_v<Element, A>;  // products read the state as it is stored

 public:
  TypedForwardScan(const Forward& f, int64_t T)
      : f_(f), l_(f.layer), H_(l_.H), N_(l_.P ? l_.P : l_.H), G_(gates_of(l_.cell)), K_(saved_of(l_.cell)) {
    const bool pack = T > 1;
    const S* w = static_cast<const S*>(l_.w_hh);
    if (l_.cell == Cell::gru_reset_before) {
      first_weights_.gemm_nt(w, H_, 2, H_, H_, l_.B, pack, l_.workers);
      second_weights_.gemm_nt(w + 2 * H_ * H_, H_, 1, H_, H_, l_.B, pack, l_.workers);
    } else {
      first_weights_.gemm_nt(w, H_, static_cast<int>(G_), H_, N_, l_.B, pack, l_.workers);
      if (l_.P)
        second_weights_.gemm_nt(static_cast<const S*>(l_.w_hr), l_.P, 1, l_.P, H_, l_.B, pack, l_.workers);
    }
    if (f.w_ih != nullptr) {
      const S* w_ih = static_cast<const S*>(f.w_ih);
      first_input_weights_.gemm_nt(w_ih, H_, first_weights_.gates, H_, f.I, l_.B, true, l_.workers);
      if (l_.cell == Cell::gru_reset_before)
        second_input_weights_.gemm_nt(w_ih + 2 * H_ * f.I, H_, 1, H_, f.I, l_.B, true, l_.workers);
    }
    const bool after = l_.cell == Cell::gru;
    bias_ = PaddedMatrix<A>(G_ + after, H_);
    if (f.b_ih != nullptr) {
      const S* ih = static_cast<const S*>(f.b_ih);
      const S* hh = static_cast<const S*>(f.b_hh);
      for (int64_t g = 0; g < G_; ++g) {
        const bool inside = after && g == 2;  // b_hn: r multiplies it
        for (int64_t j = 0; j < H_; ++j) {
          const A recurrent = load_one(hh + g * H_ + j);
          bias_.row(g)[j] = load_one(ih + g * H_ + j) + (inside ? A(0) : recurrent);
          if (inside) bias_.row(3)[j] = recurrent;
        }
      }
    }
    for (PaddedMatrix<A>& h : h_) h = PaddedMatrix<A>(l_.B, N_);
    if constexpr (rounded) {
      for (PaddedMatrix<Element>& h : rounded_h_) h = PaddedMatrix<Element>(l_.B, N_);
    }
    if (l_.cell == Cell::lstm) c_ = PaddedMatrix<A>(l_.B, H_);
    if (l_.cell == Cell::gru_reset_before || l_.P) {
      second_operand_ = PaddedMatrix<Element>(l_.B, H_);
      z_ = PaddedMatrix<A>(l_.cell == Cell::gru_reset_before ? l_.B : 0, H_);
    }
  }

  void run(const ForwardChunk& chunk) override {
    r_ = chunk;
    h_[0].fill(f_.h, l_.B, N_);
    for (int64_t b = 0; rounded && b < l_.B; ++b) round_state(0, b, 0, N_);
    if (l_.cell == Cell::lstm) c_.fill(f_.c, l_.B, H_);
    const Partition partition(l_.workers.threads, l_.B, ceil_div(ceil_div(std::min(H_, N_), L), max_vectors),
                              G_ * H_ * N_, chunk.n);
    run_slices(partition, l_.workers.parallel, [&](int64_t first, int64_t last, SpinBarrier& barrier) {
      std::vector<ActiveRows> rows(last - first);
      int now = 0;
      for (int64_t k = 0; k < r_.n; ++k, now ^= 1) {
        const int64_t step = l_.reverse ? r_.n - 1 - k : k;
        bool any_reset = false;
        for (int64_t p = first; p < last; ++p) {
          const ThreadSlice slice = partition.slice(p, l_.B);
          ActiveRows& own = rows[p - first];
          if (k == 0 || l_.masks.any()) own.find(l_.masks, l_.reverse, slice, r_.t0 + step);
          apply_resets_and_padding(slice, own, step, now);
          any_reset = any_reset || !own.reset.empty();
        }
        if (any_reset) barrier.wait(last - first);
        for (int64_t p = first; p < last; ++p)
          first_gemm(partition.slice(p, l_.B), rows[p - first], step, now);
        barrier.wait(last - first);
        if (second_operand_.stride != 0) {
          for (int64_t p = first; p < last; ++p)
            second_gemm(partition.slice(p, l_.B), rows[p - first], step, now);
          barrier.wait(last - first);
        }
      }
    });
    h_[chunk.n & 1].copy_to(f_.h, l_.B, N_);
    if (l_.cell == Cell::lstm) c_.copy_to(f_.c, l_.B, H_);
  }

 private:
  // The slice's own columns of a matrix of `width` columns.
  static void columns(const ThreadSlice& slice, int64_t width, int64_t* first, int64_t* count) {
    int v0, v1;
    slice.vectors(width, L, &v0, &v1);
    *first = static_cast<int64_t>(v0) * L;
    *count = std::max<int64_t>(0, std::min<int64_t>(static_cast<int64_t>(v1) * L, width) - *first);
  }

  // Replaces the state of a row that is reset; at padding writes zeros and keeps the state.
  void apply_resets_and_padding(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, int now) {
    if (!l_.masks.any()) return;
    int64_t n0, n, h0, h;
    columns(slice, N_, &n0, &n);
    columns(slice, H_, &h0, &h);
    for (int32_t b : rows.reset) {
      load_reset_state(static_cast<const A*>(l_.h_r), b, N_, n0, n, h_[now].row(b));
      round_state(now, b, n0, n);
      if (l_.cell == Cell::lstm) load_reset_state(static_cast<const A*>(l_.c_r), b, H_, h0, h, c_.row(b));
    }
    if (l_.masks.lengths == nullptr) return;
    for (int64_t b = slice.row0; b < slice.row1; ++b) {
      if (l_.masks.valid(r_.t0 + step, b)) continue;
      const int64_t at = step * l_.B + b;
      std::fill_n(static_cast<S*>(r_.y) + at * r_.y_stride + n0, n, S{});
      std::copy_n(h_[now].row(b) + n0, n, h_[now ^ 1].row(b) + n0);
      round_state(now ^ 1, b, n0, n);
      if (r_.c_all != nullptr) std::fill_n(static_cast<S*>(r_.c_all) + at * H_ + h0, h, S{});
      if (r_.gates == nullptr) continue;
      for (int64_t g = 0; g < K_; ++g) {
        std::fill_n(static_cast<A*>(r_.gates) + at * r_.gates_stride + g * H_ + h0, h, A(0));
      }
      if (r_.c_kept != nullptr) std::fill_n(static_cast<A*>(r_.c_kept) + at * H_ + h0, h, A(0));
    }
  }

  // What products read of some columns of a row's state, from a whole vector on. What follows the last column
  // stays zero, as for the second operand: the last pair may end there.
  void round_state([[maybe_unused]] int now, [[maybe_unused]] int64_t b, [[maybe_unused]] int64_t first,
                   [[maybe_unused]] int64_t count) {
    if constexpr (rounded) {
      for (int64_t j = first; j < first + count; j += L) {
        store(rounded_h_[now].row(b) + j, loadu<V>(h_[now].row(b) + j),
              static_cast<int>(std::min<int64_t>(L, N_ - j)));
      }
    }
  }
  const PaddedMatrix<Element>& state_operand(int now) const {
    if constexpr (rounded) {
      return rounded_h_[now];
    } else {
      return h_[now];
    }
  }

  static void load_reset_state(const A* from, int64_t b, int64_t width, int64_t first, int64_t count,
                               A* row) {
    if (from == nullptr) {
      std::fill_n(row + first, count, A(0));
    } else {
      std::copy_n(from + b * width + first, count, row + first);
    }
  }

  // One vector of units of one row at one step.
  struct UnitVector {
    int64_t at;  // row of [n, B, ...]
    int64_t b, j;
    int n;  // units of it that exist
  };

  UnitVector unit_vector(int64_t step, int32_t b, int u, int64_t width) const {
    const int64_t j = static_cast<int64_t>(u) * L;
    return {step * l_.B + b, b, j, static_cast<int>(std::min<int64_t>(L, width - j))};
  }
  // What x gives to pre-activation g; where the scan multiplies x, zx [.., lanes] begins with that of g0.
  V input(const UnitVector& p, int64_t g, const A* zx, int64_t g0 = 0) const {
    const V v = r_.gx == nullptr
                    ? loadu<V>(zx + (g - g0) * L)
                    : load(static_cast<const A*>(r_.gx) + p.at * r_.gx_stride + g * H_ + p.j, p.n);
    return v + bias(p, g);
  }
  V bias(const UnitVector& p, int64_t g) const { return loadu<V>(bias_.row(g) + p.j); }
  void save_gate(const UnitVector& p, int64_t g, V v) const {
    if (r_.gates != nullptr) store(static_cast<A*>(r_.gates) + p.at * r_.gates_stride + g * H_ + p.j, v, p.n);
  }
  // The new state: into the output, and for the next step.
  void store_state(const UnitVector& p, int now, V h) {
    store(static_cast<S*>(r_.y) + p.at * r_.y_stride + p.j, h, p.n);
    store(h_[now ^ 1].row(p.b) + p.j, h, L);
    if constexpr (rounded) store(rounded_h_[now ^ 1].row(p.b) + p.j, h, p.n);
  }

  void panels(const ThreadSlice& slice, const GemmWeights<S>& w, int* first, int* last) const {
    slice.vectors(w.units, L, first, last);
    *first /= w.panel_width();
    *last = static_cast<int>(ceil_div(*last, w.panel_width()));
  }

  template <int gates, class Epilogue>
  void gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, const GemmWeights<S>& w,
            const PaddedMatrix<Element>& a, Epilogue epilogue, const GemmWeights<S>* w_x = nullptr) {
    int first, last;
    panels(slice, w, &first, &last);
    InputGemm<S> x;
    if (w_x != nullptr && f_.w_ih != nullptr) {
      x = {w_x, static_cast<const Element*>(r_.x) + step * r_.x_step, r_.x_row};
    }
    gemm_panels<gates>(
        w, first, last, rows.valid.data(), static_cast<int>(rows.valid.size()), a.row(0), a.stride, epilogue,
        [&](int32_t b, int u)
            __attribute__((always_inline)) { prefetch(step * l_.B + b, static_cast<int64_t>(u) * L); },
        x);
  }

  // Asks for the input of one vector of units, and for the memory of its results. Inlined by force: gcc takes
  // a function of nothing but prefetches for one without effect.
  __attribute__((always_inline)) void prefetch(int64_t at, int64_t j) const {
    for (int64_t g = 0; r_.gx != nullptr && g < G_; ++g) {
      __builtin_prefetch(static_cast<const A*>(r_.gx) + at * r_.gx_stride + g * H_ + j);
    }
    __builtin_prefetch(static_cast<S*>(r_.y) + at * r_.y_stride + j, 1);
    if (r_.gates == nullptr) return;
    for (int64_t g = 0; g < K_; ++g) {
      __builtin_prefetch(static_cast<A*>(r_.gates) + at * r_.gates_stride + g * H_ + j, 1);
    }
    if (r_.c_kept != nullptr) __builtin_prefetch(static_cast<A*>(r_.c_kept) + at * H_ + j, 1);
  }

  // The GEMM with the state; its epilogue is all that can be made of it at once.
  void first_gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, int now) {
    const PaddedMatrix<Element>& h = state_operand(now);
    switch (l_.cell) {
      case Cell::rnn_tanh:
        gemm<1>(
            slice, rows, step, first_weights_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = unit_vector(step, b, u, H_);
              store_state(p, now, RnnTanh::step<M>(input(p, 0, zx) + loadu<V>(z)));
            },
            &first_input_weights_);
        break;
      case Cell::rnn_relu:
        gemm<1>(
            slice, rows, step, first_weights_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = unit_vector(step, b, u, H_);
              store_state(p, now, RnnRelu::step<M>(input(p, 0, zx) + loadu<V>(z)));
            },
            &first_input_weights_);
        break;
      case Cell::lstm:
        gemm<4>(
            slice, rows, step, first_weights_, h,
            [&](int32_t b, int u, const A* z, const A* zx) { lstm(unit_vector(step, b, u, H_), now, z, zx); },
            &first_input_weights_);
        break;
      case Cell::gru:
        gemm<3>(
            slice, rows, step, first_weights_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = unit_vector(step, b, u, H_);
              const V hn = loadu<V>(z + 2 * L) + bias(p, 3);
              const auto s =
                  GruResetAfter::step<M>(input(p, 0, zx) + loadu<V>(z), input(p, 1, zx) + loadu<V>(z + L),
                                         input(p, 2, zx), hn, loadu<V>(h_[now].row(b) + p.j));
              save_gate(p, 0, s.r), save_gate(p, 1, s.z), save_gate(p, 2, s.n), save_gate(p, 3, hn);
              store_state(p, now, s.h);
            },
            &first_input_weights_);
        break;
      case Cell::gru_reset_before:
        gemm<2>(
            slice, rows, step, first_weights_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = unit_vector(step, b, u, H_);
              const V r = M::sigmoid(input(p, 0, zx) + loadu<V>(z));
              const V update = M::sigmoid(input(p, 1, zx) + loadu<V>(z + L));
              save_gate(p, 0, r), save_gate(p, 1, update);
              store(z_.row(b) + p.j, update, L);
              store(second_operand_.row(b) + p.j, r * loadu<V>(h_[now].row(b) + p.j), p.n);
            },
            &first_input_weights_);
        break;
    }
  }

  void lstm(const UnitVector& p, int now, const A* z, const A* zx) {
    A* c = c_.row(p.b) + p.j;
    const auto s = Lstm::step<M>(input(p, 0, zx) + loadu<V>(z), input(p, 1, zx) + loadu<V>(z + L),
                                 input(p, 2, zx) + loadu<V>(z + 2 * L), input(p, 3, zx) + loadu<V>(z + 3 * L),
                                 loadu<V>(c));
    save_gate(p, 0, s.i), save_gate(p, 1, s.f), save_gate(p, 2, s.g), save_gate(p, 3, s.o);
    store(c, s.c, L);
    if (r_.c_kept != nullptr) store(static_cast<A*>(r_.c_kept) + p.at * H_ + p.j, s.c, p.n);
    if (r_.c_all != nullptr) store(static_cast<S*>(r_.c_all) + p.at * H_ + p.j, s.c, p.n);
    if (l_.P) {
      store(second_operand_.row(p.b) + p.j, s.m, p.n);
    } else {
      store_state(p, now, s.m);
    }
  }

  // The second GEMM, with what `first_gemm` left in second_operand_.
  void second_gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, int now) {
    if (l_.P) {
      gemm<1>(slice, rows, step, second_weights_, second_operand_,
              [&](int32_t b, int u, const A* z, const A*) {
                store_state(unit_vector(step, b, u, N_), now, loadu<V>(z));
              });
      return;
    }
    gemm<1>(
        slice, rows, step, second_weights_, second_operand_,
        [&](int32_t b, int u, const A* z, const A* zx) {
          const UnitVector p = unit_vector(step, b, u, H_);
          const V n = GruResetBefore::candidate<M>(input(p, 2, zx, 2) + loadu<V>(z));
          save_gate(p, 2, n);
          store_state(p, now, gru_state<M>(loadu<V>(z_.row(b) + p.j), n, loadu<V>(h_[now].row(b) + p.j)));
        },
        &second_input_weights_);
  }

  const Forward f_;
  const Layer l_;
  const int64_t H_, N_, G_, K_;  // K: blocks of H that are saved
  ForwardChunk r_{};
  GemmWeights<S> first_weights_, second_weights_;
  GemmWeights<S> first_input_weights_, second_input_weights_;  // those that multiply x, where the scan does
  PaddedMatrix<A> bias_;                                       // [G, H], and b_hn of a GRU with reset after
  PaddedMatrix<A> h_[2];                  // [B, N] the state before the step and after it, a double buffer
  PaddedMatrix<Element> rounded_h_[2];    // [B, N] the same as products read it, where that is rounded
  PaddedMatrix<A> c_;                     // [B, H]
  PaddedMatrix<Element> second_operand_;  // [B, H] what the second GEMM multiplies: r h, or o tanh(c)
  PaddedMatrix<A> z_;                     // [B, H] the textbook GRU's update gate between its two products
};
