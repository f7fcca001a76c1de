// The products of a scan: a tile of rows times a panel of packed weights, for any number of rows. Included
// once per variant, inside its namespace.
//
// A panel holds the weights of up to four vectors of outputs side by side: all G gates of one vector of units
// (G 3 and 4), or several vectors of units (G 1 and 2), k by k, so that a tile reads it from end to end.
// Every output is summed over k in the same order whatever the tile, so a row's result does not depend on the
// rows beside it.

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
void tile_pair(const T* a, const T* __restrict first, const T* __restrict second, int64_t K,
               T* __restrict out) {
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
  return {nullptr,
          (rows + 1 <= tile_rows(vectors) ? &tile<T, vectors, (rows + 1 <= tile_rows(vectors) ? rows + 1 : 1)>
                                          : nullptr)...};
}

template <class T>
inline Tile<T> tile_for(int vectors, int rows) {
  using Rows = std::make_integer_sequence<int, max_rows>;
  static constexpr std::array<Tile<T>, max_rows + 1> all[max_vectors] = {
      tiles_of<T, 1>(Rows{}), tiles_of<T, 2>(Rows{}), tiles_of<T, 3>(Rows{}), tiles_of<T, 4>(Rows{})};
  return all[vectors - 1][rows];
}

// L vectors of L numbers, turned: row r's number k becomes row k's number r.
template <class A>
inline void turn(typename Vector<A>::Value* v) {
  constexpr int L = lanes<A>;
#if defined(__clang__)
  for (int r = 0; r < L; ++r) {
    for (int k = 0; k < r; ++k) {
      const A swapped = v[r][k];
      v[r][k] = v[k][r];
      v[k][r] = swapped;
    }
  }
#else
  // Blocks of 1, 2, 4 ... numbers change places between rows that are as far apart.
#pragma GCC unroll 4
  for (int d = 1; d < L; d *= 2) {
    typename Vector<A>::Bits low{}, high{};
#pragma GCC unroll 16
    for (int k = 0; k < L; ++k) {
      low[k] = k & d ? L + k - d : k;
      high[k] = k & d ? L + k : k + d;
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      if (r & d) continue;
      const auto a = v[r], b = v[r + d];
      v[r] = __builtin_shuffle(a, b, low);
      v[r + d] = __builtin_shuffle(a, b, high);
    }
  }
#endif
}

// Weights as a product wants them: packed into panels. For a single step they stay as they are, and each
// panel is packed into the first-level cache when its turn comes.
template <class S>
struct Weights {
  using A = compute_t<S>;
  static constexpr int L = lanes<A>;

  int64_t units = 0, K = 0;
  int gates = 1;
  const S* raw = nullptr;  // [gates, units, K]: rows of K, gates `block` rows apart; null where packed
  int64_t block = 0;
  Aligned<A> panels;

  int units_vectors() const { return static_cast<int>(ceil_div(units, L)); }  // vectors of units
  int wide() const { return gates >= 3 ? 1 : max_vectors / gates; }           // of them in a whole panel
  int count() const { return static_cast<int>(ceil_div(units_vectors(), wide())); }
  int in_panel(int p) const { return std::min(wide(), units_vectors() - p * wide()); }
  int64_t panel_size() const { return static_cast<int64_t>(wide()) * gates * L * K; }
  const A* panel(int p) const { return panels.data + p * panel_size(); }

  // Outputs are rows of w: out[g, j] = sum over k of w[g * block + j, k] a[k].
  void by_rows(const S* w, int64_t block_, int gates_, int64_t units_, int64_t K_, bool whole) {
    units = units_, K = K_, gates = gates_, raw = w, block = block_;
    if (!whole) return;
    panels = Aligned<A>(static_cast<int64_t>(units_vectors()) * gates * L * K);
    for (int p = 0; p < count(); ++p) pack(p, const_cast<A*>(panel(p)));
    raw = nullptr;
  }

  // Panel p of `raw`.
  void pack(int p, A* to) const {
    const int vectors = in_panel(p) * gates;
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = (static_cast<int64_t>(p) * wide() + v / gates) * L;
      const int valid = static_cast<int>(std::min<int64_t>(L, units - first));
      const S* from = raw + ((v % gates) * block + first) * K;
      for (int64_t k = 0; k < K; k += L) {
        const int n = static_cast<int>(std::min<int64_t>(L, K - k));
        value_t<S> in[L];
        for (int j = 0; j < L; ++j) in[j] = j < valid ? load(from + j * K + k, n) : value_t<S>{};
        turn<A>(in);
        for (int i = 0; i < n; ++i) store(to + ((k + i) * vectors + v) * L, in[i], L);
      }
    }
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
};

// A second product beside the one of the states: rows x[row] times packed weights with the same outputs.
template <class S>
struct Beside {
  const Weights<S>* w = nullptr;
  const compute_t<S>* x = nullptr;
  int64_t ldx = 0;
};

// Calls use(row, u, z, zx) for each row of `rows` and each vector u of units in the panels [p0, p1), with z
// [gates, lanes] the product of a[row] and the weights, and zx that beside it where there is one. Before a
// tile is summed, ahead(row, u) may ask for the memory that use(row, u) will need: it arrives meanwhile.
// `use` stands at one place only: in copies of it, one for each kind of tile, the compiler would fuse other
// multiplications with additions, and a row's result would depend on the rows beside it.
template <int gates, class S, class Use, class Ahead>
inline void product(const Weights<S>& w, int p0, int p1, const int32_t* rows, int count,
                    const compute_t<S>* a, int64_t lda, Use use, Ahead ahead, const Beside<S>& beside = {}) {
  using A = compute_t<S>;
  constexpr int L = lanes<A>;
  alignas(64) A out[max_rows * max_vectors * L], out_x[max_rows * max_vectors * L];
  if (count == 0) return;
  Aligned<A> once(w.raw == nullptr ? 0 : w.panel_size());
  for (int p = p0; p < p1; ++p) {
    const int in_panel = w.in_panel(p), vectors = in_panel * gates;
    const bool pair =
        count == 1 && w.raw == nullptr && p + 1 < p1 && w.in_panel(p + 1) == w.wide() && vectors > 2;
    const A* panel = w.panel(p);
    if (w.raw != nullptr) {
      w.pack(p, once.data);
      panel = once.data;
    }
    const int fit = tile_rows(vectors), tiles = (count + fit - 1) / fit;
    for (int i = 0, done = 0; i < tiles; ++i) {
      const int here = (count - done) / (tiles - i);
      const A* row[max_rows];
      for (int r = 0; r < here; ++r) {
        row[r] = a + rows[done + r] * lda;
        for (int u = 0; u < in_panel; ++u) ahead(rows[done + r], p * w.wide() + u);
      }
      if (pair) {
        vectors == 4 ? tile_pair<A, 4>(row[0], panel, w.panel(p + 1), w.K, out)
                     : tile_pair<A, 3>(row[0], panel, w.panel(p + 1), w.K, out);
      } else {
        tile_for<A>(vectors, here)(row, panel, w.K, out);
      }
      if (beside.w != nullptr) {
        const A* row_x[max_rows];
        for (int r = 0; r < here; ++r) row_x[r] = beside.x + rows[done + r] * beside.ldx;
        for (int second = 0; second <= (pair ? 1 : 0); ++second) {
          tile_for<A>(vectors, here)(row_x, beside.w->panel(p + second), beside.w->K,
                                     out_x + second * vectors * L);
        }
      }
      const int units = pair ? 2 * in_panel : in_panel;
      for (int r = 0; r < here; ++r) {
        for (int u = 0; u < units; ++u) {
          const int at = (r * vectors + u * gates) * L;
          use(rows[done + r], p * w.wide() + u, out + at, out_x + at);
        }
      }
      done += here;
    }
    if (pair) ++p;
  }
}
