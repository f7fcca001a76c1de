// The numbers that the plain loops of plain.h compute with, so that one text of a formula gives a value, a
// bound on the engine's error, or a derivative; and the four storage types, rounded and decoded bit by bit,
// apart from the engine's own conversions.
//
// The rule for every budget: a running error analysis (Higham, Accuracy and Stability of Numerical
// Algorithms, 3.3). A `Near` is a value and how far from it a right engine may be. Rounding an operation adds
// u |result|, a sum of m terms in any order m u / (1 - m u) times the sum of their magnitudes, a function 4
// ulp (the promise of csrc/cpu/math.h), and underflow the smallest subnormal number, with u the unit roundoff
// of the type that is computed in. Errors of operands go through by the chain rule. Nothing in it was set by
// what passed.
//
// Dot products of bfloat16 read operands rounded to it, add with an error of at most 2 u (Arm rounds to odd)
// and take for zero what is below the smallest normal number, in operands and in sums.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "../../../csrc/cpu/scan.h"

namespace harness {

using rnnkit::Cell;
using rnnkit::Dtype;

struct Format {
  const char* name;
  int bytes;
  int bits;      // of the significand, the hidden one included
  int smallest;  // the exponent of the smallest subnormal number
  int largest;   // 2^largest is infinite
  double u() const { return std::ldexp(1.0, -bits); }
  double eta() const { return std::ldexp(1.0, smallest); }
};

inline const Format& format(Dtype dtype) {
  static const Format formats[] = {{"f32", 4, 24, -149, 128},
                                   {"f64", 8, 53, -1074, 1024},
                                   {"bf16", 2, 8, -133, 128},
                                   {"f16", 2, 11, -24, 16}};
  return formats[static_cast<int>(dtype)];
}

inline bool is_half(Dtype dtype) { return dtype == Dtype::bf16 || dtype == Dtype::f16; }
inline Dtype computed_in(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// x to the nearest number of the format, ties to even.
inline double rounded(double x, const Format& f) {
  if (f.bits == 53 || x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int last = std::max(exponent - f.bits, f.smallest);
  const double r = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::fabs(r) >= std::ldexp(1.0, f.largest) ? std::copysign(HUGE_VAL, x) : r;
}

// A number of the format, which x is, in memory.
inline void put(double x, Dtype dtype, char* to) {
  const float narrow = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  if (dtype == Dtype::f64) {
    std::memcpy(to, &x, 8);
  } else if (dtype == Dtype::f32) {
    std::memcpy(to, &narrow, 4);
  } else {
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == Dtype::f16) {
      const double a = std::fabs(x);
      const uint16_t sign = half & 0x8000;
      if (a != a) {
        half = 0x7e00;
      } else if (a >= 65536) {
        half = 0x7c00;
      } else if (a < std::ldexp(1.0, -14)) {
        half = static_cast<uint16_t>(std::ldexp(a, 24));
      } else {
        const int e = std::ilogb(a);
        half = static_cast<uint16_t>(((e + 15) << 10) + static_cast<int>(std::ldexp(a, 10 - e)) - 1024);
      }
      half |= sign;
    }
    std::memcpy(to, &half, 2);
  }
}

inline double get(const char* from, Dtype dtype) {
  if (dtype == Dtype::f64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  uint32_t bits = 0;
  float x;
  if (dtype == Dtype::f32) {
    std::memcpy(&bits, from, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, from, 2);
    if (dtype == Dtype::f16) {
      const int e = half >> 10 & 31, m = half & 1023;
      const double a = e == 31 ? (m ? NAN : HUGE_VAL) : std::ldexp(e ? 1024 + m : m, std::max(e, 1) - 25);
      return half & 0x8000 ? -a : a;
    }
    bits = static_cast<uint32_t>(half) << 16;
  }
  std::memcpy(&x, &bits, 4);
  return x;
}

// A value in R, twice as precise as what it judges, and how far a right engine may be from it.
template <class R>
struct Near {
  R v = 0, e = 0;
  Near() = default;
  Near(R value, R error = 0) : v(value), e(error) {}
  static inline R u = 0, eta = 0;
  static inline bool dot_products = false;  // of bfloat16

  static Near rounding(R v, R e) { return {v, e + u * (std::fabs(v) + e) + eta}; }
  friend Near operator+(Near a, Near b) { return rounding(a.v + b.v, a.e + b.e); }
  friend Near operator-(Near a, Near b) { return rounding(a.v - b.v, a.e + b.e); }
  friend Near operator*(Near a, Near b) {
    return rounding(a.v * b.v, std::fabs(a.v) * b.e + std::fabs(b.v) * a.e + a.e * b.e);
  }
};

// A value and its derivative along one direction.
struct Dual {
  double v = 0, d = 0;
  Dual() = default;
  Dual(double value, double derivative = 0) : v(value), d(derivative) {}
  friend Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
  friend Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
  friend Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.v * b.d + b.v * a.d}; }
};

// What a product reads of a number.
template <class X>
X operand(X x) {
  return x;
}
template <class R>
Near<R> operand(Near<R> x) {
  if (!Near<R>::dot_products) return x;
  const Format& f = format(Dtype::bf16);
  const R r = static_cast<R>(rounded(static_cast<double>(x.v), f));
  if (x.e == 0) return r;
  return {r, x.e + static_cast<R>(2 * f.u()) * (std::fabs(x.v) + x.e) + static_cast<R>(f.eta())};
}

inline double value(double x) { return x; }
inline double value(Dual x) { return x.v; }
template <class R>
R value(Near<R> x) {
  return x.v;
}

// The functions. `slope` is the largest derivative within the error of the argument.
template <class R>
R logistic(R x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

template <class R>
Near<R> function(R f, R slope, R error) {
  return {f, slope * error + 8 * Near<R>::u * (std::fabs(f) + slope * error) + 4 * Near<R>::eta};
}

template <class R>
Near<R> sigmoid(Near<R> x) {
  const R inner = std::max(R(0), std::fabs(x.v) - x.e);
  return function(logistic(x.v), logistic(inner) * logistic(-inner), x.e);
}
template <class R>
Near<R> tanh(Near<R> x) {
  const R inner = 2 * std::max(R(0), std::fabs(x.v) - x.e);
  return function(std::tanh(x.v), 4 * logistic(inner) * logistic(-inner), x.e);
}
template <class R>
Near<R> relu(Near<R> x) {
  return {x.v < 0 ? R(0) : x.v, x.e};
}

inline Dual sigmoid(Dual x) {
  const double s = logistic(x.v);
  return {s, s * (1 - s) * x.d};
}
inline Dual tanh(Dual x) {
  const double t = std::tanh(x.v);
  return {t, (1 - t * t) * x.d};
}
inline Dual relu(Dual x) { return x.v <= 0 ? Dual(0) : x; }  // torch's choice at the kink

inline double sigmoid(double x) { return logistic(x); }
inline double tanh(double x) { return std::tanh(x); }
inline double relu(double x) { return x < 0 ? 0 : x; }

// The sum of `terms` and of w[k step] a[k] over k < K, in any order.
template <class X, class W>
X sum(std::initializer_list<X> terms, const W* w, int64_t step, const X* a, int64_t K) {
  X total(0);
  for (const X& x : terms) total = total + x;
  for (int64_t k = 0; k < K; ++k) total = total + X(w[k * step]) * a[k];
  return total;
}

template <class R, class W>
Near<R> sum(std::initializer_list<Near<R>> terms, const W* w, int64_t step, const Near<R>* a, int64_t K) {
  const R smallest_normal = static_cast<R>(0x1p-126);
  R v = 0, magnitude = 0, error = 0, flushed = 0;
  for (const Near<R>& x : terms) v += x.v, magnitude += std::fabs(x.v) + x.e, error += x.e;
  for (int64_t k = 0; k < K; ++k) {
    const R weight = w[k * step];
    v += weight * a[k].v;
    magnitude += std::fabs(weight) * (std::fabs(a[k].v) + a[k].e);
    error += std::fabs(weight) * a[k].e;
    if (Near<R>::dot_products) flushed += smallest_normal * (std::fabs(weight) + std::fabs(a[k].v) + a[k].e);
  }
  const R m = static_cast<R>(K + static_cast<int64_t>(terms.size()));
  const bool dots = K > 0 && Near<R>::dot_products;
  const R u = dots ? 2 * Near<R>::u : Near<R>::u, eta = dots ? smallest_normal : Near<R>::eta;
  return {v, error + flushed + m * u / (1 - m * u) * magnitude + m * eta};
}

template <class X>
X sum(std::initializer_list<X> terms) {
  return sum(terms, static_cast<const double*>(nullptr), 0, static_cast<const X*>(nullptr), 0);
}

// The same bits, whatever the bits of a NaN.
inline bool same(double a, double b) {
  return (a != a && b != b) || (a == b && std::signbit(a) == std::signbit(b));
}
inline bool all_same(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), same);
}

}  // namespace harness
