// The GEMMs outside a scan, over all steps and rows: the input projection, the gradient of x, and the
// gradient of a weight. Included once per variant, inside its namespace.

template <class S>
class TypedGemm final : public GemmKernel {
  using A = opmath_t<S>;
  using Element = element_t<S>;
  static constexpr int L = lanes<A>;

 public:
  GemmWeights<S> weights;

  void run(int64_t M, const void* a, int64_t lda, void* out, int64_t ldo, bool out_opmath,
           const Workers& workers) const override {
    const Partition partition(workers.threads, M, 1, weights.units * weights.K, 1);
    run_slices(partition, workers.parallel, [&](int64_t first, int64_t last, SpinBarrier&) {
      for (int64_t p = first; p < last; ++p) {
        const ThreadSlice slice = partition.slice(p, M);
        const S* from = static_cast<const S*>(a);
        out_opmath ? rows(slice.row0, slice.row1, from, lda, static_cast<A*>(out), ldo)
                   : rows(slice.row0, slice.row1, from, lda, static_cast<S*>(out), ldo);
      }
    });
  }

 private:
  static constexpr int64_t block = 96;  // rows that stay in cache beside a panel

  template <class Out>
  void rows(int64_t row0, int64_t row1, const S* a, int64_t lda, Out* out, int64_t ldo) const {
    std::array<int32_t, block> in_order;
    for (int64_t r = 0; r < block; ++r) in_order[r] = static_cast<int32_t>(r);
    // A row of pairs whose last is half of one ends in the next row, or beyond the end.
    const bool direct = std::is_same_v<S, Element> && weights.width % per_operand<S> == 0;
    PaddedMatrix<Element> converted;
    if (!direct) converted = PaddedMatrix<Element>(std::min(block, row1 - row0), weights.width);
    for (int64_t m = row0; m < row1; m += block) {
      const int count = static_cast<int>(std::min(block, row1 - m));
      const Element* from = reinterpret_cast<const Element*>(a + m * lda);
      int64_t stride = lda;
      if (!direct) {
        for (int r = 0; r < count; ++r) convert(a + (m + r) * lda, converted.row(r));
        from = converted.row(0), stride = converted.stride;
      }
      gemm_panels<1>(
          weights, 0, weights.panel_count(), in_order.data(), count, from, stride,
          [&](int32_t r, int u, const A* z, const A*) {
            const int64_t j = static_cast<int64_t>(u) * L;
            store(out + (m + r) * ldo + j, loadu<vector_t<S>>(z),
                  static_cast<int>(std::min<int64_t>(L, weights.units - j)));
          },
          [](int32_t, int, int) {});
    }
  }

  void convert(const S* from, Element* to) const {
    for (int64_t k = 0; k < weights.width; k += L) {
      store(to + k, load(from + k, static_cast<int>(std::min<int64_t>(L, weights.width - k))), L);
    }
  }
};

// A tile of `rows` outputs times up to three vectors of columns, over a block of k whose operands, of type T,
// were packed side by side: out += sum over k of a[k, rows]^T b[k, vectors].
constexpr int tn_rows = registers >= 32 ? 8 : 4;
constexpr int tn_vectors = 3;

template <class T, int vectors>
__attribute__((noinline)) void tn_tile(const T* __restrict a, const T* __restrict b, int64_t K,
                                       opmath_t<T>* __restrict out, int64_t ldo, int rows, int last,
                                       bool add) {
  using A = opmath_t<T>;
  using V = vector_t<T>;
  constexpr int L = lanes<A>;
  V sum[tn_rows][vectors] = {};
  // what is added to arrives meanwhile
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; v += 64 / RNNKIT_BYTES) __builtin_prefetch(out + r * ldo + v * L, 1);
  }
  for (int64_t k = 0; k < K; ++k, a += tn_rows, b += vectors * L) {
    V w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = loadu<V>(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < tn_rows; ++r) {
      const V x = broadcast(a + r);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = add_product<T>(sum[r][v], x, w[v]);
      keep_order();
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < tn_rows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      A* to = out + r * ldo + v * L;
      const int n = v + 1 < vectors ? L : last;
      store(to, add ? load(to, n) + sum[r][v] : sum[r][v], n);
    }
  }
}

// A block of k of the left operand is packed for some rows of the outputs at a time, and stays in the
// second-level cache while one panel after the other of the right operands, packed before, stays in the
// first.
template <class S>
class TypedGemmTN {
  using A = opmath_t<S>;
  using V = vector_t<S>;
  using Operand = operand_t<S>;
  static constexpr int L = lanes<A>;
  static constexpr int per = per_operand<S>;
  static constexpr int64_t block = 256 * per;  // of k: a panel stays in the first-level cache
  static constexpr int64_t tall = 256;         // rows of the outputs at a time
  static constexpr int64_t columns = 1536;     // of the right operands at a time
  // What is written side by side must not fall into the same sets of the first-level cache.
  static constexpr int64_t pad = 64 / sizeof(Operand);

  // Some columns of a right operand, packed [k, vectors, L].
  struct Panel {
    const GemmTNRight* right;
    int64_t j;      // the first column
    int vectors;    // of columns
    int last;       // columns of the last one
    int64_t start;  // where it begins, for the packed panels of its group
  };

 public:
  explicit TypedGemmTN(const GemmTN& q) : q_(q), most_k_(ceil_div(std::min(block, q.K), per)) {
    int64_t in_group = 0, start = 0;
    for (const GemmTNRight& right : q_.right) {
      const int vectors = static_cast<int>(ceil_div(right.N, L));
      const int panels = (vectors + tn_vectors - 1) / tn_vectors;
      for (int p = 0, u = 0; p < panels; ++p) {
        const int here = (vectors - u) / (panels - p);
        if (in_group + here * L > columns) in_group = start = 0;
        const int64_t j = static_cast<int64_t>(u) * L, j_last = j + static_cast<int64_t>(here - 1) * L;
        panels_.push_back({&right, j, here, static_cast<int>(std::min<int64_t>(L, right.N - j_last)), start});
        u += here, in_group += here * L, start += most_k_ * here * L + pad;
        group_size_ = std::max(group_size_, start);
      }
    }
  }

  void run() {
    if (q_.M == 0) return;
    const int64_t tiles = ceil_div(q_.M, tn_rows), width = q_.right[0].N + q_.right[1].N;
    const Partition partition(q_.workers.threads, tiles, 1, width * q_.K * tn_rows, 1);
    run_slices(partition, q_.workers.parallel, [&](int64_t first, int64_t last, SpinBarrier&) {
      for (int64_t p = first; p < last; ++p) {
        const ThreadSlice slice = partition.slice(p, tiles);
        rows(slice.row0 * tn_rows, std::min(q_.M, slice.row1 * tn_rows));
      }
    });
  }

 private:
  int64_t tile_size() const { return most_k_ * tn_rows + pad; }

  // The outputs of rows [m0, m1).
  void rows(int64_t m0, int64_t m1) {
    AlignedBuffer<Operand> a(ceil_div(std::min(tall, m1 - m0), tn_rows) * tile_size()), b(group_size_);
    size_t p0 = 0;
    do {  // once without panels and without k, too: `sum` and what is not added to are written
      size_t p1 = std::min(p0 + 1, panels_.size());
      while (p1 < panels_.size() && panels_[p1].start != 0) ++p1;
      int64_t k0 = 0;
      do {
        const int64_t K = std::min(block, q_.K - k0);
        const bool add = q_.add || k0 > 0;
        pack_right(k0, K, p0, p1, b.data);
        for (int64_t m = m0; m < m1; m += tall) {
          const int64_t here = std::min(tall, m1 - m);
          pack_left(k0, K, m, here, a.data, p0 == 0 ? static_cast<A*>(q_.sum) : nullptr, add);
          for (size_t p = p0; p < p1; ++p) {
            multiply(panels_[p], m, here, ceil_div(K, per), a.data, b.data + panels_[p].start, add);
          }
        }
        k0 += block;
      } while (k0 < q_.K);
      p0 = p1;
    } while (p0 < panels_.size());
  }

  // Tiles of rows [m0, m0 + count) of a panel's outputs, as far as it has them.
  void multiply(const Panel& panel, int64_t m0, int64_t count, int64_t K, const Operand* a, const Operand* b,
                bool add) const {
    const GemmTNRight& right = *panel.right;
    const int64_t end = std::min(m0 + count, right.M);
    for (int64_t m = m0; m < end; m += tn_rows, a += tile_size()) {
      const int here = static_cast<int>(std::min<int64_t>(tn_rows, end - m));
      A* to = static_cast<A*>(right.out) + m * right.ldo + panel.j;
      switch (panel.vectors) {
        case 1:
          tn_tile<Operand, 1>(a, b, K, to, right.ldo, here, panel.last, add);
          break;
        case 2:
          tn_tile<Operand, 2>(a, b, K, to, right.ldo, here, panel.last, add);
          break;
        default:
          tn_tile<Operand, 3>(a, b, K, to, right.ldo, here, panel.last, add);
      }
    }
  }

  // The panels [p0, p1): a row at a time, from end to end.
  void pack_right(int64_t k0, int64_t K, size_t p0, size_t p1, Operand* to) const {
    for (int64_t k = 0; k < K; k += per) {
      for (size_t p = p0; p < p1; ++p) {
        const Panel& panel = panels_[p];
        const auto row = [&](int64_t at) {
          const S* from = at < K ? static_cast<const S*>(panel.right->rows[k0 + at]) : nullptr;
          return from == nullptr ? nullptr : from + panel.j;
        };
        const S *first = row(k), *next = per == 2 ? row(k + 1) : nullptr;
        Operand* at = to + panel.start + k / per * panel.vectors * L;
        for (int v = 0; v < panel.vectors; ++v) {
          const V from =
              load_columns(first == nullptr ? first : first + v * L, next == nullptr ? next : next + v * L,
                           v + 1 < panel.vectors ? L : panel.last);
          __builtin_memcpy(at + v * L, &from, sizeof from);
        }
      }
    }
  }

  // Tiles [k, tn_rows] of `count` columns from m on, zeros beyond them; and the columns' sums, where wanted.
  void pack_left(int64_t k0, int64_t K, int64_t m, int64_t count, Operand* to, A* sum, bool add) const {
    alignas(64) Operand line[tall] = {};
    alignas(64) A total[tall] = {};
    const int64_t tiles = ceil_div(count, tn_rows);
    for (int64_t k = 0; k < K; k += per, to += tn_rows) {
      const S* const row = static_cast<const S*>(q_.a) + (k0 + k) * q_.lda + m;
      const S* const next = k + 1 < K ? row + q_.lda : nullptr;
      for (int64_t j = 0; j < count; j += L) {
        const int n = static_cast<int>(std::min<int64_t>(L, count - j));
        const V from = load_columns(row + j, next == nullptr ? next : next + j, n);
        __builtin_memcpy(line + j, &from, sizeof from);
        if (sum == nullptr) continue;
        V sums = loadu<V>(total + j);
        sums += load(row + j, n);
        if (per == 2 && next != nullptr) sums += load(next + j, n);
        store(total + j, sums, L);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        __builtin_memcpy(to + t * tile_size(), line + t * tn_rows, tn_rows * sizeof(Operand));
      }
    }
    for (int64_t j = 0; sum != nullptr && j < count; ++j) {
      sum[m + j] = add ? sum[m + j] + total[j] : total[j];
    }
  }

  const GemmTN q_;
  const int64_t most_k_;  // operands of a block
  std::vector<Panel> panels_;
  int64_t group_size_ = 0;  // of the largest group of packed panels
};
