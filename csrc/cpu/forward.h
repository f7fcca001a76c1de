// The forward scan of every cell. A step is one GEMM with the recurrent weights, whose epilogue makes the new
// state of a tile while it is in the first-level cache, and for two cells a second one: the textbook GRU's
// product with r h, and an LSTM's projection. Included once per variant, inside its namespace.

// Rows of a matrix, or null.
template <class T>
struct Rows {
  T* first = nullptr;
  int64_t stride = 0;
  T* row(int64_t b) const { return first + b * stride; }
};

// One vector of units of one row.
struct UnitVector {
  int64_t b, j;
  int n;  // units of it that exist
};

// What the gate math of a step reads and writes. Every function of a step has a copy of its own, which no
// store can change: it is read once, not again after each store.
template <class S>
struct ForwardStep {
  using A = opmath_t<S>;
  using Element = element_t<S>;
  using V = vector_t<S>;
  using M = Math<A>;
  static constexpr int L = lanes<A>;

  int64_t H, N, G, K;  // K: blocks of H that are saved
  Rows<const A> gx;    // [B, G H], null where the scan multiplies x
  Rows<S> y, c_all;    // [B, N], [B, H]
  Rows<A> gates, c_kept;
  Rows<A> bias, h, h_next, c, z;  // the scan's own: see its members
  Rows<Element> rounded_next, second;

  UnitVector unit_vector(int32_t b, int u, int64_t width) const {
    const int64_t j = static_cast<int64_t>(u) * L;
    return {b, j, static_cast<int>(std::min<int64_t>(L, width - j))};
  }

  // What x gives to pre-activation g; where the scan multiplies x, zx [.., lanes] begins with that of g0.
  V input(const UnitVector& p, int64_t g, const A* zx, int64_t g0 = 0) const {
    const V v = gx.first == nullptr ? loadu<V>(zx + (g - g0) * L) : load(gx.row(p.b) + g * H + p.j, p.n);
    return v + input_bias(p, g);
  }
  V input_bias(const UnitVector& p, int64_t g) const { return loadu<V>(bias.row(g) + p.j); }

  // Gate g of z [gates, lanes]: of its pre-activation, in its place.
  template <class Function>
  void activate(const UnitVector& p, int64_t g, const A* zx, A* z, Function function) const {
    const V v = function(input(p, g, zx) + loadu<V>(z + g * L));
    save_gate(p, g, v);
    storeu(z + g * L, v);
  }
  // M::sigmoid is inlined by force, so no pointer to it is passed.
  void sigmoid(const UnitVector& p, int64_t g, const A* zx, A* z) const {
    activate(p, g, zx, z, [](V a) { return M::sigmoid(a); });
  }
  void save_gate(const UnitVector& p, int64_t g, V v) const {
    if (gates.first != nullptr) store(gates.row(p.b) + g * H + p.j, v, p.n);
  }

  // The new state: into the output, and for the next step.
  void store_state(const UnitVector& p, V v) const {
    store(y.row(p.b) + p.j, v, p.n);
    store(h_next.row(p.b) + p.j, v, L);
    if constexpr (!std::is_same_v<Element, A>) store(rounded_next.row(p.b) + p.j, v, p.n);
  }

  void lstm_gates(const UnitVector& p, A* z, const A* zx) const {
    activate(p, 0, zx, z, Lstm::gate<0, M>);
    activate(p, 1, zx, z, Lstm::gate<1, M>);
    activate(p, 2, zx, z, Lstm::gate<2, M>);
    activate(p, 3, zx, z, Lstm::gate<3, M>);
  }
  // o tanh(c), of the gates z.
  V lstm_state(const UnitVector& p, const A* z) const {
    A* const from = c.row(p.b) + p.j;
    const auto s = Lstm::state<M>(loadu<V>(z), loadu<V>(z + L), loadu<V>(z + 2 * L), loadu<V>(z + 3 * L),
                                  loadu<V>(from));
    store(from, s.c, L);
    if (c_kept.first != nullptr) store(c_kept.row(p.b) + p.j, s.c, p.n);
    if (c_all.first != nullptr) store(c_all.row(p.b) + p.j, s.c, p.n);
    return s.m;
  }

  // Asks for the input of some vectors of units, and for the memory of their results, line by line. Inlined
  // by force: gcc takes a function of nothing but prefetches for one without effect.
  __attribute__((always_inline)) void prefetch(int32_t b, int u, int units) const {
    constexpr int64_t line = 64 / sizeof(A);
    const int64_t end = static_cast<int64_t>(u + units) * L;
    for (int64_t j = (static_cast<int64_t>(u) * L + line - 1) / line * line; j < end; j += line) {
      for (int64_t g = 0; gx.first != nullptr && g < G; ++g) __builtin_prefetch(gx.row(b) + g * H + j);
      __builtin_prefetch(y.row(b) + j, 1);
      for (int64_t k = 0; gates.first != nullptr && k < K; ++k) {
        __builtin_prefetch(gates.row(b) + k * H + j, 1);
      }
      if (c_kept.first != nullptr) __builtin_prefetch(c_kept.row(b) + j, 1);
    }
  }
};

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

  ForwardStep<S> at_step(int64_t step, int now) const {
    const int64_t at = step * l_.B;
    const auto rows = [&](auto* of_chunk, int64_t stride) {
      return Rows<std::remove_pointer_t<decltype(of_chunk)>>{
          of_chunk == nullptr ? nullptr : of_chunk + at * stride, stride};
    };
    ForwardStep<S> s;
    s.H = H_, s.N = N_, s.G = G_, s.K = K_;
    s.gx = rows(static_cast<const A*>(r_.gx), r_.gx_stride);
    s.y = rows(static_cast<S*>(r_.y), r_.y_stride);
    s.gates = rows(static_cast<A*>(r_.gates), r_.gates_stride);
    s.c_kept = rows(static_cast<A*>(r_.c_kept), H_);
    s.c_all = rows(static_cast<S*>(r_.c_all), H_);
    s.bias = all_rows(bias_), s.h = all_rows(h_[now]), s.h_next = all_rows(h_[now ^ 1]);
    s.rounded_next = all_rows(rounded_h_[now ^ 1]);
    s.c = all_rows(c_), s.z = all_rows(z_), s.second = all_rows(second_operand_);
    return s;
  }
  template <class T>
  static Rows<T> all_rows(const PaddedMatrix<T>& m) {
    return {m.stride == 0 ? nullptr : m.memory.data, m.stride};
  }

  void panels(const ThreadSlice& slice, const GemmWeights<S>& w, int* first, int* last) const {
    slice.vectors(w.units, L, first, last);
    *first /= w.panel_width();
    *last = static_cast<int>(ceil_div(*last, w.panel_width()));
  }

  template <int gates, class Epilogue, class Activate = NoActivation>
  void gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, const ForwardStep<S>& s,
            const GemmWeights<S>& w, const PaddedMatrix<Element>& a, const GemmWeights<S>* w_x,
            Epilogue epilogue, Activate activate = {}) {
    int first, last;
    panels(slice, w, &first, &last);
    InputGemm<S> x;
    if (w_x != nullptr && f_.w_ih != nullptr) {
      x = {w_x, static_cast<const Element*>(r_.x) + step * r_.x_step, r_.x_row};
    }
    gemm_panels<gates>(
        w, first, last, rows.valid.data(), static_cast<int>(rows.valid.size()), a.row(0), a.stride, epilogue,
        [s](int32_t b, int u, int units) __attribute__((always_inline)) { s.prefetch(b, u, units); }, x,
        activate);
  }

  // The GEMM with the state; its epilogue is all that can be made of it at once.
  void first_gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, int now) {
    const PaddedMatrix<Element>& h = state_operand(now);
    const ForwardStep<S> s = at_step(step, now);
    const GemmWeights<S>* const w_x = &first_input_weights_;
    switch (l_.cell) {
      case Cell::rnn_tanh:
        gemm<1>(slice, rows, step, s, first_weights_, h, w_x, [s](int32_t b, int u, const A* z, const A* zx) {
          const UnitVector p = s.unit_vector(b, u, s.H);
          s.store_state(p, RnnTanh::step<M>(s.input(p, 0, zx) + loadu<V>(z)));
        });
        break;
      case Cell::rnn_relu:
        gemm<1>(slice, rows, step, s, first_weights_, h, w_x, [s](int32_t b, int u, const A* z, const A* zx) {
          const UnitVector p = s.unit_vector(b, u, s.H);
          s.store_state(p, RnnRelu::step<M>(s.input(p, 0, zx) + loadu<V>(z)));
        });
        break;
      case Cell::lstm:
        gemm<4>(
            slice, rows, step, s, first_weights_, h, w_x,
            [s](int32_t b, int u, const A* z, const A*) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              const V m = s.lstm_state(p, z);
              if (s.second.first != nullptr) {
                store(s.second.row(b) + p.j, m, p.n);
              } else {
                s.store_state(p, m);
              }
            },
            [s](int32_t b, int u, A* z, const A* zx) { s.lstm_gates(s.unit_vector(b, u, s.H), z, zx); });
        break;
      case Cell::gru:
        gemm<3>(
            slice, rows, step, s, first_weights_, h, w_x,
            [s](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              const V n = GruResetAfter::candidate<M>(loadu<V>(z), s.input(p, 2, zx), loadu<V>(z + 2 * L));
              s.save_gate(p, 2, n);
              s.store_state(p, gru_state<M>(loadu<V>(z + L), n, loadu<V>(s.h.row(b) + p.j)));
            },
            [s](int32_t b, int u, A* z, const A* zx) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              s.sigmoid(p, 0, zx, z);
              s.sigmoid(p, 1, zx, z);
              const V hn = loadu<V>(z + 2 * L) + s.input_bias(p, 3);
              s.save_gate(p, 3, hn);
              storeu(z + 2 * L, hn);
            });
        break;
      case Cell::gru_reset_before:
        gemm<2>(
            slice, rows, step, s, first_weights_, h, w_x,
            [s](int32_t b, int u, const A* z, const A*) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              store(s.z.row(b) + p.j, loadu<V>(z + L), L);
              store(s.second.row(b) + p.j, loadu<V>(z) * loadu<V>(s.h.row(b) + p.j), p.n);
            },
            [s](int32_t b, int u, A* z, const A* zx) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              s.sigmoid(p, 0, zx, z);
              s.sigmoid(p, 1, zx, z);
            });
        break;
    }
  }

  // The second GEMM, with what `first_gemm` left in second_operand_.
  void second_gemm(const ThreadSlice& slice, const ActiveRows& rows, int64_t step, int now) {
    const ForwardStep<S> s = at_step(step, now);
    if (l_.P) {
      gemm<1>(slice, rows, step, s, second_weights_, second_operand_, nullptr,
              [s](int32_t b, int u, const A* z, const A*) {
                s.store_state(s.unit_vector(b, u, s.N), loadu<V>(z));
              });
      return;
    }
    gemm<1>(slice, rows, step, s, second_weights_, second_operand_, &second_input_weights_,
            [s](int32_t b, int u, const A* z, const A* zx) {
              const UnitVector p = s.unit_vector(b, u, s.H);
              const V n = GruResetBefore::candidate<M>(s.input(p, 2, zx, 2) + loadu<V>(z));
              s.save_gate(p, 2, n);
              s.store_state(p, gru_state<M>(loadu<V>(s.z.row(b) + p.j), n, loadu<V>(s.h.row(b) + p.j)));
            });
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
