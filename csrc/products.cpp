// The large products around a scan: torch's, the package's own, whichever is faster on this processor by a
// measurement made once in a process.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <unistd.h>

#include "tensors.h"

namespace rnnkit {
namespace {

const pid_t loaded_by = getpid();

Tensor turned(const Tensor& m) { return view(m, {m.size(1), m.size(0)}, {m.stride(1), m.stride(0)}, 0); }

void mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace

Tensor view(const Tensor& of, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
            int64_t offset) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(of.get(), static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                               strides.begin(), offset, &made));
  return Tensor(made);
}

int64_t threads() { return getpid() == loaded_by ? torch::stable::get_num_threads() : 1; }

void in_parallel(int64_t parts, void* context, void (*body)(void* context, int64_t first, int64_t last)) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
}

Projection::Projection(const Tensor& w, int64_t rows) : w_(w) {
  const Dtype dtype = dtype_of(w);
  if (!is_half(dtype)) {
    own_ = engine().product(dtype, w.size(0), w.size(1), w.const_data_ptr(), rows > 2);
  }
}

void Projection::run(const Tensor& x, Tensor& out) const {
  if (own_ != nullptr) {
    own_->run(x.size(0), x.const_data_ptr(), out.mutable_data_ptr(), out.stride(0), threads(), &in_parallel);
  } else {
    mm_out(x, turned(w_), out);
  }
}

void outer(const Tensor& a, const Tensor& b, Tensor& out, bool add) {
  const Tensor left = turned(a);
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), b.get(), 1.0, 1.0));
  } else {
    mm_out(left, b, out);
  }
}

void multiply(const Tensor& a, const Tensor& b, Tensor& out) { mm_out(a, b, out); }

void sum_rows(const Tensor& a, Tensor& out) {
  const int64_t dims[] = {0};
  torch::stable::sum_out(out, a, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
}

}  // namespace rnnkit
