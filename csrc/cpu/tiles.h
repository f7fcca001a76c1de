// The tiles of a GEMM: some rows times some vectors of packed weights, whose sums stay in registers. Included
// once per variant, inside its namespace.
//
// Weights are packed in strips of a few vectors of outputs, k by k, so that a tile reads a strip from end to
// end. The strips' width and the rows of a tile are chosen by measurement. GFLOP/s of one core of a Zen 4
// (peak 117) and of a Zen 3 (peak 95) for a product of 64 rows with K = 512, strips in blocks of 256 k:
//
//   rows x vectors    2x4   3x4   4x3   6x2   7x2 |  6x4   8x3  12x2
//   AVX2, Zen 4        86   111   112   111    69 |
//   AVX2, Zen 3        51    51     -    94     - |
//   SSE2, Zen 4        36    38    38    36     - |
//   AVX-512, Zen 4                                |  115   116   115
//
// A wide strip does not fit the first-level cache, and not every processor streams it from the second level
// at the rate of its multiply-adds; with 16 registers 7x2 keeps sums on the stack. SSE2's and NEON's vectors
// are so short that a strip of two would be read for too few outputs.

constexpr int registers = RNNKIT_REGISTERS;
constexpr int widest_strip = RNNKIT_BYTES == 32 ? 2 : 4;  // vectors
constexpr int most_sums = registers >= 32 ? 24 : 12;      // beside them a strip's vectors and a broadcast
constexpr int max_rows = registers >= 32 ? 12 : 6;
constexpr int few_sums = 8;  // in flight hide the latency of a multiply-add: fewer rows take more strips
constexpr int max_strips = 4;

// One or two rows stream the weights: the fewer strips they read side by side, the faster.
constexpr int streaming_rows = 2;
constexpr int streamed_strip = 4;  // vectors

// Rows of a tile of one strip. Where only one or two rows have strips of four vectors, no tile has more.
constexpr int tile_rows(int width) {
  const bool streamed = width == streamed_strip && width > widest_strip;
  return streamed ? streaming_rows : std::min(max_rows, most_sums / width);
}

// Strips that a tile takes side by side.
constexpr int tile_strips(int width, int rows) {
  return rows > streaming_rows || width == 1 ? 1 : std::max(1, few_sums / (rows * width));
}

// The strips' width for products of `rows` rows.
constexpr int strip_for(int64_t rows) { return rows <= streaming_rows ? streamed_strip : widest_strip; }

// k whose weights, in a strip of two vectors, are at most half of a first-level cache of 32 KB with AVX2. The
// second level serves four vectors of AVX-512 as fast as they are multiplied, in one block. Sums wait in
// `out` for the next block, so the order of the sums does not depend on it.
template <class T>
constexpr int64_t block_k = (RNNKIT_BYTES == 64 ? int64_t{1} << 40 : 1024) / static_cast<int64_t>(sizeof(T));

// Whether the tiles of a block, while they are summed, ask for the block that follows in memory, each for its
// share. A block that serves few tiles comes from the third-level cache slower than it is multiplied: where
// W_hh does not fit the second level an LSTM's inference at H = 512 and 768 gained 5 to 20 % (Zen 4 held to
// AVX2). With AVX-512 a block is a whole strip; nothing was gained there, and up to 7 % lost.
constexpr bool asks_ahead = RNNKIT_BYTES == 32;

// Between the rows of a tile. For aarch64 gcc would load the operands of all rows first, and sums would be
// stored to the stack for want of registers.
inline void keep_order() {
#if defined(__aarch64__)
  asm volatile("" : : : "memory");
#endif
}

// out [rows, strips, width, lanes] = a [rows, k0 .. k0 + K] strips [strips, K, width, lanes], += where `add`,
// of operands of type T. Rows of `out` are ldo apart, strips `next`. For each k the memory `step` further on
// from `ahead` is asked for.
template <class T, int width, int strips, int rows>
void tile(const T* const* a, int64_t k0, const T* __restrict strip, int64_t next, int64_t K,
          opmath_t<T>* __restrict out, int64_t ldo, bool add, [[maybe_unused]] const T* ahead,
          [[maybe_unused]] int64_t step) {
  using V = vector_t<T>;
  constexpr int L = lanes<T>, vectors = strips * width;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[r][v] = V{};
  }
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[r][v] = loadu<V>(out + r * ldo + v * L);
    }
  }
  const T* row[rows];
  for (int r = 0; r < rows; ++r) row[r] = a[r] + k0;
  for (int64_t k = 0; k < K; ++k, strip += width * L) {
    if constexpr (asks_ahead && strips == 1) {
      __builtin_prefetch(ahead, 0, 2);  // into the second-level cache: the first has the block at hand
      ahead += step;
    }
    V w[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) w[v] = loadu<V>(strip + v / width * next + v % width * L);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const V x = broadcast(row[r] + k);
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[r][v] = add_product<T>(sum[r][v], x, w[v]);
      keep_order();
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(out + r * ldo + v * L, &sum[r][v], sizeof(V));
  }
}

template <class T>
using Tile = void (*)(const T* const* a, int64_t k0, const T* strip, int64_t next, int64_t K,
                      opmath_t<T>* out, int64_t ldo, bool add, const T* ahead, int64_t step);

// By the number of rows less one; null where such a tile would not fit the registers.
template <class T, int width, int strips, int... less>
constexpr std::array<Tile<T>, max_rows> tiles_of(std::integer_sequence<int, less...>) {
  constexpr auto fits = [](int rows) {
    return rows <= tile_rows(width) && strips <= tile_strips(width, rows);
  };
  return {(fits(less + 1) ? &tile<T, width, (fits(less + 1) ? strips : 1), (fits(less + 1) ? less + 1 : 1)>
                          : nullptr)...};
}

template <class T, int width, int... less>
constexpr std::array<std::array<Tile<T>, max_rows>, max_strips> tiles_of_strips(
    std::integer_sequence<int, less...>) {
  return {tiles_of<T, width, less + 1>(std::make_integer_sequence<int, max_rows>{})...};
}

template <class T>
inline Tile<T> tile_for(int width, int strips, int rows) {
  using Strips = std::make_integer_sequence<int, max_strips>;
  static constexpr std::array<std::array<Tile<T>, max_rows>, max_strips> all[] = {
      tiles_of_strips<T, 1>(Strips{}), tiles_of_strips<T, 2>(Strips{}), tiles_of_strips<T, 3>(Strips{}),
      tiles_of_strips<T, 4>(Strips{})};
  return all[width - 1][strips - 1][rows - 1];
}

// How far apart the weights of two lanes stand in a panel for a single step, in k: an odd number, so that
// they fall into different sets of the first-level cache.
template <class T>
constexpr int64_t lane_stride(int64_t K) {
  return (K + lanes<T> - 1) / lanes<T> | 1;
}

// For each lane l the sums of rows times one vector over k = l, l + L, ..., and of `count` lanes from l on,
// the two halves' added. So GemmWeights::dot sums.
template <class T, int rows, int count>
__attribute__((always_inline)) inline void add_lanes(const T* const* a, const T* panel, int64_t K, int l,
                                                     vector_t<T> (&sum)[rows]) {
  using V = vector_t<T>;
  constexpr int L = lanes<T>;
  if constexpr (count > 1) {
    V second[rows];
    add_lanes<T, rows, count / 2>(a, panel, K, l, sum);
    add_lanes<T, rows, count / 2>(a, panel, K, l + count / 2, second);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] += second[r];
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = V{};
    panel += l * lane_stride<T>(K) * L;
    for (int64_t k = l; k < K; k += L, panel += L) {
      const V w = loadu<V>(panel);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sum[r] = add_product<T>(sum[r], broadcast(a[r] + k), w);
    }
  }
}

// A tile of one vector of weights for a single step; rows of `out` are ldo apart.
template <class T, int rows>
void tile_by_lanes(const T* const* a, const T* panel, int64_t K, opmath_t<T>* out, int64_t ldo) {
  using V = vector_t<T>;
  constexpr int L = lanes<T>, together = std::min(L, 4);  // lanes whose sums stay in registers
  V sum[L / together][rows];
  const T* row[rows];
  for (int r = 0; r < rows; ++r) row[r] = a[r];
  for (int i = 0; i < L / together; ++i) {
    V some[rows];
    add_lanes<T, rows, together>(row, panel, K, i * together, some);
    __builtin_memcpy(sum[i], some, sizeof some);
  }
  for (int n = L / together; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      for (int r = 0; r < rows; ++r) sum[i][r] = sum[2 * i][r] + sum[2 * i + 1][r];
    }
  }
  for (int r = 0; r < rows; ++r) __builtin_memcpy(out + r * ldo, &sum[0][r], sizeof(V));
}

// Any number of rows, as many at a time as leave registers for the sums of some lanes.
template <class T, int most = registers / 4>
void rows_by_lanes(const T* const* a, int rows, const T* panel, int64_t K, opmath_t<T>* out, int64_t ldo) {
  for (; rows >= most; rows -= most, a += most, out += most * ldo) {
    tile_by_lanes<T, most>(a, panel, K, out, ldo);
  }
  if constexpr (most > 1) rows_by_lanes<T, most / 2>(a, rows, panel, K, out, ldo);
}
