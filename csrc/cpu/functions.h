// The functions that cells of users ask for beside sigmoid and tanh, on vectors: a few ulp of float32 and of
// float64, infinities, NaN and subnormal numbers as in libm. Included once per variant, inside its namespace.

// Lane by lane by the C library: exact, and slow. For what cells seldom use.
template <class V, class Function>
inline V by_lane(V x, Function f) {
  V y;
  for (size_t k = 0; k < sizeof(V) / sizeof x[0]; ++k) y[k] = f(x[k]);
  return y;
}

template <class T>
struct Functions : Math<T> {
  using typename Math<T>::Value;
  using typename Math<T>::Bits;
  using typename Math<T>::C;
  using Math<T>::set;
  using Math<T>::sign;
  using Math<T>::magnitude;
  using Math<T>::reduce;
  static constexpr int exponent_bias = sizeof(T) == 4 ? 127 : 1023;
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  static Value with_sign(Value x, Value of) { return (Value)((Bits)magnitude(x) | ((Bits)of & sign())); }

  // Half of the power of two at a time: neither overflows, and a subnormal result is rounded once more.
  static Value exp(Value x) {
    constexpr T low = sizeof(T) == 4 ? T(-110) : T(-760), high = sizeof(T) == 4 ? T(100) : T(720);
    const Value in = lesser(set(high), greater(set(low), x));
    const auto e = reduce(in, 0);
    const Bits n = ((Bits)e.scale - (Bits)set(T(1))) >> C::mantissa, half = n >> 1;
    const Value first = (Value)((half + exponent_bias) << C::mantissa);
    const Value second = (Value)((n - half + exponent_bias) << C::mantissa);
    return (e.m1 * first + first) * second;
  }

  static Value expm1(Value x) {
    constexpr T low = sizeof(T) == 4 ? T(-20) : T(-40), high = sizeof(T) == 4 ? T(88) : T(709);
    const auto e = reduce(lesser(set(high), greater(set(low), x)), 0);
    const Value y = e.m1 * e.scale + (e.scale - T(1));
    return x > set(high) ? exp(x) : x == Value{} ? x : y;
  }

  // x = 2^e m with m about 1; log m = 2 atanh((m - 1) / (m + 1)).
  static Value log(Value x) {
    constexpr T lift = sizeof(T) == 4 ? T(0x1p24f) : T(0x1p54);
    constexpr int lifted = sizeof(T) == 4 ? 24 : 54;
    const Bits small = x < set(std::numeric_limits<T>::min());
    const Value in = small ? x * lift : x;
    const Bits root = (Bits)set(T(0.70710678118654752));
    const Bits e = ((Bits)in - root) >> C::mantissa;  // so that m lies in [sqrt(1/2), sqrt(2))
    const Value m = (Value)((Bits)in - (e << C::mantissa));
    const Value n = __builtin_convertvector(e - (small & lifted), Value);
    const Value f = m - T(1), s = f / (m + T(1)), s2 = s * s;
    constexpr int terms = sizeof(T) == 4 ? 5 : 11;
    Value q = set(T(2) / T(2 * terms + 1));
    for (int k = terms - 1; k > 0; --k) q = q * s2 + T(2) / T(2 * k + 1);
    const Value y = n * C::ln2_high + (n * C::ln2_low + (s * s2 * q + (s + s)));
    const Value special = x == Value{}  ? set(-infinity)
                          : x < Value{} ? set(std::numeric_limits<T>::quiet_NaN())
                                        : x;
    return (x > Value{}) & (x < set(infinity)) ? y : special;  // NaN and infinity are themselves
  }

  // log u plus what 1 + x lost, to first order.
  static Value log1p(Value x) {
    const Value u = x + T(1), y = log(u) + (x - (u - T(1))) / u;
    return x == Value{} ? x : (u > Value{}) & (u < set(infinity)) ? y : log(u);
  }

  static Value sqrt(Value x) {
    if constexpr (std::is_same_v<T, float>) {
#if defined(RNNKIT_AVX512)
      return (Value)_mm512_sqrt_ps((__m512)x);
#elif defined(RNNKIT_AVX2)
      return (Value)_mm256_sqrt_ps((__m256)x);
#endif
    }
    return by_lane(x,
                   [](T v) { return sizeof(T) == 4 ? T(__builtin_sqrtf(float(v))) : T(__builtin_sqrt(v)); });
  }

  // To the nearest integer, ties to even; the sign stays.
  static Value round(Value x) {
    const Value shift = with_sign(set(C::round / T(1.5)), x);
    return magnitude(x) < set(C::round / T(1.5)) ? with_sign((x + shift) - shift, x) : x;
  }
  static Value floor(Value x) {
    const Value r = round(x);
    return r > x ? r - T(1) : r;
  }

  static Value sin(Value x) {
    return by_lane(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_sinf(float(v))) : T(__builtin_sin(v)); });
  }
  static Value cos(Value x) {
    return by_lane(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_cosf(float(v))) : T(__builtin_cos(v)); });
  }
  static Value erf(Value x) {
    return by_lane(x, [](T v) { return sizeof(T) == 4 ? T(__builtin_erff(float(v))) : T(__builtin_erf(v)); });
  }
  static Value pow(Value x, Value y) {
    Value z;
    for (int k = 0; k < lanes<T>; ++k)
      z[k] = sizeof(T) == 4 ? T(__builtin_powf(float(x[k]), float(y[k]))) : T(__builtin_pow(x[k], y[k]));
    return z;
  }

  // NaN where either is one, as torch's.
  static Value maximum(Value a, Value b) { return a != a ? a : greater(a, b); }
  static Value minimum(Value a, Value b) { return a != a ? a : lesser(a, b); }
  static Value one_where(Bits where) { return (Value)(where & (Bits)set(T(1))); }
};
