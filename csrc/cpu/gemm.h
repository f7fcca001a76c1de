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

template <class S>
class TypedGemmTN {
  using A = opmath_t<S>;
  using V = vector_t<S>;
  using Operand = operand_t<S>;
  static constexpr int L = lanes<A>;
  static constexpr int per = per_operand<S>;
  static constexpr int64_t block = 256 * per;  // of k: a panel of b stays in the first-level cache
  static constexpr int64_t columns = 1008;     // of b at a time: the block stays in the second-level cache

 public:
  explicit TypedGemmTN(const GemmTN& q) : q_(q) {}

  void run() {
    if (q_.M == 0) return;
    const int64_t tiles = ceil_div(q_.M, tn_rows);
    const Partition partition(q_.workers.threads, tiles, 1, q_.N * q_.K * tn_rows, 1);
    run_slices(partition, q_.workers.parallel, [&](int64_t first, int64_t last, SpinBarrier&) {
      for (int64_t p = first; p < last; ++p) {
        const ThreadSlice slice = partition.slice(p, tiles);
        rows(slice.row0 * tn_rows, std::min(q_.M, slice.row1 * tn_rows));
      }
    });
  }

 private:
  // The outputs of rows [m0, m1).
  void rows(int64_t m0, int64_t m1) {
    const int64_t width = std::min(columns, q_.N), padded = ceil_div(width, L) * L;
    AlignedBuffer<Operand> a(block / per * tn_rows), b(ceil_div(std::min(block, q_.K), per) * padded);
    for (int64_t j0 = 0; j0 == 0 || j0 < q_.N; j0 += columns) {
      const int64_t n = std::min(columns, q_.N - j0);
      const int vectors = static_cast<int>(ceil_div(n, L)), panels = (vectors + tn_vectors - 1) / tn_vectors;
      for (int64_t k0 = 0; k0 == 0 || k0 < q_.K; k0 += block) {
        const bool add = q_.add || k0 > 0;
        const int64_t K = std::min(block, q_.K - k0);
        pack_b(k0, K, j0, n, vectors, panels, b.data);
        for (int64_t m = m0; m < m1; m += tn_rows) {
          const int here = static_cast<int>(std::min<int64_t>(tn_rows, m1 - m));
          const bool sums = j0 == 0 && q_.sum != nullptr;
          pack_a(k0, K, m, here, a.data, sums ? static_cast<A*>(q_.sum) + m : nullptr, add);
          const Operand* from = b.data;
          const int64_t count = ceil_div(K, per);
          for (int p = 0, u = 0; p < panels; ++p) {
            const int in_panel = (vectors - u) / (panels - p);
            A* to = static_cast<A*>(q_.out) + m * q_.ldo + j0 + static_cast<int64_t>(u) * L;
            const int last =
                static_cast<int>(std::min<int64_t>(L, n - static_cast<int64_t>(u + in_panel - 1) * L));
            switch (in_panel) {
              case 1:
                tn_tile<Operand, 1>(a.data, from, count, to, q_.ldo, here, last, add);
                break;
              case 2:
                tn_tile<Operand, 2>(a.data, from, count, to, q_.ldo, here, last, add);
                break;
              default:
                tn_tile<Operand, 3>(a.data, from, count, to, q_.ldo, here, last, add);
            }
            from += count * in_panel * L;
            u += in_panel;
          }
        }
      }
    }
  }

  // Panels [K, in_panel, L] of operands one after another.
  void pack_b(int64_t k0, int64_t K, int64_t j0, int64_t n, int vectors, int panels, Operand* to) const {
    for (int p = 0, u = 0; p < panels; ++p) {
      const int in_panel = (vectors - u) / (panels - p);
      for (int64_t k = 0; k < K; k += per) {
        const S* const row = static_cast<const S*>(q_.rows[k0 + k]);
        const S* const next = k + 1 < K ? static_cast<const S*>(q_.rows[k0 + k + 1]) : nullptr;
        for (int v = 0; v < in_panel; ++v, to += L) {
          const int64_t j = static_cast<int64_t>(u + v) * L;
          const V from =
              load_columns(row == nullptr ? row : row + j0 + j, next == nullptr ? next : next + j0 + j,
                           static_cast<int>(std::min<int64_t>(L, n - j)));
          __builtin_memcpy(to, &from, sizeof from);
        }
      }
      u += in_panel;
    }
  }

  // Operands [K, tn_rows] of the columns from m on, zeros beyond `valid`; their sums, where wanted.
  void pack_a(int64_t k0, int64_t K, int64_t m, int valid, Operand* to, A* sum, bool add) const {
    const S* from = static_cast<const S*>(q_.a) + k0 * q_.lda + m;
    A total[tn_rows] = {};
    for (int64_t k = 0; k < K; k += per, to += tn_rows) {
      if constexpr (per == 2) {
        S both[2][tn_rows] = {};
        for (int i = 0; i < std::min<int64_t>(2, K - k); ++i, from += q_.lda) {
          valid == tn_rows ? __builtin_memcpy(both[i], from, sizeof both[i])
                           : std::copy_n(from, valid, both[i]);
          for (int r = 0; r < tn_rows; ++r) total[r] += load_one(both[i] + r);
        }
        for (int r = 0; r < tn_rows; ++r) to[r] = {both[0][r], both[1][r]};
      } else {
        if (valid == tn_rows && std::is_same_v<S, A>) {
          __builtin_memcpy(to, from, tn_rows * sizeof(A));
        } else {
          for (int r = 0; r < tn_rows; ++r) to[r] = r < valid ? load_one(from + r) : A(0);
        }
        for (int r = 0; r < tn_rows; ++r) total[r] += to[r];
        from += q_.lda;
      }
    }
    if (sum == nullptr) return;
    for (int r = 0; r < valid; ++r) sum[r] = add ? sum[r] + total[r] : total[r];
  }

  const GemmTN q_;
};
