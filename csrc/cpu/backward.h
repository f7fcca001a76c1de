// The backward scan of every cell: at each step the derivative of the gate math on the gradient that has
// arrived, then one product with the recurrent weights (for the textbook GRU and for an LSTM's projection a
// second one). Included once per variant, inside its namespace.

template <class S>
class BackwardOf final : public BackwardScan {
  using A = compute_t<S>;
  using V = value_t<S>;
  using M = Math<A>;
  static constexpr int L = lanes<A>;

 public:
  explicit BackwardOf(const Backward& q)
      : q_(q),
        l_(q.layer),
        H_(l_.H),
        N_(l_.P ? l_.P : l_.H),
        G_(gates_of(l_.cell)),
        guarded_(l_.cuts.any()),
        direct_(std::is_same_v<S, A> && l_.cell != Cell::gru) {
    const S* w = static_cast<const S*>(l_.w_hh);
    const bool pack = q.T * l_.B > few_rows, last = q.T > 1 || q.wants_first;
    if (l_.cell == Cell::gru_before) {
      first_.by_columns(w + 2 * H_ * H_, H_, H_, H_, pack, l_.workers);
      if (last) last_.by_columns(w, H_, H_, 2 * H_, pack, l_.workers);
    } else {
      if (l_.P) first_.by_columns(static_cast<const S*>(l_.w_hr), H_, H_, l_.P, pack, l_.workers);
      if (last) last_.by_columns(w, N_, N_, G_ * H_, pack, l_.workers);
    }
    dh_ = Padded<A>(l_.B, N_);
    dh_.fill(q.dh, l_.B, N_);
    if (l_.cell == Cell::lstm) {
      dc_ = Padded<A>(l_.B, H_);
      dc_.fill(q.dc, l_.B, H_);
    }
    if (q.dh_r != nullptr) std::fill_n(static_cast<A*>(q.dh_r), l_.B * N_, A(0));
    if (q.dc_r != nullptr) std::fill_n(static_cast<A*>(q.dc_r), l_.B * H_, A(0));
    if (!direct_) {
      for (Padded<A>& da : da_) da = Padded<A>(l_.B, G_ * H_);
    }
  }

  void run(const BackwardRange& range) override {
    r_ = range;
    const Split split(l_.workers.threads, l_.B, ceil_div(ceil_div(std::min(H_, N_), L), max_vectors),
                      G_ * H_ * N_, q_.T);
    alive_.assign(guarded_ ? split.parts * l_.B : 0, 0);
    run_parts(split, l_.workers.parallel, [&](int64_t first, int64_t last, Meeting& meeting) {
      std::vector<Rows> rows(last - first);
      for (int64_t k = 0; k < r_.n; ++k) {
        const int64_t t = r_.t0 + (l_.reverse ? k : r_.n - 1 - k);
        const int now = static_cast<int>(k & 1);
        const auto each = [&](auto phase) {
          for (int64_t p = first; p < last; ++p) phase(split.part(p, l_.B), rows[p - first]);
        };
        each([&](const Part& part, Rows& own) {
          if (k == 0 || guarded_) own.at(l_.cuts, l_.reverse, part, t);
          receive(part, own, t);
        });
        if (guarded_ || l_.P) meeting.wait(last - first);
        each([&](const Part& part, Rows& own) {
          if (guarded_) drop_dead(split, part, own, t);
          if (!l_.P) differentiate(part, own, t, now);
          if (l_.P) through_projection(part, own, t, now);
        });
        meeting.wait(last - first);
        if (l_.cell == Cell::gru_before) {
          each([&](const Part& part, Rows& own) { through_reset(part, own, t, now); });
          meeting.wait(last - first);
        }
        const bool end = t == (l_.reverse ? q_.T - 1 : 0);
        if (end && !q_.wants_first) continue;
        each([&](const Part& part, Rows& own) { send(part, own, t, now); });
      }
    });
    dh_.copy_to(q_.dh, l_.B, N_);
    if (l_.cell == Cell::lstm) dc_.copy_to(q_.dc, l_.B, H_);
  }

 private:
  struct Place {
    int64_t at;   // row of [T, B, ...]
    int64_t out;  // row of the range's gates, c and results
    int64_t b, j;
    int n;  // units that exist
  };

  Place place(int64_t t, int32_t b, int u, int64_t width) const {
    const int64_t j = static_cast<int64_t>(u) * L;
    return {t * l_.B + b, (t - r_.t0) * l_.B + b, b, j, static_cast<int>(std::min<int64_t>(L, width - j))};
  }

  // Calls use(place) for each vector of `width` units that is the part's, of each row.
  template <class Use>
  void each_vector(const Part& part, const std::vector<int32_t>& rows, int64_t t, int64_t width,
                   Use use) const {
    int first, last;
    part.vectors(width, L, &first, &last);
    for (int32_t b : rows) {
      for (int u = first; u < last; ++u) use(place(t, b, u, width));
    }
  }

  V incoming(const Place& p, int64_t t) const {
    const Strides& s = q_.gy_strides;
    const S* from = static_cast<const S*>(q_.gy) + t * s.step + p.b * s.row;
    return s.unit ? load(from + p.j, p.n) : load_one(from) - V{};
  }

  // Adds the gradients of this step's results to what came from later steps.
  void receive(const Part& part, const Rows& rows, int64_t t) {
    uint8_t* const alive = flags(part.split ? part.index : 0);
    if (guarded_) {
      for (int32_t b : rows.live) alive[b] = 0;
    }
    each_vector(part, rows.live, t, N_, [&](const Place& p) {
      A* to = dh_.row(p.b) + p.j;
      V dh = whole<V>(to);
      if (q_.gy != nullptr) {
        dh += incoming(p, t);
        store(to, dh, L);
      }
      if (r_.dp != nullptr) store(static_cast<S*>(r_.dp) + p.out * N_ + p.j, dh, p.n);
      if (guarded_) alive[p.b] |= nonzero(dh, p.n);
    });
    if (l_.cell != Cell::lstm) return;
    each_vector(part, rows.live, t, H_, [&](const Place& p) {
      A* to = dc_.row(p.b) + p.j;
      V dc = whole<V>(to);
      if (q_.gc_all != nullptr) {
        dc += load(static_cast<const S*>(q_.gc_all) + p.at * H_ + p.j, p.n);
        store(to, dc, L);
      }
      if (guarded_) alive[p.b] |= nonzero(dc, p.n);
    });
  }

  static bool nonzero(V v, int n) {
    const auto zero = v == V{};
    for (int k = 0; k < n; ++k) {
      if (!zero[k]) return true;
    }
    return false;
  }

  uint8_t* flags(int64_t part) { return alive_.data() + part * l_.B; }

  // Where a row does not live, or no gradient came to it, nothing leaves it: what was saved there may be NaN,
  // and 0 * NaN would not be 0.
  void drop_dead(const Split& split, const Part& part, Rows& rows, int64_t t) {
    int first, last;
    part.vectors(H_, L, &first, &last);
    const int64_t j0 = static_cast<int64_t>(first) * L;
    const int64_t n = std::max<int64_t>(0, std::min<int64_t>(static_cast<int64_t>(last) * L, H_) - j0);
    const auto clear = [&](int64_t b) {
      const int64_t at = (t - r_.t0) * l_.B + b;
      for (int64_t g = 0; g < G_; ++g) std::fill_n(static_cast<S*>(r_.dgx) + (at * G_ + g) * H_ + j0, n, S{});
      if (r_.dgn != nullptr) std::fill_n(static_cast<S*>(r_.dgn) + at * H_ + j0, n, S{});
    };
    size_t kept = 0;
    for (int32_t b : rows.live) {
      bool alive = false;
      for (int64_t p = 0; p < (split.units ? split.parts : 1); ++p) alive = alive || flags(p)[b];
      if (alive) {
        rows.live[kept++] = b;
      } else {
        clear(b);
      }
    }
    rows.live.resize(kept);
    if (l_.cuts.lengths == nullptr) return;
    for (int64_t b = part.row0; b < part.row1; ++b) {
      if (l_.cuts.live(t, b)) continue;
      clear(b);
      if (r_.dp == nullptr) continue;
      part.vectors(N_, L, &first, &last);
      for (int u = first; u < last; ++u) {
        const Place p = place(t, static_cast<int32_t>(b), u, N_);
        store(static_cast<S*>(r_.dp) + p.out * N_ + p.j, V{}, p.n);
      }
    }
  }

  // The state that a step started from.
  bool starts(int64_t t, int64_t b) const {
    if (!l_.reverse) return t == 0;
    return t == (l_.cuts.lengths != nullptr ? std::min(l_.cuts.lengths[b], q_.T) : q_.T) - 1;
  }
  V h_before(const Place& p, int64_t t) const {
    if (l_.cuts.cut(t, p.b, l_.reverse)) return state(l_.h_r, p, N_);
    if (starts(t, p.b)) return state(q_.h_0, p, N_);
    const int64_t before = p.at + (l_.reverse ? l_.B : -l_.B);
    return load(static_cast<const S*>(q_.y) + before * N_ + p.j, p.n);
  }
  V c_before(const Place& p, int64_t t) const {
    if (l_.cuts.cut(t, p.b, l_.reverse)) return state(l_.c_r, p, H_);
    if (starts(t, p.b)) return state(q_.c_0, p, H_);
    const int64_t before = p.out + (l_.reverse ? l_.B : -l_.B);
    return load(static_cast<const A*>(r_.c_kept) + before * H_ + p.j, p.n);
  }
  static V state(const void* from, const Place& p, int64_t width) {
    return from == nullptr ? V{} : load(static_cast<const A*>(from) + p.b * width + p.j, p.n);
  }

  V gate(const Place& p, int64_t g) const {
    return load(static_cast<const A*>(r_.gates) + p.out * r_.gates_stride + g * H_ + p.j, p.n);
  }
  // The gradient of a pre-activation: out, and for the product with the recurrent weights.
  void give(const Place& p, int now, int64_t g, V da) { give(p, now, g, da, da); }
  void give(const Place& p, int now, int64_t g, V dgx, V dgh) {
    store(static_cast<S*>(r_.dgx) + (p.out * G_ + g) * H_ + p.j, dgx, p.n);
    if (!direct_) store(da_[now].row(p.b) + g * H_ + p.j, dgh, p.n);
  }

  // What the recurrent products of step t multiply: [B, G H], rows stride() apart.
  const A* gradients(int64_t t, int now) const {
    if (direct_) return static_cast<const A*>(r_.dgx) + (t - r_.t0) * l_.B * G_ * H_;
    return da_[now].row(0);
  }
  int64_t stride() const { return direct_ ? G_ * H_ : da_[0].stride; }

  void differentiate(const Part& part, const Rows& rows, int64_t t, int now) {
    switch (l_.cell) {
      case Cell::rnn_tanh:
        each_vector(part, rows.live, t, H_, [&](const Place& p) {
          const A* dh = dh_.row(p.b) + p.j;
          give(p, now, 0, RnnTanh::step_vjp<M>(whole<V>(dh), result(p)));
        });
        break;
      case Cell::rnn_relu:
        each_vector(part, rows.live, t, H_, [&](const Place& p) {
          const A* dh = dh_.row(p.b) + p.j;
          give(p, now, 0, RnnRelu::step_vjp<M>(whole<V>(dh), result(p)));
        });
        break;
      case Cell::lstm:
        each_vector(part, rows.live, t, H_, [&](const Place& p) {
          const A* dh = dh_.row(p.b) + p.j;
          lstm(p, t, now, whole<V>(dh));
        });
        break;
      case Cell::gru:
        each_vector(part, rows.live, t, H_, [&](const Place& p) {
          A* dh = dh_.row(p.b) + p.j;
          const auto d = GruAfter::step_vjp<M>(whole<V>(dh), gate(p, 0), gate(p, 1), gate(p, 2), gate(p, 3),
                                               h_before(p, t));
          give(p, now, 0, d.r);
          give(p, now, 1, d.z);
          give(p, now, 2, d.n, d.hn);
          store(static_cast<S*>(r_.dgn) + p.out * H_ + p.j, d.hn, p.n);
          store(dh, d.h_before, L);
        });
        break;
      case Cell::gru_before:
        each_vector(part, rows.live, t, H_, [&](const Place& p) {
          A* dh = dh_.row(p.b) + p.j;
          const auto d = GruBefore::step_vjp<M>(whole<V>(dh), gate(p, 1), gate(p, 2), h_before(p, t));
          give(p, now, 1, d.z);
          give(p, now, 2, d.n);
          store(dh, d.h_before, L);
        });
        break;
    }
  }

  V result(const Place& p) const { return load(static_cast<const S*>(q_.y) + p.at * N_ + p.j, p.n); }

  void lstm(const Place& p, int64_t t, int now, V dm) {
    A* dc = dc_.row(p.b) + p.j;
    const V c = load(static_cast<const A*>(r_.c_kept) + p.out * H_ + p.j, p.n);
    const auto d = Lstm::step_vjp<M>(dm, whole<V>(dc), gate(p, 0), gate(p, 1), gate(p, 2), gate(p, 3),
                                     c_before(p, t), c);
    give(p, now, 0, d.ai);
    give(p, now, 1, d.af);
    give(p, now, 2, d.ag);
    give(p, now, 3, d.ao);
    store(dc, d.c_before, L);
    if (l_.P)
      store(static_cast<S*>(r_.inner) + p.out * H_ + p.j, Lstm::before_projection<M>(gate(p, 3), c), p.n);
  }

  void through_projection(const Part& part, const Rows& rows, int64_t t, int now) {
    multiply(part, rows, first_, dh_.row(0), dh_.stride,
             [&](int32_t b, int u, const A* z, const A*) { lstm(place(t, b, u, H_), t, now, whole<V>(z)); });
  }

  void through_reset(const Part& part, const Rows& rows, int64_t t, int now) {
    multiply(part, rows, first_, gradients(t, now) + 2 * H_, stride(),
             [&](int32_t b, int u, const A* z, const A*) {
               const Place p = place(t, b, u, H_);
               const V r = gate(p, 0), h = h_before(p, t);
               const auto d = GruBefore::reset_vjp<M>(whole<V>(z), r, h);
               give(p, now, 0, d.r);
               store(static_cast<S*>(r_.inner) + p.out * H_ + p.j, r * h, p.n);
               A* dh = dh_.row(b) + p.j;
               store(dh, whole<V>(dh) + d.h_before, L);
             });
  }

  // The gradient of the state before the step; where that was a reset's, it goes there and no further.
  void send(const Part& part, const Rows& rows, int64_t t, int now) {
    const bool gru =
        l_.cell == Cell::gru || l_.cell == Cell::gru_before;  // where a part of dh passes the product by
    multiply(part, rows, last_, gradients(t, now), stride(), [&](int32_t b, int u, const A* z, const A*) {
      A* dh = dh_.row(b) + static_cast<int64_t>(u) * L;
      store(dh, gru ? whole<V>(dh) + whole<V>(z) : whole<V>(z), L);
    });
    each_vector(part, rows.cut, t, N_, [&](const Place& p) { cut(dh_, q_.dh_r, N_, p); });
    if (l_.cell == Cell::lstm) {
      each_vector(part, rows.cut, t, H_, [&](const Place& p) { cut(dc_, q_.dc_r, H_, p); });
    }
  }

  void cut(Padded<A>& d, void* sum, int64_t width, const Place& p) {
    A* from = d.row(p.b) + p.j;
    if (sum != nullptr) {
      A* to = static_cast<A*>(sum) + p.b * width + p.j;
      store(to, load(to, p.n) + whole<V>(from), p.n);
    }
    store(from, V{}, L);
  }

  template <class Use>
  void multiply(const Part& part, const Rows& rows, const Weights<S>& w, const A* a, int64_t lda, Use use) {
    int first, last;
    part.vectors(w.units, L, &first, &last);
    product<1>(w, first / w.wide(), static_cast<int>(ceil_div(last, w.wide())), rows.live.data(),
               static_cast<int>(rows.live.size()), a, lda, use, [](int32_t, int) {});
  }

  const Backward q_;
  BackwardRange r_{};
  const Layer l_;
  const int64_t H_, N_, G_;
  const bool guarded_;
  const bool direct_;  // the recurrent product reads dgx itself
  Weights<S> first_, last_;
  Padded<A> dh_, dc_;           // [B, N], [B, H]
  Padded<A> da_[2];             // [B, G H] of the recurrent product's side, in turns
  std::vector<uint8_t> alive_;  // [parts, B]: whether a gradient came to the row, as far as a part sees
};
