// One processor variant: the templates compiled with its instructions, in a namespace of its own. The including
// file has set RNNKIT_VARIANT, RNNKIT_BYTES and RNNKIT_REGISTERS, and the compiler's target after the standard
// headers, so that none of their inline functions is compiled with instructions another processor lacks.

namespace rnnkit {
namespace RNNKIT_VARIANT {
namespace {

#include "simd.h"
// math.h is used by everything below.
#include "math.h"
#include "product.h"
#include "steps.h"
#include "forward.h"
#include "backward.h"

template <class Use>
auto dispatch(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::f64:
      return use(double{});
    case Dtype::bf16:
      return use(Bf16{});
    case Dtype::f16:
      return use(Fp16{});
    default:
      return use(float{});
  }
}

std::unique_ptr<ForwardScan> forward(const Forward& problem, int64_t T) {
  return dispatch(problem.layer.dtype, [&](auto s) -> std::unique_ptr<ForwardScan> {
    return std::make_unique<ForwardOf<decltype(s)>>(problem, T);
  });
}

void backward(const Backward& problem) {
  dispatch(problem.layer.dtype, [&](auto s) { BackwardOf<decltype(s)>(problem).run(); });
}

template <class T>
class ProductOf final : public Product {
 public:
  ProductOf(int64_t N, int64_t K, const T* w, bool pack) { weights_.by_rows(w, K, N, 1, N, K, pack); }

  void run(int64_t M, const void* a, void* out, int64_t ldo, int64_t threads, Parallel parallel) const override {
    const Split split(threads, M, 1, weights_.units * weights_.K, 1);
    run_parts(split, parallel, [&](int64_t first, int64_t last, Meeting&) {
      for (int64_t p = first; p < last; ++p) {
        const Part part = split.part(p, M);
        rows(part.row0, part.row1, static_cast<const T*>(a), static_cast<T*>(out), ldo);
      }
    });
  }

 private:
  void rows(int64_t row0, int64_t row1, const T* a, T* out, int64_t ldo) const {
    constexpr int64_t block = 96;  // rows that stay in the first-level cache beside a panel
    std::array<int32_t, block> in_order;
    for (int64_t r = 0; r < block; ++r) in_order[r] = static_cast<int32_t>(r);
    for (int64_t m = row0; m < row1; m += block) {
      const int count = static_cast<int>(std::min(block, row1 - m));
      product<1>(weights_, 0, weights_.count(), in_order.data(), count, a + m * weights_.K, weights_.K,
                 [&](int32_t r, int u, const T* z) {
                   const int64_t j = static_cast<int64_t>(u) * lanes<T>;
                   const int n = static_cast<int>(std::min<int64_t>(lanes<T>, weights_.units - j));
                   store(out + (m + r) * ldo + j, whole<typename Vector<T>::Value>(z), n);
                 });
    }
  }

  Weights<T> weights_;
};

std::unique_ptr<Product> product_any(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack) {
  if (dtype == Dtype::f64) return std::make_unique<ProductOf<double>>(N, K, static_cast<const double*>(w), pack);
  return std::make_unique<ProductOf<float>>(N, K, static_cast<const float*>(w), pack);
}

void function(int which, Dtype dtype, int64_t n, const void* in, void* out) {
  const auto run = [&](auto t) {
    using T = decltype(t);
    for (int64_t k = 0; k < n; k += lanes<T>) {
      const int here = static_cast<int>(std::min<int64_t>(lanes<T>, n - k));
      const auto x = load(static_cast<const T*>(in) + k, here);
      store(static_cast<T*>(out) + k, which == 0 ? Math<T>::sigmoid(x) : Math<T>::tanh(x), here);
    }
  };
  dtype == Dtype::f64 ? run(double{}) : run(float{});
}

}  // namespace

extern const Engine engine;
const Engine engine = {RNNKIT_NAME, &supported, &forward, &backward, &product_any, &function};

}  // namespace RNNKIT_VARIANT
}  // namespace rnnkit
