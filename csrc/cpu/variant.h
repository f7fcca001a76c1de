// One processor variant: the templates compiled with its instructions, in a namespace of its own. The
// including file has set RNNKIT_VARIANT, RNNKIT_BYTES and RNNKIT_REGISTERS, and the compiler's target after
// the standard headers, so that none of their inline functions is compiled with instructions another
// processor lacks.

// Templates of the arithmetic, which is a variant's own; compiled for less, its functions would not be
// inlined into them.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace rnnkit {
namespace RNNKIT_VARIANT {
extern const Engine engine;
namespace {

// Each builds on those before it.
// clang-format off
#include "simd.h"
#include "operands.h"
#include "math.h"
#include "partition.h"
#include "tiles.h"
#include "panels.h"
#include "forward.h"
#include "backward.h"
#include "gemm.h"
#if !defined(RNNKIT_WITHOUT_PROGRAMS)
#include "functions.h"
#include "interpreter.h"
#include "program_scan.h"
#endif
// clang-format on

#if !defined(RNNKIT_NATIVE_BF16)
const Engine& other_dtypes() { return engine; }
#endif
// Where dot products of bfloat16 are what a variant has beside another, that one serves every other dtype.
bool elsewhere(Dtype dtype) { return multiplies_bf16 && dtype != Dtype::bf16; }

template <class Use>
auto dispatch(Dtype dtype, Use use) {
  if constexpr (multiplies_bf16) return use(Bf16{});
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
  if (elsewhere(problem.layer.dtype)) return other_dtypes().forward(problem, T);
  return dispatch(problem.layer.dtype, [&](auto s) -> std::unique_ptr<ForwardScan> {
    return std::make_unique<TypedForwardScan<decltype(s)>>(problem, T);
  });
}

std::unique_ptr<BackwardScan> backward(const Backward& problem) {
  if (elsewhere(problem.layer.dtype)) return other_dtypes().backward(problem);
  return dispatch(problem.layer.dtype, [&](auto s) -> std::unique_ptr<BackwardScan> {
    return std::make_unique<TypedBackwardScan<decltype(s)>>(problem);
  });
}

constexpr int64_t many = 1 << 20;  // rows of a product whose number is not known

std::unique_ptr<GemmKernel> gemm_nt(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                    const Workers& workers) {
  if (elsewhere(dtype)) return other_dtypes().gemm_nt(dtype, N, K, w, pack, workers);
  return dispatch(dtype, [&](auto s) -> std::unique_ptr<GemmKernel> {
    using S = decltype(s);
    auto made = std::make_unique<TypedGemm<S>>();
    made->weights.gemm_nt(static_cast<const S*>(w), N, 1, N, K, many, pack, workers);
    return made;
  });
}

std::unique_ptr<GemmKernel> gemm_nn(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                    const Workers& workers) {
  if (elsewhere(dtype)) return other_dtypes().gemm_nn(dtype, N, K, w, pack, workers);
  return dispatch(dtype, [&](auto s) -> std::unique_ptr<GemmKernel> {
    using S = decltype(s);
    auto made = std::make_unique<TypedGemm<S>>();
    made->weights.gemm_nn(static_cast<const S*>(w), N, N, K, many, pack, workers);
    return made;
  });
}

void gemm_tn(const GemmTN& problem) {
  if (elsewhere(problem.dtype)) return other_dtypes().gemm_tn(problem);
  dispatch(problem.dtype, [&](auto s) { TypedGemmTN<decltype(s)>(problem).run(); });
}

// Programs multiply in the type that they compute in: dot products of bfloat16 serve the built-in cells.
std::unique_ptr<ProgramScan> program(const ProgramProblem& problem) {
#if defined(RNNKIT_WITHOUT_PROGRAMS)  // a harness that has none, and a sanitizer's slow compilation
  static_cast<void>(problem);
  return nullptr;
#elif defined(RNNKIT_NATIVE_BF16)
  return other_dtypes().program(problem);
#else
  if (problem.dtype == Dtype::f64) return std::make_unique<TypedProgramScan<double>>(problem);
  return std::make_unique<TypedProgramScan<float>>(problem);
#endif
}

void function(int which, Dtype dtype, int64_t n, const void* in, void* out) {
  if (elsewhere(dtype)) return other_dtypes().function(which, dtype, n, in, out);
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

const Engine engine = {RNNKIT_NAME, multiplies_bf16, &supported, &forward, &backward,
                       &gemm_nt,    &gemm_nn,        &gemm_tn,   &program, &function};

}  // namespace RNNKIT_VARIANT
}  // namespace rnnkit
