// The GEMMs of a scan: rows times packed weights, for any number of rows. Included once per variant, inside
// its namespace.
//
// A panel holds all G gates of one or more vectors of units, so that the gate math of those units can follow
// when it is summed. It is packed as strips of as many vectors as a tile takes, one after another.
// Every output is summed over k in the same order whatever the tile, so a row's result does not depend on the
// rows beside it. There are two orders: k by k, and for weights that serve a single step lane by lane, see
// GemmWeights::dot.

constexpr int few_rows = 16;     // up to here weights for a single step are not packed
constexpr int widest_panel = 8;  // vectors
constexpr int block_rows = 96;   // whose sums are made panel by panel, and stay in the cache

// L vectors of L numbers, transposed: row r's number k becomes row k's number r.
template <class A>
inline void transpose(typename Vector<A>::Value* v) {
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

// Two vectors, the lanes of each added that are d apart: those of a where bit d of a lane's number is 0,
// those of b where it is 1.
template <class A, int d>
__attribute__((always_inline)) inline typename Vector<A>::Value folded(typename Vector<A>::Value a,
                                                                       typename Vector<A>::Value b) {
  constexpr int L = lanes<A>;
#if defined(__clang__)
  typename Vector<A>::Value sum;
  for (int k = 0; k < L; ++k) sum[k] = k & d ? b[k] + b[k - d] : a[k] + a[k + d];
  return sum;
#else
  typename Vector<A>::Bits own, other;
#pragma GCC unroll 16
  for (int k = 0; k < L; ++k) {
    own[k] = k & d ? L + k : k;
    other[k] = k & d ? L + k - d : k + d;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// Sums over the lanes of `count` vectors: with L of them, lane r is that of v[r].
template <class A, int count>
__attribute__((always_inline)) inline typename Vector<A>::Value lane_sums(
    const typename Vector<A>::Value* v) {
  if constexpr (count == 1) {
    return *v;
  } else {
    return folded<A, count / 2>(lane_sums<A, count / 2>(v), lane_sums<A, count / 2>(v + count / 2));
  }
}

// Vectors of units in a full panel.
constexpr int full_panel(int gates) {
  return gates == 3 ? (RNNKIT_BYTES == 64 ? 1 : 2) : max_vectors / gates;
}

// The weights of a GEMM, packed into panels. For a single step they stay as they are: a few rows
// take lane by lane what lies side by side, and for more each panel is packed into the first-level cache when
// its turn comes. Weights whose columns are the outputs stay as they are for a few rows, too.
template <class S>
struct GemmWeights {
  using A = opmath_t<S>;
  using Operand = operand_t<S>;
  static constexpr int L = lanes<A>;
  static constexpr int per = per_operand<S>;

  int64_t units = 0;
  int64_t width = 0, K = 0;  // numbers that an output sums over, and operands that hold them
  int gates = 1;
  const S* raw = nullptr;  // [gates, units, width], gates `block` rows apart; null where packed
  int64_t block = 0;
  const S* columns = nullptr;  // [width, units]: rows `ld` apart; null where packed
  int64_t ld = 0;
  int strip = widest_strip;  // vectors of a strip, where the panel has a multiple of them
  AlignedBuffer<Operand> panels;

  int unit_vectors() const { return static_cast<int>(ceil_div(units, L)); }  // vectors of units
  int panel_width() const { return full_panel(gates); }
  int panel_count() const { return static_cast<int>(ceil_div(unit_vectors(), panel_width())); }
  int panel_vectors(int p) const { return std::min(panel_width(), unit_vectors() - p * panel_width()); }
  int64_t panel_size() const { return static_cast<int64_t>(panel_width()) * gates * L * K; }
  const Operand* panel(int p) const { return panels.data + p * panel_size(); }
  // Of panel p's strips, which are equally wide.
  int strip_width(int p) const {
    const int vectors = panel_vectors(p) * gates;
    return vectors % strip == 0 ? strip : vectors == 6 ? 3 : vectors;
  }
  int64_t strip_size(int p) const { return strip_width(p) * L * K; }

  // pack(p0, p1) for all panels, shared among the workers.
  template <class Pack>
  void share_panels(const Workers& workers, Pack pack) const {
    constexpr int64_t worth_a_thread = 1 << 15;  // elements: some microseconds
    const Partition partition(
        std::min({workers.threads, int64_t{panel_count()}, panel_size() * panel_count() / worth_a_thread}));
    run_slices(partition, workers.parallel, [&](int64_t first, int64_t last, SpinBarrier&) {
      for (int64_t k = first; k < last; ++k) {
        const ThreadSlice slice = partition.slice(k, panel_count());
        pack(static_cast<int>(slice.row0), static_cast<int>(slice.row1));
      }
    });
  }

  // Outputs are rows of w: out[g, j] = sum over k of w[g * block + j, k] a[k].
  // For products of `rows` rows.
  void gemm_nt(const S* w, int64_t block_, int gates_, int64_t units_, int64_t width_, int64_t rows,
               bool packed, const Workers& workers) {
    units = units_, width = width_, K = ceil_div(width, per), gates = gates_, raw = w, block = block_,
    strip = strip_for(rows);
    if (!packed) return;
    panels = AlignedBuffer<Operand>(static_cast<int64_t>(unit_vectors()) * gates * L * K);
    share_panels(workers, [&](int p0, int p1) {
      for (int p = p0; p < p1; ++p) pack(p, const_cast<Operand*>(panel(p)));
    });
    raw = nullptr;
  }

  // Rows a times the outputs of panel p of `raw`, as a tile gives them: [rows, vectors, lanes].
  void dots(int p, const Operand* const* a, int rows, A* out) const {
    const int vectors = panel_vectors(p) * gates;
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = (static_cast<int64_t>(p) * panel_width() + v / gates) * L;
      const S* from = raw + ((v % gates) * block + first) * width;
      for (int r = 0; r < rows; ++r) {
        const auto sums = dot(a[r], from, std::min<int64_t>(L, units - first));
        __builtin_memcpy(out + (r * vectors + v) * L, &sums, sizeof sums);
      }
    }
  }

  // a [K] times L rows of `raw`, of which `valid` exist.
  vector_t<S> dot(const Operand* a, const S* from, int64_t valid) const {
    using V = vector_t<S>;
    constexpr int group = std::min(L, 8);  // rows whose addresses stay in registers
    V sum[L];
#pragma GCC unroll 2
    for (int g = 0; g < L; g += group) {
      const S* w[group];
#pragma GCC unroll 8
      for (int j = 0; j < group; ++j) {
        w[j] = from + std::min<int64_t>(g + j, valid - 1) * width;
        sum[g + j] = V{};
      }
      int64_t k = 0;
      for (; k + L * per <= width; k += L * per) {
        const V x = loadu<V>(a + k / per);
#pragma GCC unroll 8
        for (int j = 0; j < group; ++j)
          sum[g + j] = add_product<Operand>(sum[g + j], x, load_operands(w[j] + k, L * per));
      }
      if (k == width) continue;
      // What is left goes through memory: element by element the compiler would round each product.
      alignas(64) A left[group + 1][L];
      const int n = static_cast<int>(width - k);
      store(left[group], load_operands(reinterpret_cast<const element_t<S>*>(a) + k, n), L);
      for (int j = 0; j < group; ++j) store(left[j], load_operands(w[j] + k, n), L);
      asm volatile("" : : "r"(left) : "memory");
#pragma GCC unroll 8
      for (int j = 0; j < group; ++j)
        sum[g + j] = add_product<Operand>(sum[g + j], loadu<V>(left[group]), loadu<V>(left[j]));
    }
    return lane_sums<A, L>(sum);
  }

  // Panel p of `raw`.
  void pack(int p, Operand* to) const {
    const int in_strip = strip_width(p);
    for (int v = 0; v < panel_vectors(p) * gates; ++v) {
      Operand* first = to + v / in_strip * strip_size(p) + v % in_strip * L;
      transpose_rows(
          p, v, [&](int64_t k, vector_t<S> w) { __builtin_memcpy(first + k * in_strip * L, &w, sizeof w); });
    }
  }

  // The same for rows_by_lanes: a vector after the other.
  int64_t lanes_size() const { return lane_stride<A>(K) * L * L; }
  void pack_lanes(int p, Operand* to) const {
    for (int v = 0; v < panel_vectors(p) * gates; ++v, to += lanes_size()) {
      transpose_rows(p, v, [&](int64_t k, vector_t<S> w) {
        __builtin_memcpy(to + (k % L * lane_stride<A>(K) + k / L) * L, &w, sizeof w);
      });
    }
  }

  // use(k, w) for each k of vector v of panel p of `raw`.
  template <class Use>
  __attribute__((always_inline)) void transpose_rows(int p, int v, Use use) const {
    const int64_t first = (static_cast<int64_t>(p) * panel_width() + v / gates) * L;
    const int valid = static_cast<int>(std::min<int64_t>(L, units - first));
    const S* from = raw + ((v % gates) * block + first) * width;
    for (int64_t k = 0; k < width; k += L * per) {
      const int n = static_cast<int>(std::min<int64_t>(L * per, width - k));
      vector_t<S> in[L];
      for (int j = 0; j < L; ++j) in[j] = j < valid ? load_operands(from + j * width + k, n) : vector_t<S>{};
      transpose<A>(in);
      for (int i = 0; i * per < n; ++i) use(k / per + i, in[i]);
    }
  }

  // Outputs are columns of w: out[j] = sum over k of a[k] w[k, j].
  void gemm_nn(const S* w, int64_t ld_, int64_t units_, int64_t width_, int64_t rows, bool packed,
               const Workers& workers) {
    units = units_, width = width_, K = ceil_div(width, per), gates = 1, columns = w, ld = ld_,
    strip = strip_for(rows);
    if (!packed) return;
    panels = AlignedBuffer<Operand>(static_cast<int64_t>(unit_vectors()) * L * K);
    share_panels(workers, [&](int p0, int p1) {
      constexpr int64_t together = 16;  // rows of operands, so that few pages are read side by side
      for (int64_t k0 = 0; k0 < K; k0 += together) {
        for (int p = p0; p < p1; ++p) {
          const int vectors = panel_vectors(p), in_strip = strip_width(p);
          const int64_t size = strip_size(p);
          for (int v0 = 0; v0 < vectors; v0 += in_strip) {
            Operand* to = const_cast<Operand*>(panel(p)) + v0 / in_strip * size + k0 * in_strip * L;
            for (int64_t k = k0; k < std::min(k0 + together, K); ++k) {
              for (int v = v0; v < v0 + in_strip; ++v, to += L) {
                const auto from = column_operands(k, p * panel_width() + v);
                __builtin_memcpy(to, &from, sizeof from);
              }
            }
          }
        }
      }
    });
    columns = nullptr;
  }

  // Rows a times the outputs of the vectors [v0, v1) of `columns`: out [rows, v1 - v0, lanes]. Every sum
  // takes its terms k by k, as a tile's; some rows of w serve all rows of `a` while they are in the
  // first-level cache.
  void sweep(int v0, int v1, const element_t<S>* a, int64_t lda, const int32_t* rows, int count,
             A* out) const {
    constexpr int terms = 8;  // of a sum at a time
    std::fill_n(out, static_cast<int64_t>(count) * (v1 - v0) * L, A(0));
    int64_t k = 0;
    for (; k + terms <= K; k += terms) add_terms<terms>(v0, v1, a, lda, rows, count, k, out);
    for (; k < K; ++k) add_terms<1>(v0, v1, a, lda, rows, count, k, out);
  }

 private:
  // Operand k of the outputs of vector v of `columns`.
  vector_t<S> column_operands(int64_t k, int v) const {
    const int64_t first = static_cast<int64_t>(v) * L;
    const S* const from = columns + k * per * ld + first;
    return load_columns(from, k * per + 1 < width ? from + ld : nullptr,
                        static_cast<int>(std::min<int64_t>(L, units - first)));
  }

  template <int terms>
  void add_terms(int v0, int v1, const element_t<S>* a, int64_t lda, const int32_t* rows, int count,
                 int64_t k, A* out) const {
    using V = vector_t<S>;
    for (int r = 0; r < count; ++r) {
      V x[terms];
#pragma GCC unroll 8
      for (int i = 0; i < terms; ++i) x[i] = broadcast(operands(a + rows[r] * lda) + k + i);
      for (int v = v0; v < v1; ++v, out += L) {
        V sum = loadu<V>(out);
#pragma GCC unroll 8
        for (int i = 0; i < terms; ++i) sum = add_product<Operand>(sum, x[i], column_operands(k + i, v));
        store(out, sum, L);
      }
    }
  }
};

// The input projection beside the GEMM of the states: rows x[row] times packed weights with the same outputs.
template <class S>
struct InputGemm {
  const GemmWeights<S>* w = nullptr;
  const element_t<S>* x = nullptr;
  int64_t ldx = 0;
};

// How some rows are multiplied by a panel, or by two neighbours: a pass takes a block of k of as many strips
// as a tile does.
template <class T>
struct PanelGemm {
  int64_t K = 0, strip_size = 0;
  int width = 0, strips = 0;  // of a strip in vectors; strips in all
  int together = 1;           // strips of a tile
  int64_t block = 0;          // k of a pass

  template <class S>
  PanelGemm(const GemmWeights<S>& w, int p, int panels, int rows)
      : K(w.K), strip_size(w.strip_size(p)), width(w.strip_width(p)) {
    strips = panels * w.panel_vectors(p) * w.gates / width;
    together = std::min(strips, tile_strips(width, rows));
    // a strip that serves one tile need not stay in the cache
    block = rows > tile_rows(width) ? block_k<T> : std::max<int64_t>(K, 1);
  }

  // use(strip, k0) for each pass, in the order of memory, but the last.
  template <class Use>
  void each_but_last(Use use) const {
    for (int strip = 0; strip < strips; strip += together) {
      const bool end = strip + together >= strips;
      for (int64_t k0 = 0; end ? k0 + block < K : k0 == 0 || k0 < K; k0 += block) use(strip, k0);
    }
  }
  int last_strip() const { return (strips - 1) / together * together; }
  int64_t last_k0() const { return K <= block ? 0 : (K - 1) / block * block; }

  // Adds a pass of a tile, the rows [first, first + rows) of `count`, to out [rows, strips, width, lanes].
  void run(const T* panel, int strip, int64_t k0, const T* const* a, int first, int rows, int count,
           opmath_t<T>* out) const {
    constexpr int L = lanes<T>;
    const int64_t here = std::min(block, K - k0);
    const T* const from = panel + strip * strip_size + k0 * width * L;
    const T* const next_block = from + here * width * L;
    tile_for<T>(width, std::min(together, strips - strip), rows)(
        a, k0, from, strip_size, here, out + strip * width * L, strips * width * L, k0 > 0,
        next_block + here * width * L * first / count, (width * L * rows + count - 1) / count);
  }
};

// use(first, count) for each tile of `rows` rows, none of more than `most`: about equally many each.
template <class Use>
__attribute__((always_inline)) inline void each_tile(int rows, int most, Use use) {
  const int tiles = rows <= most ? 1 : (rows + most - 1) / most;
  for (int i = 0, done = 0; i < tiles; ++i) {
    const int here = i + 1 == tiles ? rows - done : (rows - done) / (tiles - i);
    use(done, here);
    done += here;
  }
}

struct NoActivation {};  // where a product has an epilogue alone

// Calls epilogue(row, u, z, zx) for each row of `rows` and each vector u of units in the panels [p0, p1),
// with z [gates, lanes] the product of a[row] and the weights, and zx that beside it where there is one.
// Before it, activate(row, u, z, zx) may change the z of a whole tile: what waits for one another goes in two
// loops, since a processor looks ahead for some 300 instructions, not two vectors of a GRU.
// Before a tile is summed, prefetch(row, u, units) may ask for the memory that epilogue(row, u) will need of
// so many u: it arrives meanwhile. Each is called from one place only: in copies of it, one for each kind of
// tile, the compiler would fuse other multiplications with additions, and a row's result would depend on the
// rows beside it.
template <int gates, class S, class Epilogue, class Prefetch, class Activate = NoActivation>
inline void gemm_panels(const GemmWeights<S>& w, int p0, int p1, const int32_t* rows, int count,
                        const element_t<S>* a, int64_t lda, Epilogue epilogue, Prefetch prefetch,
                        const InputGemm<S>& input = {}, Activate activate = {}) {
  using A = opmath_t<S>;
  using Operand = operand_t<S>;
  constexpr int L = lanes<A>, width = full_panel(gates);
  if (count == 0) return;
  alignas(64) A out[block_rows * widest_panel * L], out_x[block_rows * widest_panel * L];
  const bool single = w.raw != nullptr, dots = single && count <= few_rows, swept = w.columns != nullptr;
  AlignedBuffer<Operand> once(single && !dots ? width * w.gates * w.lanes_size() : 0);
  const int first_vector = p0 * width, last_vector = std::min(p1 * width, w.unit_vectors());
  const int64_t swept_vectors = last_vector - first_vector;
  AlignedBuffer<A> sums(swept ? count * swept_vectors * L : 0);
  if (swept) w.sweep(first_vector, last_vector, a, lda, rows, count, sums.data);
  for (int p = p0; p < p1; ++p) {
    const int in_panel = w.panel_vectors(p), vectors = in_panel * gates;
    // one row takes two panels at a time: enough sums to hide the latency of a multiply-add
    const bool pair = count == 1 && !single && !swept && p + 1 < p1 && w.panel_vectors(p + 1) == in_panel &&
                      2 * vectors <= widest_panel;
    const int units = pair ? 2 * in_panel : in_panel;
    if (single && !dots) w.pack_lanes(p, once.data);
    each_tile(count, block_rows, [&](int block, int in_block) __attribute__((always_inline)) {
      const Operand *row[block_rows], *row_x[block_rows];
      for (int r = 0; r < in_block; ++r) row[r] = operands(a + rows[block + r] * lda);
      const PanelGemm<Operand> product(w, p, pair ? 2 : 1, in_block);
      const int fit = single ? max_rows : tile_rows(product.width), strip = product.last_strip();
      const int64_t k0 = product.last_k0();
      const auto pass = [&](const PanelGemm<Operand>& gemm, const Operand* panel, int at, int64_t from,
                            const Operand* const* a_row, A* to) {
        each_tile(in_block, tile_rows(gemm.width), [&](int first, int here) {
          gemm.run(panel, at, from, a_row + first, first, here, in_block,
                   to + first * gemm.strips * gemm.width * L);
        });
      };
      if (input.w != nullptr) {
        for (int r = 0; r < in_block; ++r) row_x[r] = operands(input.x + rows[block + r] * input.ldx);
        const PanelGemm<Operand> gemm(*input.w, p, pair ? 2 : 1, in_block);
        const auto add = [&](int at, int64_t from) { pass(gemm, input.w->panel(p), at, from, row_x, out_x); };
        gemm.each_but_last(add);
        add(gemm.last_strip(), gemm.last_k0());
      }
      if (!single && !swept) {
        product.each_but_last([&](int at, int64_t from) { pass(product, w.panel(p), at, from, row, out); });
      }
      each_tile(in_block, fit, [&](int first, int here) __attribute__((always_inline)) {
        A* const z = out + first * units * gates * L;
        for (int r = first; r < first + here; ++r) prefetch(rows[block + r], p * width, units);
        if (swept) {
          for (int r = 0; r < here; ++r) {
            const int64_t at = (block + first + r) * swept_vectors + p * width - first_vector;
            std::copy_n(sums.data + at * L, vectors * L, z + r * vectors * L);
          }
        } else if (dots) {
          w.dots(p, row + first, here, z);
        } else if (single) {
          for (int v = 0; v < vectors; ++v) {
            rows_by_lanes(row + first, here, once.data + v * w.lanes_size(), w.K, z + v * L, vectors * L);
          }
        } else {
          product.run(w.panel(p), strip, k0, row + first, first, here, in_block, z);
        }
        if constexpr (!std::is_same_v<Activate, NoActivation>) {
          for (int r = first; r < first + here; ++r) {
            for (int u = 0; u < units; ++u) {
              const int at = (r * units + u) * gates * L;
              activate(rows[block + r], p * width + u, out + at, out_x + at);
            }
          }
        }
        for (int r = first; r < first + here; ++r) {
          for (int u = 0; u < units; ++u) {
            const int at = (r * units + u) * gates * L;
            epilogue(rows[block + r], p * width + u, out + at, out_x + at);
          }
        }
      });
    });
    if (pair) ++p;
  }
}
