// What the products of a variant multiply: numbers of the type that is computed in, or, where the processor
// has dot products of bfloat16, pairs of neighbours in k as they are stored, two multiply-adds for each lane.
// Products are written for operands: K counts them, and a row of weights or of a matrix is read by pairs.
// Included once per variant, inside its namespace.
//
// A dot product sums in float32. AVX-512 rounds both additions to nearest, Arm both to odd; either takes
// subnormal numbers for zero, and gives none.

// Two numbers of bfloat16 side by side, that of the even k first.
struct Pair {
  Bf16 even, odd;
};

#if defined(RNNKIT_NATIVE_BF16)
constexpr bool multiplies_bf16 = true;
#else
constexpr bool multiplies_bf16 = false;
#endif

// How matrices that products read are stored, what stands there, and how many of the first make the second.
template <class S>
constexpr bool multiplies_pairs = multiplies_bf16 && std::is_same_v<S, Bf16>;
template <class S>
using element_t = std::conditional_t<multiplies_pairs<S>, Bf16, opmath_t<S>>;
template <class S>
using operand_t = std::conditional_t<multiplies_pairs<S>, Pair, opmath_t<S>>;
template <class S>
constexpr int per_operand = multiplies_pairs<S> ? 2 : 1;

template <class T>
inline const T* operands(const T* row) {
  return row;
}
inline const Pair* operands(const Bf16* row) { return reinterpret_cast<const Pair*>(row); }

// One operand in every lane.
template <class T>
inline typename Vector<T>::Value broadcast(const T* p) {
  return *p - typename Vector<T>::Value{};
}
inline Vector<float>::Value broadcast(const Pair* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vector<float>::Value)(bits - Vector<float>::Unsigned{});
}

// sum + x w for operands of type O.
template <class O>
inline vector_t<O> add_product(vector_t<O> sum, vector_t<O> x, vector_t<O> w) {
  return sum + x * w;
}
#if defined(RNNKIT_NATIVE_BF16)
template <>
inline vector_t<Pair> add_product<Pair>(vector_t<Pair> sum, vector_t<Pair> x, vector_t<Pair> w) {
#if defined(__aarch64__)
  return (vector_t<Pair>)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_f32((float32x4_t)x),
                                     vreinterpretq_bf16_f32((float32x4_t)w));
#else
  return (vector_t<Pair>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#endif
}
#endif

// The operands of a row from p on: `n` numbers of it (a vector of operands, or fewer and zeros).
template <class S>
inline vector_t<S> load_operands(const S* p, int n) {
  if constexpr (!multiplies_pairs<S>) {
    return load(p, n);
  } else {
    constexpr int all = 2 * lanes<float>;
    if (n == all) return loadu<vector_t<S>>(p);
#if defined(RNNKIT_AVX512)
    return (vector_t<S>)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
#else
    Bf16 some[all] = {};
    std::copy_n(p, n, some);
    return loadu<vector_t<S>>(some);
#endif
  }
}

// The operands of `n` columns of a row, and of the next where they are pairs. A row that is null is zeros.
template <class S>
inline vector_t<S> load_columns(const S* row, [[maybe_unused]] const S* next, int n) {
  if constexpr (!multiplies_pairs<S>) {
    return row == nullptr ? vector_t<S>{} : load(row, n);
  } else {
    using U = Vector<float>::Unsigned;
    const U even = row == nullptr ? U{} : load_bits16(row, n),
            odd = next == nullptr ? U{} : load_bits16(next, n);
    return (vector_t<S>)(even | odd << 16);
  }
}
