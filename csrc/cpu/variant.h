// One processor variant: the templates compiled with its instructions, in a namespace of its own. The
// including file has set RNNKIT_VARIANT, RNNKIT_BYTES and RNNKIT_REGISTERS, and the compiler's target after
// the standard headers, so that none of their inline functions is compiled with instructions another
// processor lacks.

namespace rnnkit {
namespace RNNKIT_VARIANT {
namespace {

// Each builds on those before it.
// clang-format off
#include "simd.h"
#include "math.h"
#include "partition.h"
#include "tiles.h"
#include "panels.h"
#include "forward.h"
#include "backward.h"
#include "gemm.h"
// clang-format on

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
    return std::make_unique<TypedForwardScan<decltype(s)>>(problem, T);
  });
}

std::unique_ptr<BackwardScan> backward(const Backward& problem) {
  return dispatch(problem.layer.dtype, [&](auto s) -> std::unique_ptr<BackwardScan> {
    return std::make_unique<TypedBackwardScan<decltype(s)>>(problem);
  });
}

constexpr int64_t many = 1 << 20;  // rows of a product whose number is not known

std::unique_ptr<GemmKernel> gemm_nt(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                    const Workers& workers) {
  return dispatch(dtype, [&](auto s) -> std::unique_ptr<GemmKernel> {
    using S = decltype(s);
    auto made = std::make_unique<TypedGemm<S>>();
    made->weights.gemm_nt(static_cast<const S*>(w), N, 1, N, K, many, pack, workers);
    return made;
  });
}

std::unique_ptr<GemmKernel> gemm_nn(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                    const Workers& workers) {
  return dispatch(dtype, [&](auto s) -> std::unique_ptr<GemmKernel> {
    using S = decltype(s);
    auto made = std::make_unique<TypedGemm<S>>();
    made->weights.gemm_nn(static_cast<const S*>(w), N, N, K, many, pack, workers);
    return made;
  });
}

void gemm_tn(const GemmTN& problem) {
  dispatch(problem.dtype, [&](auto s) { TypedGemmTN<decltype(s)>(problem).run(); });
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
const Engine engine = {RNNKIT_NAME, &supported, &forward, &backward, &gemm_nt, &gemm_nn, &gemm_tn, &function};

}  // namespace RNNKIT_VARIANT
}  // namespace rnnkit
