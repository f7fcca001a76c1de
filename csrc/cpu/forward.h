// The forward scan of every cell. A step is one product with the recurrent weights whose tiles are turned
// into the new state while they are in the first-level cache, and for two cells a second one: the textbook
// GRU's product with r h, and an LSTM's projection. Included once per variant, inside its namespace.

template <class S>
class ForwardOf final : public ForwardScan {
  using A = compute_t<S>;
  using V = value_t<S>;
  using M = Math<A>;
  static constexpr int L = lanes<A>;

 public:
  ForwardOf(const Forward& f, int64_t T)
      : f_(f), l_(f.layer), H_(l_.H), N_(l_.P ? l_.P : l_.H), G_(gates_of(l_.cell)) {
    const bool pack = T > 1;
    const S* w = static_cast<const S*>(l_.w_hh);
    if (l_.cell == Cell::gru_before) {
      first_.by_rows(w, H_, 2, H_, H_, pack, l_.workers);
      second_.by_rows(w + 2 * H_ * H_, H_, 1, H_, H_, pack, l_.workers);
    } else {
      first_.by_rows(w, H_, static_cast<int>(G_), H_, N_, pack, l_.workers);
      if (l_.P) second_.by_rows(static_cast<const S*>(l_.w_hr), l_.P, 1, l_.P, H_, pack, l_.workers);
    }
    if (f.w_ih != nullptr) {
      const S* w_ih = static_cast<const S*>(f.w_ih);
      first_x_.by_rows(w_ih, H_, first_.gates, H_, f.I, true, l_.workers);
      if (l_.cell == Cell::gru_before)
        second_x_.by_rows(w_ih + 2 * H_ * f.I, H_, 1, H_, f.I, true, l_.workers);
    }
    const bool after = l_.cell == Cell::gru;
    bias_ = Padded<A>(G_ + after, H_);
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
    for (Padded<A>& h : h_) h = Padded<A>(l_.B, N_);
    if (l_.cell == Cell::lstm) c_ = Padded<A>(l_.B, H_);
    if (l_.cell == Cell::gru_before || l_.P) {
      inner_ = Padded<A>(l_.B, H_);
      z_ = Padded<A>(l_.cell == Cell::gru_before ? l_.B : 0, H_);
    }
  }

  void run(const Range& range) override {
    r_ = range;
    h_[0].fill(f_.h, l_.B, N_);
    if (l_.cell == Cell::lstm) c_.fill(f_.c, l_.B, H_);
    const Split split(l_.workers.threads, l_.B, ceil_div(ceil_div(std::min(H_, N_), L), max_vectors),
                      G_ * H_ * N_, range.n);
    run_parts(split, l_.workers.parallel, [&](int64_t first, int64_t last, Meeting& meeting) {
      std::vector<Rows> rows(last - first);
      int now = 0;
      for (int64_t k = 0; k < r_.n; ++k, now ^= 1) {
        const int64_t step = l_.reverse ? r_.n - 1 - k : k;
        bool cut = false;
        for (int64_t p = first; p < last; ++p) {
          const Part part = split.part(p, l_.B);
          Rows& own = rows[p - first];
          if (k == 0 || l_.cuts.any()) own.at(l_.cuts, l_.reverse, part, r_.t0 + step);
          enter(part, own, step, now);
          cut = cut || !own.cut.empty();
        }
        if (cut) meeting.wait(last - first);
        for (int64_t p = first; p < last; ++p) advance(split.part(p, l_.B), rows[p - first], step, now);
        meeting.wait(last - first);
        if (inner_.stride != 0) {
          for (int64_t p = first; p < last; ++p) finish(split.part(p, l_.B), rows[p - first], step, now);
          meeting.wait(last - first);
        }
      }
    });
    h_[range.n & 1].copy_to(f_.h, l_.B, N_);
    if (l_.cell == Cell::lstm) c_.copy_to(f_.c, l_.B, H_);
  }

 private:
  // The part's own columns of a matrix of `width` columns.
  static void columns(const Part& part, int64_t width, int64_t* first, int64_t* count) {
    int v0, v1;
    part.vectors(width, L, &v0, &v1);
    *first = static_cast<int64_t>(v0) * L;
    *count = std::max<int64_t>(0, std::min<int64_t>(static_cast<int64_t>(v1) * L, width) - *first);
  }

  // Puts the state of a reset in place; where a row does not live, zeros go out and the state goes on.
  void enter(const Part& part, const Rows& rows, int64_t step, int now) {
    if (!l_.cuts.any()) return;
    int64_t n0, n, h0, h;
    columns(part, N_, &n0, &n);
    columns(part, H_, &h0, &h);
    for (int32_t b : rows.cut) {
      put(static_cast<const A*>(l_.h_r), b, N_, n0, n, h_[now].row(b));
      if (l_.cell == Cell::lstm) put(static_cast<const A*>(l_.c_r), b, H_, h0, h, c_.row(b));
    }
    if (l_.cuts.lengths == nullptr) return;
    for (int64_t b = part.row0; b < part.row1; ++b) {
      if (l_.cuts.live(r_.t0 + step, b)) continue;
      const int64_t at = step * l_.B + b;
      std::fill_n(static_cast<S*>(r_.y) + at * N_ + n0, n, S{});
      std::copy_n(h_[now].row(b) + n0, n, h_[now ^ 1].row(b) + n0);
      if (r_.c_all != nullptr) std::fill_n(static_cast<S*>(r_.c_all) + at * H_ + h0, h, S{});
      if (r_.gates == nullptr) continue;
      for (int64_t g = 0; g < saved_of(l_.cell); ++g) {
        std::fill_n(static_cast<A*>(r_.gates) + at * r_.gates_stride + g * H_ + h0, h, A(0));
      }
      if (r_.c_kept != nullptr) std::fill_n(static_cast<A*>(r_.c_kept) + at * H_ + h0, h, A(0));
    }
  }

  static void put(const A* from, int64_t b, int64_t width, int64_t first, int64_t count, A* row) {
    if (from == nullptr) {
      std::fill_n(row + first, count, A(0));
    } else {
      std::copy_n(from + b * width + first, count, row + first);
    }
  }

  // One vector of units of one row at one step: where it stands everywhere.
  struct Place {
    int64_t at;  // row of [n, B, ...]
    int64_t b, j;
    int n;  // units of it that exist
  };

  Place place(int64_t step, int32_t b, int u, int64_t width) const {
    const int64_t j = static_cast<int64_t>(u) * L;
    return {step * l_.B + b, b, j, static_cast<int>(std::min<int64_t>(L, width - j))};
  }
  // The part of x in pre-activation g; where the scan multiplies x, zx [.., lanes] begins with that of g0.
  V input(const Place& p, int64_t g, const A* zx, int64_t g0 = 0) const {
    const V v = r_.gx == nullptr
                    ? whole<V>(zx + (g - g0) * L)
                    : load(static_cast<const A*>(r_.gx) + p.at * r_.gx_stride + g * H_ + p.j, p.n);
    return v + bias(p, g);
  }
  V bias(const Place& p, int64_t g) const { return whole<V>(bias_.row(g) + p.j); }
  void keep(const Place& p, int64_t g, V v) const {
    if (r_.gates != nullptr) store(static_cast<A*>(r_.gates) + p.at * r_.gates_stride + g * H_ + p.j, v, p.n);
  }
  // The new state: into the output, and for the next step.
  void give(const Place& p, int now, V h) {
    store(static_cast<S*>(r_.y) + p.at * N_ + p.j, h, p.n);
    store(h_[now ^ 1].row(p.b) + p.j, h, L);
  }

  void panels(const Part& part, const Weights<S>& w, int* first, int* last) const {
    part.vectors(w.units, L, first, last);
    *first /= w.wide();
    *last = static_cast<int>(ceil_div(*last, w.wide()));
  }

  template <int gates, class Use>
  void multiply(const Part& part, const Rows& rows, int64_t step, const Weights<S>& w, const Padded<A>& a,
                Use use, const Weights<S>* w_x = nullptr) {
    int first, last;
    panels(part, w, &first, &last);
    Beside<S> x;
    if (w_x != nullptr && f_.w_ih != nullptr) {
      x = {w_x, static_cast<const A*>(r_.x) + step * r_.x_step, r_.x_row};
    }
    product<gates>(
        w, first, last, rows.live.data(), static_cast<int>(rows.live.size()), a.row(0), a.stride, use,
        [&](int32_t b, int u)
            __attribute__((always_inline)) { ahead(step * l_.B + b, static_cast<int64_t>(u) * L); },
        x);
  }

  // Asks for the input of one vector of units, and for the places of its results. Inlined by force: gcc takes
  // a function of nothing but prefetches for one without effect.
  __attribute__((always_inline)) void ahead(int64_t at, int64_t j) const {
    for (int64_t g = 0; r_.gx != nullptr && g < G_; ++g) {
      __builtin_prefetch(static_cast<const A*>(r_.gx) + at * r_.gx_stride + g * H_ + j);
    }
    __builtin_prefetch(static_cast<S*>(r_.y) + at * N_ + j, 1);
    if (r_.gates == nullptr) return;
    for (int64_t g = 0; g < saved_of(l_.cell); ++g) {
      __builtin_prefetch(static_cast<A*>(r_.gates) + at * r_.gates_stride + g * H_ + j, 1);
    }
    if (r_.c_kept != nullptr) __builtin_prefetch(static_cast<A*>(r_.c_kept) + at * H_ + j, 1);
  }

  // The product with the state, and what can be made of it at once.
  void advance(const Part& part, const Rows& rows, int64_t step, int now) {
    const Padded<A>& h = h_[now];
    switch (l_.cell) {
      case Cell::rnn_tanh:
        multiply<1>(
            part, rows, step, first_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const Place p = place(step, b, u, H_);
              give(p, now, RnnTanh::step<M>(input(p, 0, zx) + whole<V>(z)));
            },
            &first_x_);
        break;
      case Cell::rnn_relu:
        multiply<1>(
            part, rows, step, first_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const Place p = place(step, b, u, H_);
              give(p, now, RnnRelu::step<M>(input(p, 0, zx) + whole<V>(z)));
            },
            &first_x_);
        break;
      case Cell::lstm:
        multiply<4>(
            part, rows, step, first_, h,
            [&](int32_t b, int u, const A* z, const A* zx) { lstm(place(step, b, u, H_), now, z, zx); },
            &first_x_);
        break;
      case Cell::gru:
        multiply<3>(
            part, rows, step, first_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const Place p = place(step, b, u, H_);
              const V hn = whole<V>(z + 2 * L) + bias(p, 3);
              const auto s =
                  GruAfter::step<M>(input(p, 0, zx) + whole<V>(z), input(p, 1, zx) + whole<V>(z + L),
                                    input(p, 2, zx), hn, whole<V>(h.row(b) + p.j));
              keep(p, 0, s.r), keep(p, 1, s.z), keep(p, 2, s.n), keep(p, 3, hn);
              give(p, now, s.h);
            },
            &first_x_);
        break;
      case Cell::gru_before:
        multiply<2>(
            part, rows, step, first_, h,
            [&](int32_t b, int u, const A* z, const A* zx) {
              const Place p = place(step, b, u, H_);
              const V r = M::sigmoid(input(p, 0, zx) + whole<V>(z));
              const V update = M::sigmoid(input(p, 1, zx) + whole<V>(z + L));
              keep(p, 0, r), keep(p, 1, update);
              store(z_.row(b) + p.j, update, L);
              store(inner_.row(b) + p.j, r * whole<V>(h.row(b) + p.j), L);
            },
            &first_x_);
        break;
    }
  }

  void lstm(const Place& p, int now, const A* z, const A* zx) {
    A* c = c_.row(p.b) + p.j;
    const auto s = Lstm::step<M>(input(p, 0, zx) + whole<V>(z), input(p, 1, zx) + whole<V>(z + L),
                                 input(p, 2, zx) + whole<V>(z + 2 * L), input(p, 3, zx) + whole<V>(z + 3 * L),
                                 whole<V>(c));
    keep(p, 0, s.i), keep(p, 1, s.f), keep(p, 2, s.g), keep(p, 3, s.o);
    store(c, s.c, L);
    if (r_.c_kept != nullptr) store(static_cast<A*>(r_.c_kept) + p.at * H_ + p.j, s.c, p.n);
    if (r_.c_all != nullptr) store(static_cast<S*>(r_.c_all) + p.at * H_ + p.j, s.c, p.n);
    if (l_.P) {
      store(inner_.row(p.b) + p.j, s.m, L);
    } else {
      give(p, now, s.m);
    }
  }

  // The second product, with what `advance` left in inner_.
  void finish(const Part& part, const Rows& rows, int64_t step, int now) {
    if (l_.P) {
      multiply<1>(part, rows, step, second_, inner_, [&](int32_t b, int u, const A* z, const A*) {
        give(place(step, b, u, N_), now, whole<V>(z));
      });
      return;
    }
    multiply<1>(
        part, rows, step, second_, inner_,
        [&](int32_t b, int u, const A* z, const A* zx) {
          const Place p = place(step, b, u, H_);
          const V n = GruBefore::candidate<M>(input(p, 2, zx, 2) + whole<V>(z));
          keep(p, 2, n);
          give(p, now, gru_state<M>(whole<V>(z_.row(b) + p.j), n, whole<V>(h_[now].row(b) + p.j)));
        },
        &second_x_);
  }

  const Forward f_;
  const Layer l_;
  const int64_t H_, N_, G_;
  Range r_{};
  Weights<S> first_, second_;
  Weights<S> first_x_, second_x_;  // those that multiply x, where the scan does
  Padded<A> bias_;                 // [G, H], and b_hn of a GRU with reset after
  Padded<A> h_[2];                 // [B, N] the state before the step and after it, in turns
  Padded<A> c_;                    // [B, H]
  Padded<A> inner_;                // [B, H] what the second product multiplies: r h, or o tanh(c)
  Padded<A> z_;                    // [B, H] the textbook GRU's update gate between its two products
};
