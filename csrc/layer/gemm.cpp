// The GEMMs around a scan: the package's own, or torch's where a measurement, made once in a process
// for each kind of product and dtype, finds them faster on this processor.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <chrono>

#include "gemm.h"

namespace rnnkit {
namespace {

Tensor transpose(const Tensor& m) { return view(m, {m.size(1), m.size(0)}, {m.stride(1), m.stride(0)}, 0); }

void torch_mm(const Tensor& a, const Tensor& w, Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), w.get()));
}

// out += a^T b, = where not `add`
void torch_gemm_tn(const Tensor& a, const Tensor& b, Tensor& out, bool add) {
  const Tensor left = transpose(a);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

void own_gemm_tn(const Tensor& a, const std::vector<const WeightGrad*>& grads, const OptionalTensor& sum,
                 bool add) {
  GemmTN q{};
  q.dtype = dtype_of(a);
  q.add = add;
  q.M = a.size(1), q.K = a.size(0);
  q.a = a.const_data_ptr();
  q.lda = a.stride(0);
  GemmTNRight* right = q.right;
  for (const WeightGrad* grad : grads) {
    const Tensor& out = grad->out;
    *right++ = {out.size(0), out.size(1), grad->rows.data(), out.mutable_data_ptr(), out.stride(0)};
  }
  q.sum = sum.has_value() ? sum->mutable_data_ptr() : nullptr;
  q.workers = workers();
  engine().gemm_tn(q);
}

// Where rows that follow one another in memory begin, and their number at the end; empty where there are too
// many such runs, or zeros among them, for torch to be called.
std::vector<int64_t> contiguous_runs(const std::vector<const void*>& rows, int64_t bytes) {
  constexpr size_t most = 3;
  std::vector<int64_t> starts;
  const char* expected = nullptr;
  for (size_t k = 0; k < rows.size(); ++k) {
    const char* row = static_cast<const char*>(rows[k]);
    if (row == nullptr) return {};
    if (k == 0 || row != expected) starts.push_back(static_cast<int64_t>(k));
    if (starts.size() > most) return {};
    expected = row + bytes;
  }
  starts.push_back(static_cast<int64_t>(rows.size()));
  return starts;
}

// Whether torch made the gradient: it cannot where rows lie far apart.
bool torch_made(const Tensor& a, const WeightGrad& grad, bool add) {
  Tensor out = grad.out;
  const int64_t M = out.size(0), N = out.size(1);
  const std::vector<int64_t> starts = contiguous_runs(grad.rows, N * static_cast<int64_t>(a.element_size()));
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    const int64_t first = starts[s], count = starts[s + 1] - first;
    const int64_t sizes[] = {count, N}, strides[] = {N, 1};
    using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
    const Tensor b = torch::stable::from_blob(const_cast<void*>(grad.rows[first]), Ints(sizes, 2),
                                              Ints(strides, 2), a.device(), a.scalar_type());
    torch_gemm_tn(view(a, {count, M}, {a.stride(0), 1}, first * a.stride(0)), b, out, add || s > 0);
  }
  return !starts.empty();
}

// Whether a GEMM is large enough that how it is called does not matter.
bool large(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t multiply_adds = int64_t{1} << 22;
  return M * N * K >= multiply_adds && N >= 64 && M >= 64;
}

// Whether torch's way is the faster one by so much that it makes up for what it costs around the product: a
// projection is written and read again, what two products share is packed for each, and sums are made apart.
// Both ways take turns, so that what else the machine does falls on both.
template <class Ours, class Theirs>
bool torch_pays(Ours ours, Theirs theirs) {
  constexpr double worth = 0.85;
  constexpr int turns = 5;
  double least[2] = {1e9, 1e9};
  const auto time = [](const auto& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  ours(), theirs();
  for (int k = 0; k < turns; ++k) {
    least[0] = std::min(least[0], time(ours));
    least[1] = std::min(least[1], time(theirs));
  }
  return least[1] < worth * least[0];
}

enum class Kind { gemm_nt, gemm_tn };

// Times both ways on a GEMM of 256 x 256 x 384: some milliseconds, once.
bool measure(Kind kind, const Tensor& like) {
  constexpr int64_t M = 384, N = 256, K = 256;
  const Tensor a = torch::stable::full({M, K}, 0.5, like.scalar_type());
  const Tensor w = torch::stable::full({N, K}, 0.5, like.scalar_type());
  Tensor out = zeros({kind == Kind::gemm_tn ? K : M, N}, like.scalar_type());
  if (kind == Kind::gemm_nt) {
    const auto own = engine().gemm_nt(dtype_of(like), N, K, w.const_data_ptr(), true, workers());
    const Tensor w_t = transpose(w);
    return torch_pays([&] { own->run(M, a.const_data_ptr(), K, out.mutable_data_ptr(), N, true, workers()); },
                      [&] { torch_mm(a, w_t, out); });
  }
  std::vector<const void*> rows(M);
  const int64_t bytes = N * bytes_of(dtype_of(like));
  const Tensor b = torch::stable::full({M, N}, 0.5, like.scalar_type());
  for (int64_t k = 0; k < M; ++k) rows[k] = static_cast<const char*>(b.const_data_ptr()) + k * bytes;
  const WeightGrad grad{rows, out};
  return torch_pays([&] { own_gemm_tn(a, {&grad}, {}, true); }, [&] { torch_gemm_tn(a, b, out, true); });
}

// For float32 and float64; half types are multiplied in float32, which torch does not offer.
template <Kind kind>
bool torch_is_faster(const Tensor& like) {
  if (dtype_of(like) == Dtype::f64) {
    static const bool faster = measure(kind, like);
    return faster;
  }
  static const bool faster = measure(kind, like);
  return faster;
}

}  // namespace

bool torch_multiplies(const Tensor& w, int64_t M, int64_t N, int64_t K) {
  return torch_fits_the_cpus() && !is_half(dtype_of(w)) && large(M, N, K) &&
         torch_is_faster<Kind::gemm_nt>(w);
}

PackedGemm::PackedGemm(const Tensor& w, bool nn, int64_t rows, bool pack) : w_(w), nn_(nn) {
  const int64_t K = w.size(nn ? 0 : 1), N = w.size(nn ? 1 : 0);
  if (torch_multiplies(w, rows, N, K)) return;
  const Dtype dtype = dtype_of(w);
  own_ = nn ? engine().gemm_nn(dtype, N, K, w.const_data_ptr(), pack, workers())
            : engine().gemm_nt(dtype, N, K, w.const_data_ptr(), pack, workers());
}

void PackedGemm::run(const Tensor& a, Tensor& out) const {
  if (own_ == nullptr) {
    torch_mm(a, nn_ ? w_ : transpose(w_), out);
    return;
  }
  own_->run(a.size(0), a.const_data_ptr(), a.stride(0), out.mutable_data_ptr(), out.stride(0),
            out.scalar_type() == opmath_type(dtype_of(a)), workers());
}

void gemm_tn(const Tensor& a, const std::vector<WeightGrad>& grads, const OptionalTensor& sum, bool add) {
  const bool torch_may = torch_fits_the_cpus() && !is_half(dtype_of(a));
  std::vector<const WeightGrad*> ours;
  for (const WeightGrad& grad : grads) {
    if (torch_may && large(grad.out.size(0), grad.out.size(1), a.size(0)) &&
        torch_is_faster<Kind::gemm_tn>(a) && torch_made(a, grad, add))
      continue;
    ours.push_back(&grad);
  }
  if (!ours.empty() || sum.has_value()) own_gemm_tn(a, ours, sum, add);
}

}  // namespace rnnkit
