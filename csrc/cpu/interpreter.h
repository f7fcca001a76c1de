// Runs the instructions of a span on one block: some rows times some units, as vectors side by side. Included
// once per variant, inside its namespace.
//
// An instruction goes over the whole block before the next begins, so what it costs to find out which one it
// is counts once for some sixty vectors. A block is as large as lets its values stay in the first-level
// cache.

constexpr int64_t block_bytes = 2048;  // of one value: a dozen of them are half of a first-level cache

// Where each operand's numbers stand, and by how much they go on from vector to vector: 0 for a constant.
template <class A>
struct OperandTable {
  std::vector<A*> first;
  std::vector<int64_t> stride;
  explicit OperandTable(size_t count = 0) : first(count), stride(count, lanes<A>) {}
};

// Rows and units of a block.
struct BlockShape {
  int64_t rows, width, valid;  // units with those that only fill the last vector, and without
};

template <class A>
class Interpreter {
  static constexpr int L = lanes<A>;
  using V = typename Vector<A>::Value;
  using Bits = typename Vector<A>::Bits;
  using F = Functions<A>;

 public:
  static void run(const ProgramInstruction& i, const OperandTable<A>& at, const BlockShape& shape) {
    const int64_t n = i.row ? ceil_div(shape.rows, L) * L : shape.rows * shape.width;
    switch (static_cast<Op>(i.op)) {
#define RNNKIT_ONE(name, value) \
  case Op::name##_:             \
    return one(i, at, n, [](V x) __attribute__((always_inline)) { return value; });
#define RNNKIT_TWO(name, value) \
  case Op::name##_:             \
    return two(i, at, n, [](V x, V y) __attribute__((always_inline)) { return value; });
#define RNNKIT_THREE(name, value) \
  case Op::name##_:               \
    return three(i, at, n, [](V x, V y, V z) __attribute__((always_inline)) { return value; });
      RNNKIT_TWO(add, x + y)
      RNNKIT_TWO(sub, x - y)
      RNNKIT_TWO(mul, x * y)
      RNNKIT_TWO(div, x / y)
      RNNKIT_TWO(pow, F::pow(x, y))
      RNNKIT_TWO(maximum, F::maximum(x, y))
      RNNKIT_TWO(minimum, F::minimum(x, y))
      RNNKIT_TWO(lt, F::one_where(x < y))
      RNNKIT_TWO(le, F::one_where(x <= y))
      RNNKIT_TWO(gt, F::one_where(x > y))
      RNNKIT_TWO(ge, F::one_where(x >= y))
      RNNKIT_TWO(eq, F::one_where(x == y))
      RNNKIT_TWO(ne, F::one_where(x != y))
      RNNKIT_THREE(where, (x != V{}) ? y : z)
      RNNKIT_ONE(neg, -x)
      RNNKIT_ONE(abs, F::magnitude(x))
      RNNKIT_ONE(sigmoid, F::sigmoid(x))
      RNNKIT_ONE(tanh, F::tanh(x))
      RNNKIT_ONE(relu, (x < V{}) ? V{} : x)
      RNNKIT_ONE(exp, F::exp(x))
      RNNKIT_ONE(expm1, F::expm1(x))
      RNNKIT_ONE(log, F::log(x))
      RNNKIT_ONE(log1p, F::log1p(x))
      RNNKIT_ONE(sqrt, F::sqrt(x))
      RNNKIT_ONE(rsqrt, A(1) / F::sqrt(x))
      RNNKIT_ONE(reciprocal, A(1) / x)
      RNNKIT_ONE(sin, F::sin(x))
      RNNKIT_ONE(cos, F::cos(x))
      RNNKIT_ONE(erf, F::erf(x))
      RNNKIT_ONE(round, F::round(x))
      RNNKIT_ONE(floor, F::floor(x))
      RNNKIT_ONE(copy, x)
      RNNKIT_THREE(muladd, x * y + z)
      RNNKIT_THREE(nmuladd, z - x * y)
#undef RNNKIT_ONE
#undef RNNKIT_TWO
#undef RNNKIT_THREE
      case Op::spread_: {
        A* to = at.first[i.to];
        for (int64_t r = 0; r < shape.rows; ++r, to += shape.width)
          std::fill_n(to, shape.width, at.first[i.a][r]);
        return;
      }
      case Op::row_sum_:
        return reduce(i, at, shape, A(0), [](V x, V y) { return x + y; });
      case Op::row_max_:
        return reduce(i, at, shape, -F::infinity, [](V x, V y) { return F::maximum(x, y); });
      case Op::count:
        return;
    }
  }

 private:
  template <class Function>
  static void one(const ProgramInstruction& i, const OperandTable<A>& at, int64_t n, Function f) {
    A* const to = at.first[i.to];
    const A* const a = at.first[i.a];
    const int64_t sa = at.stride[i.a] / L;
    for (int64_t j = 0; j < n; j += L) storeu(to + j, f(loadu<V>(a + j * sa)));
  }
  template <class Function>
  static void two(const ProgramInstruction& i, const OperandTable<A>& at, int64_t n, Function f) {
    A* const to = at.first[i.to];
    const A *const a = at.first[i.a], *const b = at.first[i.b];
    const int64_t sa = at.stride[i.a] / L, sb = at.stride[i.b] / L;
#pragma GCC unroll 2
    for (int64_t j = 0; j < n; j += L) storeu(to + j, f(loadu<V>(a + j * sa), loadu<V>(b + j * sb)));
  }
  template <class Function>
  static void three(const ProgramInstruction& i, const OperandTable<A>& at, int64_t n, Function f) {
    A* const to = at.first[i.to];
    const A *const a = at.first[i.a], *const b = at.first[i.b], *const c = at.first[i.c];
    const int64_t sa = at.stride[i.a] / L, sb = at.stride[i.b] / L, sc = at.stride[i.c] / L;
#pragma GCC unroll 2
    for (int64_t j = 0; j < n; j += L)
      storeu(to + j, f(loadu<V>(a + j * sa), loadu<V>(b + j * sb), loadu<V>(c + j * sc)));
  }

  // Always in the same order, and never over what only fills a vector.
  template <class Function>
  static void reduce(const ProgramInstruction& i, const OperandTable<A>& at, const BlockShape& shape, A start,
                     Function f) {
    const A* from = at.first[i.a];
    for (int64_t r = 0; r < shape.rows; ++r, from += shape.width) {
      V all = F::set(start);
      int64_t j = 0;
      for (; j + L <= shape.valid; j += L) all = f(all, loadu<V>(from + j));
      if (j < shape.valid) {
        V last = F::set(start);
        for (int k = 0; k < shape.valid - j; ++k) last[k] = from[j + k];
        all = f(all, last);
      }
      A lane[L];
      storeu(lane, all);
      for (int half = L / 2; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) {
          V x{}, y{};
          x[0] = lane[k], y[0] = lane[k + half];
          lane[k] = f(x, y)[0];
        }
      }
      at.first[i.to][r] = lane[0];
    }
  }
};
