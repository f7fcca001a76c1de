// sigmoid and tanh of all 2^32 float32 against double, on every engine at once: --exhaustive, some minutes.

#include <cstdio>

#include "checks.h"

namespace harness {
namespace {

// The unit in the last place of float32 at x; below the normal numbers, the smallest subnormal.
double ulp(double x) {
  const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
  return std::ldexp(1.0, exponent - 23);
}

struct Worst {
  double error = 0;
  float at = 0;
};

}  // namespace

bool check_functions() {
  constexpr int64_t block = 1 << 14;
  const auto& engines = rnnkit::engines();
  std::vector<Worst> worst(2 * engines.size());
  std::vector<float> x(block), out(block);
  std::vector<double> exact(block), unit(block);
  bool right = true;
  for (uint64_t first = 0; first < (uint64_t{1} << 32); first += block) {
    for (int64_t k = 0; k < block; ++k) {
      const uint32_t bits = static_cast<uint32_t>(first + k);
      std::memcpy(&x[k], &bits, 4);
    }
    for (int which = 0; which < 2; ++which) {
      for (int64_t k = 0; k < block; ++k) {
        const double v = x[k];
        exact[k] = which == 0 ? 1 / (1 + std::exp(-v)) : std::tanh(v);
        unit[k] = v != v ? 1 : ulp(exact[k]);
      }
      for (size_t e = 0; e < engines.size(); ++e) {
        engines[e]->function(which, Dtype::f32, block, x.data(), out.data());
        Worst& w = worst[2 * e + which];
        for (int64_t k = 0; k < block; ++k) {
          const bool nan = x[k] != x[k];
          const double error =
              nan ? (out[k] != out[k] ? 0 : HUGE_VAL) : std::fabs(out[k] - exact[k]) / unit[k];
          if (!(error <= w.error)) w = {error == error ? error : HUGE_VAL, x[k]};
          if (which == 1 && !nan && std::signbit(out[k]) != std::signbit(x[k])) w = {HUGE_VAL, x[k]};
        }
        right = right && w.error <= 4;
      }
    }
  }
  for (size_t e = 0; e < engines.size(); ++e) {
    for (int which = 0; which < 2; ++which) {
      const Worst& w = worst[2 * e + which];
      std::printf("%s %s: at most %.3f ulp, at %a\n", engines[e]->name, which ? "tanh" : "sigmoid", w.error,
                  w.at);
    }
  }
  return right;
}

}  // namespace harness
