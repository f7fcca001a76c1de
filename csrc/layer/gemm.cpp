// The large products around a scan: the package's own, or torch's where a measurement, made once in a process
// for each kind of product and dtype, finds them faster on this processor.

#include <pthread.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "tensors.h"

namespace rnnkit {
namespace {

// After this library was loaded. Torch's own products would then wait for the parent's threads.
bool forked = false;
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Tensor turned(const Tensor& m) { return view(m, {m.size(1), m.size(0)}, {m.stride(1), m.stride(0)}, 0); }

void torch_rows_times(const Tensor& a, const Tensor& w, Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), w.get()));
}

// out += a^T b, = where not `add`
void torch_outer(const Tensor& a, const Tensor& b, Tensor& out, bool add) {
  const Tensor left = turned(a);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

void own_outer(const Tensor& a, const std::vector<const void*>& rows, const Tensor& out,
               const OptionalTensor& sum, bool add) {
  Outer q{};
  q.dtype = dtype_of(a);
  q.add = add;
  q.M = a.size(1), q.N = out.size(1), q.K = a.size(0);
  q.a = a.const_data_ptr();
  q.lda = a.stride(0);
  q.rows = rows.data();
  q.out = out.mutable_data_ptr();
  q.ldo = out.stride(0);
  q.sum = sum.has_value() ? sum->mutable_data_ptr() : nullptr;
  q.workers = workers();
  engine().outer(q);
}

// Where rows that follow one another in memory begin, and their number at the end; empty where there are too
// many such stretches, or zeros among them, for torch to be called.
std::vector<int64_t> stretches(const std::vector<const void*>& rows, int64_t bytes) {
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

void torch_outer_of(const Tensor& a, const std::vector<const void*>& rows, const std::vector<int64_t>& starts,
                    const Tensor& out, bool add) {
  Tensor into = out;
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    const int64_t first = starts[s], count = starts[s + 1] - first, N = out.size(1);
    const int64_t sizes[] = {count, N}, strides[] = {N, 1};
    using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
    const Tensor b = torch::stable::from_blob(const_cast<void*>(rows[first]), Ints(sizes, 2),
                                              Ints(strides, 2), a.device(), a.scalar_type());
    torch_outer(view(a, {count, a.size(1)}, {a.stride(0), 1}, first * a.stride(0)), b, into, add || s > 0);
  }
}

// Whether a product is large enough that how it is called does not matter.
bool large(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t multiply_adds = int64_t{1} << 22;
  return M * N * K >= multiply_adds && N >= 64 && M >= 64;
}

template <class Run>
double seconds(Run run) {
  run();
  double best = 1e9;
  for (int k = 0; k < 5; ++k) {
    const auto start = std::chrono::steady_clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

enum class Kind { rows_times, outer };

// Times both ways on a product of 256 x 256 x 384: some milliseconds, once.
bool measure(Kind kind, const Tensor& like) {
  constexpr int64_t M = 384, N = 256, K = 256;
  const Tensor a = torch::stable::full({M, K}, 0.5, like.scalar_type());
  const Tensor w = torch::stable::full({N, K}, 0.5, like.scalar_type());
  Tensor out = zeros({kind == Kind::outer ? K : M, N}, like.scalar_type());
  if (kind == Kind::rows_times) {
    const auto own = engine().by_rows(dtype_of(like), N, K, w.const_data_ptr(), true, workers());
    const double ours =
        seconds([&] { own->run(M, a.const_data_ptr(), K, out.mutable_data_ptr(), N, true, workers()); });
    const Tensor w_t = turned(w);
    return seconds([&] { torch_rows_times(a, w_t, out); }) < 0.95 * ours;
  }
  std::vector<const void*> rows(M);
  const int64_t bytes = N * bytes_of(dtype_of(like));
  const Tensor b = torch::stable::full({M, N}, 0.5, like.scalar_type());
  for (int64_t k = 0; k < M; ++k) rows[k] = static_cast<const char*>(b.const_data_ptr()) + k * bytes;
  const double ours = seconds([&] { own_outer(a, rows, out, {}, true); });
  return seconds([&] { torch_outer(a, b, out, true); }) < 0.95 * ours;
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

int32_t number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

}  // namespace

// By torch's C interface: torch::stable::new_empty goes by the dispatcher, at three times the price.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[d]))
    strides[d] = stride;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), number_of(type),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  const Tensor memory(made);
  // Torch fills new memory with NaN only where its operators make it, so tests ask for the same here.
  static const bool fill = std::getenv("RNNKIT_FILL_NEW_MEMORY") != nullptr;
  const auto bytes = memory.numel() * static_cast<int64_t>(memory.element_size());
  if (fill && bytes > 0) std::memset(memory.mutable_data_ptr(), 0xff, bytes);
  return memory;
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType type) {
  const Tensor made = empty(sizes, type);
  const auto bytes = made.numel() * static_cast<int64_t>(made.element_size());
  if (bytes > 0) std::memset(made.mutable_data_ptr(), 0, bytes);
  return made;
}

Tensor view(const Tensor& of, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
            int64_t offset) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      of.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset, &made));
  return Tensor(made);
}

Workers workers() {
  RNNKIT_CHECK(watching_forks == 0, "pthread_atfork failed with error ", watching_forks);
  const int64_t threads = forked ? 1 : torch::stable::get_num_threads();
  return {threads, [](int64_t parts, void* context, void (*body)(void*, int64_t, int64_t)) {
            torch::stable::parallel_for(0, parts, 1,
                                        [&](int64_t first, int64_t last) { body(context, first, last); });
          }};
}

bool torch_multiplies(const Tensor& w, int64_t M, int64_t N, int64_t K) {
  return !forked && !is_half(dtype_of(w)) && large(M, N, K) && torch_is_faster<Kind::rows_times>(w);
}

RowsTimes::RowsTimes(const Tensor& w, bool by_columns, int64_t rows, bool pack)
    : w_(by_columns ? w : turned(w)) {
  const int64_t K = w_.size(0), N = w_.size(1);
  if (torch_multiplies(w, rows, N, K)) return;
  const Dtype dtype = dtype_of(w);
  own_ = by_columns ? engine().by_columns(dtype, N, K, w.const_data_ptr(), pack, workers())
                    : engine().by_rows(dtype, N, K, w.const_data_ptr(), pack, workers());
}

void RowsTimes::run(const Tensor& a, Tensor& out) const {
  if (own_ == nullptr) {
    torch_rows_times(a, w_, out);
    return;
  }
  own_->run(a.size(0), a.const_data_ptr(), a.stride(0), out.mutable_data_ptr(), out.stride(0),
            out.scalar_type() == wide(dtype_of(a)), workers());
}

void outer(const Tensor& a, const std::vector<const void*>& rows, const Tensor& out,
           const OptionalTensor& sum, bool add) {
  if (!forked && !is_half(dtype_of(a)) && large(a.size(1), out.size(1), a.size(0)) &&
      torch_is_faster<Kind::outer>(a)) {
    const std::vector<int64_t> starts = stretches(rows, out.size(1) * static_cast<int64_t>(a.element_size()));
    if (!starts.empty()) {
      torch_outer_of(a, rows, starts, out, add);
      if (sum.has_value()) own_outer(a, rows, view(out, {a.size(1), 0}, {1, 1}, 0), sum, add);
      return;
    }
  }
  own_outer(a, rows, out, sum, add);
}

}  // namespace rnnkit
