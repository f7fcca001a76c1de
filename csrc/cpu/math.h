// exp, sigmoid and tanh on vectors, and the arithmetic that csrc/cells asks for. Below 3 ulp of float32 over
// the whole range, subnormal results and saturation included (tests/harness --exhaustive measures every
// float32), and below 4 ulp of float64; NaN stays NaN. Included once per variant, inside its namespace.
//
// Method: x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) - 1 = r + r² q(r), so that nothing cancels near 0.

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float round = 0x1.8p23f;  // added and taken away: rounds to an integer
  static constexpr float log2e = 0x1.715476p0f, ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
  static constexpr float least = -105.0f;  // exp is 0 from here on down
  static constexpr float small = -40.0f;   // exp(x) - 1 is -1 from here on down
  static constexpr int mantissa = 23, bias = 127;
  // Minimax for r² q(r) against exp(r) on the interval, 3e-9.
  static constexpr float q[] = {1.3950631e-3f, 8.3689699e-3f, 4.16662022e-2f, 1.66665182e-1f, 0.5f};
};

template <>
struct Constants<double> {
  static constexpr double round = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42feep-1,
                          ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double least = -746.0, small = -60.0;
  static constexpr int mantissa = 52, bias = 1023;
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
  static Value negative_magnitude(Value x) { return (Value)((Bits)x | sign()); }

  // n of x = n ln 2 + r as an integer, and exp(r) - 1.
  struct Reduced {
    Bits n;
    Value m1;
  };
  static Reduced reduce(Value x) {
    const Value shifted = x * C::log2e + C::round;
    const Value whole = shifted - C::round;
    Value r = x - whole * C::ln2_high;
    r = r - whole * C::ln2_low;
    Value q = set(C::q[0]);
    for (unsigned k = 1; k < sizeof C::q / sizeof(T); ++k) q = q * r + C::q[k];
    return {(Bits)shifted - (Bits)set(C::round), r * r * q + r};
  }
  // 2^n for n within the normal numbers.
  static Value power(Bits n) { return (Value)((n + C::bias) << C::mantissa); }

  // exp(x) for x <= 0. Two factors of 2, so that a subnormal result is rounded once.
  static Value exp_negative(Value x) {
    x = x < C::least ? set(C::least) : x;
    const Reduced e = reduce(x);
    const Bits half = e.n >> 1;
    return (e.m1 + T(1)) * power(half) * power(e.n - half);
  }

  static Value sigmoid(Value x) {
    const Value e = exp_negative(negative_magnitude(x));
    return (x < T(0) ? e : set(T(1))) / (e + T(1));
  }

  // With e = exp(-2|x|): tanh |x| = (1 - e) / (1 + e), from e - 1 without cancellation where |x| is small,
  // and as 1 - 2e / (1 + e) where it is not, so that 1 - tanh², which a backward takes, is as exact as can
  // be.
  static Value tanh(Value x) {
    Value a = negative_magnitude(x) * T(2);
    a = a < C::small ? set(C::small) : a;
    const Reduced r = reduce(a);
    const Value scale = power(r.n);
    const Value e = (r.m1 + T(1)) * scale;
    const Bits large = e < T(0.34);
    const Value m = r.m1 * scale + (scale - T(1));
    const Value q = (large ? e + e : -m) / (large ? e + T(1) : m + T(2));
    const Value t = large ? T(1) - q : q;
    return (Value)(((Bits)t & ~sign()) | ((Bits)x & sign()));
  }
};
