// sigmoid and tanh on vectors, and the arithmetic that csrc/cells asks for. Below 3 ulp of float32 over
// the whole range, subnormal results and saturation included (tests/backends/harness --exhaustive measures
// every float32), and below 4 ulp of float64; NaN stays NaN. Included once per variant, inside its namespace.
//
// Method: x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) - 1 = r + r² q(r), so that nothing cancels near 0.
//
// A scan waits for these: what counts is how many instructions there are beside the multiply-adds of the
// products, which need the same units, and how long their chain is.

// Inlined by force: a call would cost a tenth of an activation, and gcc makes one where four stand together.
#define RNNKIT_INLINE __attribute__((always_inline)) inline

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float round = 0x1.8p23f;  // added and taken away: rounds to an integer
  static constexpr int lift = 64;            // by so many powers of 2 exp(-x) is finite
  static constexpr float lower = 0x1p-64f;   // 2^-lift
  static constexpr float log2e = 0x1.715476p0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr float least = -105.0f;  // sigmoid is 0 from here on down
  static constexpr float large = 40.0f;    // exp(-x) is nothing beside 1 from here on up, nor exp(-2 |x|)
  static constexpr int mantissa = 23;
  // Minimax for r² q(r) against exp(r) on the interval, 3e-9.
  static constexpr float q[] = {1.3950631e-3f, 8.3689699e-3f, 4.16662022e-2f, 1.66665182e-1f, 0.5f};
};

template <>
struct Constants<double> {
  static constexpr double round = 0x1.8p52;
  static constexpr int lift = 128;
  static constexpr double lower = 0x1p-128;
  static constexpr double log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double least = -746.0, large = 60.0;
  static constexpr int mantissa = 52;
  // 1 / k!, k = 14 .. 2: the next term is below 2^-60.
  static constexpr double q[] = {1.1470745597729725e-11,
                                 1.6059043836821613e-10,
                                 2.0876756987868099e-9,
                                 2.5052108385441720e-8,
                                 2.7557319223985893e-7,
                                 2.7557319223985888e-6,
                                 2.4801587301587302e-5,
                                 1.9841269841269841e-4,
                                 1.3888888888888889e-3,
                                 8.3333333333333332e-3,
                                 4.1666666666666664e-2,
                                 1.6666666666666666e-1,
                                 0.5};
};

template <class T>
struct Math {
  using Value = typename Vector<T>::Value;
  using Bits = typename Vector<T>::Bits;
  using C = Constants<T>;

  static Value set(T v) { return v - Value{}; }  // x - 0 is x, also for -0
  static Bits less(Value a, Value b) { return a < b; }
  static Bits less_equal(Value a, Value b) { return a <= b; }
  static Value select(Bits where, Value a, Value b) { return where ? a : b; }
  static Bits sign() { return (Bits)set(T(-0.0)); }
  static Value magnitude(Value x) { return (Value)((Bits)x & ~sign()); }

  // Of x = n ln 2 + r: 2^(n + more), and exp(r) - 1.
  struct Reduced {
    Value scale;
    Value m1;
  };
  RNNKIT_INLINE static Reduced reduce(Value x, int more) {
    const T round = C::round + T(more);
    const Value rounded = x * C::log2e + round;  // its last bits are n + more
    const Value n = rounded - round;
    const Value r = (x - n * C::ln2_high) - n * C::ln2_low, r2 = r * r;
    constexpr int last = sizeof C::q / sizeof(T) - 1;  // even: the others go in pairs, half as long a chain
    Value q = C::q[0] * r + C::q[1];
    for (int k = 2; k < last; k += 2) q = q * r2 + (C::q[k] * r + C::q[k + 1]);
    q = q * r + C::q[last];
    return {(Value)(((Bits)rounded << C::mantissa) + (Bits)set(T(1))), q * r2 + r};
  }

  // 2^-lift / (2^-lift exp(-x) + 2^-lift): nothing overflows, and a subnormal result is rounded once.
  RNNKIT_INLINE static Value sigmoid(Value x) {
    const Reduced e = reduce(-lesser(set(C::large), greater(set(C::least), x)), -C::lift);
    return C::lower / (e.m1 * e.scale + e.scale + C::lower);
  }

  // With m = exp(2|x|) - 1: tanh |x| = m / (m + 2) where |x| is small, so that nothing cancels, and
  // 1 - 2 / (m + 2) where it is not, so that 1 - tanh², which a backward takes, is as exact as can be.
  RNNKIT_INLINE static Value tanh(Value x) {
    const Value a = lesser(set(C::large / 2), magnitude(x));
    const Reduced r = reduce(a + a, 0);
    const Value m = r.m1 * r.scale + (r.scale - T(1));
    const Bits large = a > T(0.54);
    const Value t = (Value)(large & (Bits)set(T(1))) + (large ? set(T(-2)) : m) / (m + T(2));
    return (Value)((Bits)t | ((Bits)x & sign()));
  }
};

#undef RNNKIT_INLINE
