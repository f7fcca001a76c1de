// Vectors of one processor variant by the compiler's vector extensions: loads, stores and the storage types
// float, double, bfloat16 and float16. Included once per variant, inside its namespace; RNNKIT_BYTES is the
// width.

template <class T>
struct Vector;

template <>
struct Vector<float> {
  typedef float Value __attribute__((vector_size(RNNKIT_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(RNNKIT_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(RNNKIT_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(RNNKIT_BYTES / 2)));
};

template <>
struct Vector<double> {
  typedef double Value __attribute__((vector_size(RNNKIT_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(RNNKIT_BYTES)));
};

template <class T>
constexpr int lanes = RNNKIT_BYTES / static_cast<int>(sizeof(T));

// What a storage type is computed in.
template <class S>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <class S>
using opmath_t = typename OpMath<S>::type;

template <class S>
using vector_t = typename Vector<opmath_t<S>>::Value;

template <class V, class T>
inline V loadu(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// By a type that the compiler takes to change numbers of type T alone, not the pointers and sizes beside
// them, as it would a memcpy's bytes: those stay in registers.
template <class T>
inline void storeu(T* p, typename Vector<T>::Value v) {
  typedef T Unaligned __attribute__((vector_size(RNNKIT_BYTES), aligned(sizeof(T))));
  *reinterpret_cast<Unaligned*>(p) = v;
}

template <class V, class T>
inline V load_partial(const T* p, int n) {
  V v{};
  for (int k = 0; k < n; ++k) v[k] = p[k];
  return v;
}

#if defined(RNNKIT_AVX512)
template <>
inline Vector<float>::Half load_partial(const uint16_t* p, int n) {
  return (Vector<float>::Half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
inline void store_partial(uint16_t* p, Vector<float>::Half v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)v);
}
template <>
inline Vector<float>::Value load_partial(const float* p, int n) {
  return (Vector<float>::Value)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline void store_partial(float* p, Vector<float>::Value v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
#elif defined(RNNKIT_AVX2)
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vector<float>::Value load_partial(const float* p, int n) {
  return (Vector<float>::Value)_mm256_maskload_ps(p, first_lanes(n));
}
inline void store_partial(float* p, Vector<float>::Value v, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
}
#endif

template <class T, class V>
inline void store_partial(T* p, V v, int n) {
  for (int k = 0; k < n; ++k) p[k] = v[k];
}

// The lesser and the greater of two numbers, b where one is a NaN. By instructions: from a comparison and a
// selection gcc makes two.
template <class V>
inline V lesser(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}
#if defined(RNNKIT_AVX512)
template <>
inline Vector<float>::Value lesser(Vector<float>::Value a, Vector<float>::Value b) {
  return (Vector<float>::Value)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
template <>
inline Vector<float>::Value greater(Vector<float>::Value a, Vector<float>::Value b) {
  return (Vector<float>::Value)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
#elif defined(RNNKIT_AVX2)
template <>
inline Vector<float>::Value lesser(Vector<float>::Value a, Vector<float>::Value b) {
  return (Vector<float>::Value)_mm256_min_ps((__m256)a, (__m256)b);
}
template <>
inline Vector<float>::Value greater(Vector<float>::Value a, Vector<float>::Value b) {
  return (Vector<float>::Value)_mm256_max_ps((__m256)a, (__m256)b);
}
#endif

// load<S>(p, n): n elements (all lanes, or the first n and zeros), as the type that S is computed in.
inline Vector<float>::Value load(const float* p, int n) {
  using V = Vector<float>::Value;
  return n == lanes<float> ? loadu<V>(p) : load_partial<V>(p, n);
}

inline Vector<double>::Value load(const double* p, int n) {
  using V = Vector<double>::Value;
  return n == lanes<double> ? loadu<V>(p) : load_partial<V>(p, n);
}

inline void store(float* p, Vector<float>::Value v, int n) {
  if (n == lanes<float>) {
    storeu(p, v);
  } else {
    store_partial(p, v, n);
  }
}

inline void store(double* p, Vector<double>::Value v, int n) {
  if (n == lanes<double>) {
    storeu(p, v);
  } else {
    store_partial(p, v, n);
  }
}

inline Vector<float>::Unsigned load_bits16(const void* p, int n) {
  using Half = Vector<float>::Half;
  const uint16_t* q = static_cast<const uint16_t*>(p);
  return __builtin_convertvector(n == lanes<float> ? loadu<Half>(q) : load_partial<Half>(q, n),
                                 Vector<float>::Unsigned);
}

inline void store_bits16(void* p, Vector<float>::Unsigned bits, int n) {
  const Vector<float>::Half h = __builtin_convertvector(bits, Vector<float>::Half);
  uint16_t* q = static_cast<uint16_t*>(p);
  if (n == lanes<float>) {
    __builtin_memcpy(q, &h, sizeof h);
  } else {
    store_partial(q, h, n);
  }
}

inline Vector<float>::Value load(const Bf16* p, int n) {
  return (Vector<float>::Value)(load_bits16(p, n) << 16);
}

#if defined(RNNKIT_AVX512) && defined(RNNKIT_NATIVE_BF16)
constexpr int subnormal = 0x20;  // a class of vfpclassps; the conversion takes those for zero
inline bool has_subnormal(Vector<float>::Value v) {
  return _mm512_fpclass_ps_mask((__m512)v, subnormal) != 0;
}
inline void store_converted(Bf16* p, Vector<float>::Value v, int n) {
  const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n == lanes<float>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), h);
  }
}
#endif

// To nearest, ties to even; a NaN stays one.
inline void store(Bf16* p, Vector<float>::Value v, int n) {
  using U = Vector<float>::Unsigned;
#if defined(RNNKIT_AVX512) && defined(RNNKIT_NATIVE_BF16)
  if (__builtin_expect(!has_subnormal(v), 1)) return store_converted(p, v, n);
#endif
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  store_bits16(p, (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, n);
}

// The exponent is moved by a multiplication, which also makes float16's subnormals normal.
inline Vector<float>::Value load(const Fp16* p, int n) {
  using U = Vector<float>::Unsigned;
  using V = Vector<float>::Value;
  const U h = load_bits16(p, n);
  const U magnitude = (h & 0x7fffu) << 13;
  const U finite = (U)((V)magnitude * 0x1p112f);
  const U special = magnitude | 0x7f800000u;
  return (V)((magnitude >= (0x7c00u << 13) ? special : finite) | ((h & 0x8000u) << 16));
}

// To nearest, ties to even. Subnormals: adding 0.5 rounds to multiples of 2^-24, float16's smallest number.
inline void store(Fp16* p, Vector<float>::Value v, int n) {
  using U = Vector<float>::Unsigned;
  using V = Vector<float>::Value;
  const U bits = (U)v, magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U small = (U)((V)magnitude + 0.5f) - 0x3f000000u;
  U h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x477ff000u ? (U)(h - h + 0x7c00u) : h;
  h = magnitude > 0x7f800000u ? (U)(h - h + 0x7e00u) : h;
  store_bits16(p, h | ((bits >> 16) & 0x8000u), n);
}

// A single element.
template <class S>
inline opmath_t<S> load_one(const S* p) {
  return load(p, 1)[0];
}
inline float load_one(const Bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
