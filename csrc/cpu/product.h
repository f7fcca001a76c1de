// The products of a scan: a tile of rows times a panel of packed weights, for any number of rows. Included once
// per variant, inside its namespace.
//
// A panel holds the weights of up to four vectors of outputs side by side: all G gates of one vector of units (G 3
// and 4), or several vectors of units (G 1 and 2), k by k, so that a tile reads it from end to end. Every output is
// summed over k in the same order whatever the tile, so a row's result does not depend on the rows beside it.

template <class T>
struct Aligned {
  explicit Aligned(int64_t size = 0) : memory(new T[size + 64 / sizeof(T)]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  std::unique_ptr<T[]> memory;
  T* data;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int registers = RNNKIT_REGISTERS;
constexpr int max_vectors = 4;  // outputs of a panel, in vectors
constexpr int max_rows = 8;
// Rows of a tile so that its sums, a panel's vectors and one broadcast stay in registers.
constexpr int tile_rows(int vectors) {
  const int fit = registers >= 32 ? (registers - vectors - 2) / vectors : (registers - 1) / vectors;
  return fit < max_rows ? fit : max_rows;
}

// out [rows, vectors, lanes] = a [rows, K] panel [K, vectors, lanes]
template <class T, int vectors, int rows>
void tile(const T* const* a, const T* __restrict panel, int64_t K, T* __restrict out) {
  using V = typename Vector<T>::Value;
  constexpr int L = lanes<T>;
  V sum[rows][vectors] = {};
  const T* row[rows];
  for (int r = 0; r < rows; ++r) row[r] = a[r];
  for (int64_t k = 0; k < K; ++k) {
    V w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = whole<V>(panel + v * L);
    panel += vectors * L;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V x = row[r][k] - V{};
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(out + (r * vectors + v) * L, &sum[r][v], sizeof(V));
  }
}

// One row times two neighbouring panels: twice the sums in flight, to hide the latency of a multiply-add.
template <class T, int vectors>
void tile_pair(const T* a, const T* __restrict first, const T* __restrict second, int64_t K, T* __restrict out) {
  using V = typename Vector<T>::Value;
  constexpr int L = lanes<T>;
  V sum[2][vectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    const V x = a[k] - V{};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[0][v] += x * whole<V>(first + (k * vectors + v) * L);
      sum[1][v] += x * whole<V>(second + (k * vectors + v) * L);
    }
  }
  __builtin_memcpy(out, sum, sizeof sum);
}

template <class T>
using Tile = void (*)(const T* const* a, const T* panel, int64_t K, T* out);

template <class T, int vectors, int... rows>
constexpr std::array<Tile<T>, max_rows + 1> tiles_of(std::integer_sequence<int, rows...>) {
  return {nullptr, (rows + 1 <= tile_rows(vectors) ? &tile<T, vectors, (rows + 1 <= tile_rows(vectors) ? rows + 1 : 1)>
                                                   : nullptr)...};
}

template <class T>
inline Tile<T> tile_for(int vectors, int rows) {
  using Rows = std::make_integer_sequence<int, max_rows>;
  static constexpr std::array<Tile<T>, max_rows + 1> all[max_vectors] = {
      tiles_of<T, 1>(Rows{}), tiles_of<T, 2>(Rows{}), tiles_of<T, 3>(Rows{}), tiles_of<T, 4>(Rows{})};
  return all[vectors - 1][rows];
}

// Weights as a product wants them: packed into panels, or as they are for a single step, where packing would cost
// as much as the product.
template <class S>
struct Weights {
  using A = compute_t<S>;
  static constexpr int L = lanes<A>;

  int64_t units = 0, K = 0;
  int gates = 1;
  const S* raw = nullptr;  // [gates, units, K], rows of `ld`
  int64_t ld = 0, block = 0;
  Aligned<A> panels;

  int units_vectors() const { return static_cast<int>(ceil_div(units, L)); }  // vectors of units
  int wide() const { return gates >= 3 ? 1 : max_vectors / gates; }            // of them in a whole panel
  int count() const { return static_cast<int>(ceil_div(units_vectors(), wide())); }
  int in_panel(int p) const { return std::min(wide(), units_vectors() - p * wide()); }
  const A* panel(int p) const { return panels.data + static_cast<int64_t>(p) * wide() * gates * L * K; }

  // Outputs are rows of w: out[g, j] = sum over k of w[g * block + j, k] a[k].
  void by_rows(const S* w, int64_t ld_, int64_t block_, int gates_, int64_t units_, int64_t K_, bool pack) {
    units = units_, K = K_, gates = gates_, raw = w, ld = ld_, block = block_;
    if (!pack) return;
    panels = Aligned<A>(static_cast<int64_t>(units_vectors()) * gates * L * K);
    for (int p = 0; p < count(); ++p) {
      const int vectors = in_panel(p) * gates;
      A* to = const_cast<A*>(panel(p));
      for (int v = 0; v < vectors; ++v) {
        const int64_t first = (static_cast<int64_t>(p) * wide() + v / gates) * L;
        const int valid = static_cast<int>(std::min<int64_t>(L, units - first));
        const S* from = w + ((v % gates) * block + first) * ld;
        transpose(from, valid, to + v * L, vectors * L);
      }
    }
    raw = nullptr;
  }

  // Outputs are columns of w: out[j] = sum over k of a[k] w[k, j].
  void by_columns(const S* w, int64_t ld_, int64_t units_, int64_t K_) {
    units = units_, K = K_, gates = 1;
    panels = Aligned<A>(static_cast<int64_t>(units_vectors()) * L * K);
    for (int p = 0; p < count(); ++p) {
      A* to = const_cast<A*>(panel(p));
      const int vectors = in_panel(p);
      for (int64_t k = 0; k < K; ++k) {
        for (int v = 0; v < vectors; ++v, to += L) {
          const int64_t first = (static_cast<int64_t>(p) * wide() + v) * L;
          const int valid = static_cast<int>(std::min<int64_t>(L, units - first));
          store(to, load(w + k * ld_ + first, valid), L);
        }
      }
    }
  }

 private:
  // to[k * stride + j] = from[j * ld + k] for j < valid, 0 beyond; in blocks of k, so that both sides stay in cache.
  void transpose(const S* from, int valid, A* to, int64_t stride) const {
    for (int64_t first = 0; first < K; first += L) {
      const int n = static_cast<int>(std::min<int64_t>(L, K - first));
      alignas(64) A in[L][L];
      for (int j = 0; j < L; ++j) {
        const value_t<S> v = j < valid ? load(from + j * ld + first, n) : value_t<S>{};
        store(in[j], v, L);
      }
      for (int k = 0; k < n; ++k) {
        A* row = to + (first + k) * stride;
        for (int j = 0; j < L; ++j) row[j] = in[j][k];
      }
    }
  }
};

template <class V>
inline auto sum_lanes(V v) {
  constexpr int L = sizeof(V) / sizeof(v[0]);
  auto total = v[0];
  for (int k = 1; k < L; ++k) total += v[k];
  return total;
}

// out[4] = a [K] times four rows of w, along k: for weights that were not packed. n of the four are valid.
template <class S>
void dots(const compute_t<S>* a, const S* w, int64_t ld, int n, int64_t K, compute_t<S>* out) {
  using V = value_t<S>;
  constexpr int L = lanes<compute_t<S>>;
  const S* row[4];
  for (int j = 0; j < 4; ++j) row[j] = w + std::min(j, n - 1) * ld;
  V sum[4] = {};
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    const V x = load(a + k, L);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += x * load(row[j] + k, L);
  }
  if (k < K) {
    const int rest = static_cast<int>(K - k);
    const V x = load(a + k, rest);
    for (int j = 0; j < 4; ++j) sum[j] += x * load(row[j] + k, rest);
  }
  for (int j = 0; j < n; ++j) out[j] = sum_lanes(sum[j]);
}

// Calls use(row, u, z) for each row of `rows` and each vector u of units in the panels [p0, p1), with z [gates, lanes]
// the product of a[row] and the weights.
template <int gates, class S, class Use>
inline void product(const Weights<S>& w, int p0, int p1, const int32_t* rows, int count, const compute_t<S>* a,
                    int64_t lda, Use use) {
  using A = compute_t<S>;
  constexpr int L = lanes<A>;
  alignas(64) A out[max_rows * max_vectors * L];
  if (count == 0) return;
  // Compiled once: in copies of it, one a tile, the compiler would fuse other multiplications with additions, and a
  // row's result would depend on how many rows are beside it.
  const auto give = [&](int32_t row, int u, const A* z) __attribute__((noinline)) { use(row, u, z); };
  if (w.raw != nullptr) {
    for (int u = p0 * w.wide(); u < std::min(p1 * w.wide(), w.units_vectors()); ++u) {
      const int valid = static_cast<int>(std::min<int64_t>(L, w.units - static_cast<int64_t>(u) * L));
      for (int i = 0; i < count; ++i) {
        std::fill_n(out, gates * L, A(0));
        for (int g = 0; g < gates; ++g) {
          for (int j = 0; j < valid; j += 4) {
            dots(a + rows[i] * lda, w.raw + (g * w.block + u * L + j) * w.ld, w.ld, std::min(4, valid - j), w.K,
                 out + g * L + j);
          }
        }
        give(rows[i], u, out);
      }
    }
    return;
  }
  for (int p = p0; p < p1; ++p) {
    const int in_panel = w.in_panel(p), vectors = in_panel * gates;
    if (count == 1 && p + 1 < p1 && w.in_panel(p + 1) == w.wide() && vectors > 2) {
      const A* row = a + rows[0] * lda;
      vectors == 4 ? tile_pair<A, 4>(row, w.panel(p), w.panel(p + 1), w.K, out)
                   : tile_pair<A, 3>(row, w.panel(p), w.panel(p + 1), w.K, out);
      for (int u = 0; u < 2 * in_panel; ++u) give(rows[0], p * w.wide() + u, out + u * gates * L);
      ++p;
      continue;
    }
    const int fit = tile_rows(vectors), tiles = (count + fit - 1) / fit;
    for (int i = 0, done = 0; i < tiles; ++i) {
      const int here = (count - done) / (tiles - i);
      const A* row[max_rows];
      for (int r = 0; r < here; ++r) row[r] = a + rows[done + r] * lda;
      tile_for<A>(vectors, here)(row, w.panel(p), w.K, out);
      for (int r = 0; r < here; ++r) {
        for (int u = 0; u < in_panel; ++u) {
          give(rows[done + r], p * w.wide() + u, out + (r * vectors + u * gates) * L);
        }
      }
      done += here;
    }
  }
}
