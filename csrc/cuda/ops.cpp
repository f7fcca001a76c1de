// The operators of the CUDA kernels, for torch's stable ABI: checks of every tensor, torch's stream, memory
// for the workspace, and the kernel of the name that is given. Compiled only with the kernels
// (RNNKIT_CUDA=1), and without CUDA: the library loads in a torch that has none, and says there what is
// missing.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string_view>

#include "../layer/tensors.h"
#include "probes.h"
#include "scan.h"

namespace rnnkit {
namespace {

struct CellFacts {
  std::string_view name;
  int64_t gates, saved;  // blocks of H: in gx, and of those that the forward saves
  bool has_c, reset_after;
};
constexpr CellFacts cells[] = {
    {"rnn", 1, 0, false, false},
    {"lstm", 4, 4, true, false},
    {"gru", 3, 4, false, true},
    {"gru_reset_before", 3, 3, false, false},
};

struct KindFacts {
  std::string_view name;
  ScalarType stored, computed;
};
constexpr KindFacts kinds[] = {
    {"bf16", ScalarType::BFloat16, ScalarType::Float}, {"fp16", ScalarType::Half, ScalarType::Float},
    {"tf32", ScalarType::Float, ScalarType::Float},    {"ieee", ScalarType::Float, ScalarType::Float},
    {"f64", ScalarType::Double, ScalarType::Double},
};

// A row's name is regime_cell_kind_size, and a cell's name may have an underscore of its own.
std::string_view cell_of(std::string_view name) {
  const size_t first = name.find('_'), last = name.rfind('_');
  const size_t kind = last == name.npos || last == 0 ? name.npos : name.rfind('_', last - 1);
  return kind == name.npos || kind <= first ? std::string_view() : name.substr(first + 1, kind - first - 1);
}
std::string_view kind_of(std::string_view name) {
  const size_t last = name.rfind('_');
  return name.substr(0, last).substr(name.substr(0, last).rfind('_') + 1);
}

// The names of the kernels, those of one cell where it is named.
std::string names(std::string_view cell = {}) {
  std::string found;
  for (const cuda::Kernel* k = cuda::kernels; k != nullptr; k = k->next) {
    if (!cell.empty() && cell_of(k->name) != cell) continue;
    found += (found.empty() ? "" : " ") + std::string(k->name);
  }
  return found;
}

// A kernel and what its name says.
struct NamedKernel {
  const cuda::Kernel* kernel = nullptr;
  const CellFacts* cell = nullptr;
  const KindFacts* kind = nullptr;
};

NamedKernel find_kernel(const std::string& name) {
  NamedKernel chosen;
  chosen.kernel = cuda::find(name.c_str());
  for (const CellFacts& cell : cells) {
    if (cell.name == cell_of(name)) chosen.cell = &cell;
  }
  for (const KindFacts& kind : kinds) {
    if (kind.name == kind_of(name)) chosen.kind = &kind;
  }
  if (chosen.kernel == nullptr || chosen.cell == nullptr || chosen.kind == nullptr) {
    const std::string there = names(chosen.cell == nullptr ? std::string_view() : chosen.cell->name);
    fail("kernel ", name, " is not in this build of the extension; it has ", there.empty() ? "none" : there);
  }
  return chosen;
}

// The tensors of a call: each is checked for what it is when it is named, and all of them at the end for
// where they lie, so that what is wrong with a shape is said on any device.
class CheckedTensors {
 public:
  CheckedTensors(const Tensor& first, const char* name, const KindFacts& kind)
      : first_(name), index_(first.get_device_index()), kind_(kind) {}

  const void* in(const Tensor& v, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
    note(v, name, type, sizes);
    return v.const_data_ptr();
  }
  const void* in(const Tensor& v, const char* name, std::initializer_list<int64_t> sizes) {
    return in(v, name, kind_.stored, sizes);
  }
  const void* in(const OptionalTensor& v, const char* name, std::initializer_list<int64_t> sizes) {
    return v.has_value() ? in(*v, name, sizes) : nullptr;
  }
  void* out(const Tensor& v, const char* name, std::initializer_list<int64_t> sizes) {
    note(v, name, kind_.stored, sizes);
    return v.mutable_data_ptr();
  }
  void* out(const OptionalTensor& v, const char* name, std::initializer_list<int64_t> sizes) {
    return v.has_value() ? out(*v, name, sizes) : nullptr;
  }
  // In the type that is stored or in the one that is computed in.
  cuda::State state(const OptionalTensor& v, const char* name, int64_t B, int64_t width) {
    if (!v.has_value()) return {nullptr, false};
    const bool opmath = v->scalar_type() == kind_.computed;
    note(*v, name, opmath ? kind_.computed : kind_.stored, {B, width});
    return {const_cast<void*>(v->const_data_ptr()), opmath};
  }
  cuda::State written(const OptionalTensor& v, const char* name, int64_t B, int64_t width) {
    const bool opmath = state(v, name, B, width).opmath;
    return {v.has_value() ? v->mutable_data_ptr() : nullptr, opmath};
  }

  // All on one GPU, in memory of their own. Gives its index.
  int32_t device() const {
    RNNKIT_CHECK(misplaced_.empty(), misplaced_);
    return index_;
  }

 private:
  void note(const Tensor& v, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
    check_kind(v, name, type, sizes);
    RNNKIT_CHECK(v.is_contiguous(), name, " must be contiguous, got strides ", shown(v.strides()), " for ",
                 shown(v.sizes()));
    if (!misplaced_.empty()) return;
    std::ostringstream why;
    if (!v.is_cuda()) {
      why << name << " must be on a GPU, got " << (v.is_cpu() ? "the CPU" : "another kind of device");
    } else if (v.get_device_index() != index_) {
      why << name << " must be on the GPU of " << first_ << ", number " << index_ << ", got number "
          << v.get_device_index();
    } else if (v.numel() != 0 && v.const_data_ptr() == nullptr) {
      throw NoMemory();
    }
    misplaced_ = why.str();
  }

  const char* first_;
  int32_t index_;
  const KindFacts& kind_;
  std::string misplaced_;  // what is said of the first tensor on another device
};

void want(const OptionalTensor& v, bool wanted, const char* name, const char* when) {
  RNNKIT_CHECK(v.has_value() || !wanted, name, " must be given ", when);
  RNNKIT_CHECK(wanted || !v.has_value(), name, " must be None: it is given ", when, " alone");
}

// torch's current stream on a GPU. The function is looked up, since a torch without CUDA does not have it.
cuda::Stream current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  RNNKIT_CHECK(function != nullptr,
               "this torch is built without CUDA, and the CUDA kernels run on its streams");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// What both passes have, in the structure of one.
struct Shared {
  bool reverse, relu;
  const OptionalTensor &w_hr, &c_0, &lengths, &reset, &h_r, &c_r;
};

void fill(cuda::Sequence& s, CheckedTensors& tensors, const NamedKernel& chosen, const Shared& v,
          const Tensor& h_0, int64_t t0) {
  const bool projects = v.w_hr.has_value();
  s.reverse = v.reverse, s.relu = v.relu, s.t0 = t0;
  RNNKIT_CHECK(t0 >= 0, "t0 must be at least 0, got ", t0);
  RNNKIT_CHECK(!v.relu || chosen.cell->name == "rnn", "relu is an RNN's, got the kernel ",
               chosen.kernel->name);
  RNNKIT_CHECK(!projects || chosen.cell->has_c, "only an LSTM has a projection, got the kernel ",
               chosen.kernel->name);
  RNNKIT_CHECK(projects || s.N == s.H, "without a projection the weights must be those of ", s.H,
               " units on both sides, got ", s.N, " on one");
  want(v.c_0, chosen.cell->has_c, "c_0", "for an LSTM");
  s.lengths = nullptr, s.reset = nullptr, s.b_hn = nullptr, s.workspace = nullptr, s.total = t0 + s.n;
  if (v.lengths.has_value()) {
    s.lengths = static_cast<const int64_t*>(tensors.in(*v.lengths, "lengths", ScalarType::Long, {s.B}));
  }
  if (v.reset.has_value()) {
    RNNKIT_CHECK(v.reset->dim() == 2 && v.reset->size(0) >= s.total, "reset must be [T, ", s.B,
                 "] with a T of at least ", s.total, " steps, got ", shown(v.reset->sizes()));
    s.total = v.reset->size(0);
    s.reset = static_cast<const bool*>(tensors.in(*v.reset, "reset", ScalarType::Bool, {s.total, s.B}));
  }
  s.h_0 = tensors.state(h_0, "h_0", s.B, s.N), s.c_0 = tensors.state(v.c_0, "c_0", s.B, s.H);
  s.h_r = tensors.state(v.h_r, "h_r", s.B, s.N), s.c_r = tensors.state(v.c_r, "c_r", s.B, s.H);
}

// Memory beside `like`; none where there is no need.
OptionalTensor workspace(const Tensor& like, int64_t bytes) {
  return bytes == 0 ? std::nullopt
                    : OptionalTensor(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
}

void dimensions(const Tensor& v, const char* name, int64_t wanted) {
  RNNKIT_CHECK(v.dim() == wanted, name, " must have ", wanted, " dimensions, got ", shown(v.sizes()));
}

void cuda_scan_forward(std::string kernel, int64_t t0, bool reverse, bool relu, Tensor gx, Tensor w_hh,
                       OptionalTensor w_hr, OptionalTensor b_hn, Tensor h_0, OptionalTensor c_0,
                       OptionalTensor lengths, OptionalTensor reset, OptionalTensor h_r, OptionalTensor c_r,
                       Tensor y, Tensor h_n, OptionalTensor c_n, OptionalTensor c_all, OptionalTensor gates) {
  const NamedKernel chosen = find_kernel(kernel);
  const CellFacts& cell = *chosen.cell;
  dimensions(gx, "gx", 3), dimensions(w_hh, "w_hh", 2);
  cuda::Forward f = {};
  f.n = gx.size(0), f.B = gx.size(1), f.H = w_hh.size(0) / cell.gates, f.N = w_hh.size(1);
  const int64_t n = f.n, B = f.B, H = f.H, N = f.N, G = cell.gates;
  CheckedTensors tensors(gx, "gx", *chosen.kind);
  f.gx = tensors.in(gx, "gx", {n, B, G * H});
  f.w_hh = tensors.in(w_hh, "w_hh", {G * H, N});
  f.w_hr = tensors.in(w_hr, "w_hr", {N, H});
  fill(f, tensors, chosen, {reverse, relu, w_hr, c_0, lengths, reset, h_r, c_r}, h_0, t0);
  RNNKIT_CHECK(!b_hn.has_value() || cell.reset_after, "b_hn is for a GRU with reset after, got the kernel ",
               kernel);
  want(c_n, cell.has_c, "c_n", "for an LSTM");
  RNNKIT_CHECK(cell.has_c || !c_all.has_value(), "c_all is an LSTM's, got the kernel ", kernel);
  RNNKIT_CHECK(cell.saved != 0 || !gates.has_value(), "an RNN saves no gates, and gates were given");
  f.b_hn = tensors.in(b_hn, "b_hn", {H});
  f.y = tensors.out(y, "y", {n, B, N});
  f.h_n = tensors.written(h_n, "h_n", B, N), f.c_n = tensors.written(c_n, "c_n", B, H);
  f.c_all = tensors.out(c_all, "c_all", {n, B, H});
  f.gates = tensors.out(gates, "gates", {n, B, cell.saved * H});
  const torch::stable::accelerator::DeviceGuard guard(tensors.device());
  const OptionalTensor memory = workspace(gx, chosen.kernel->forward_bytes(f));
  f.workspace = memory.has_value() ? memory->mutable_data_ptr() : nullptr;
  chosen.kernel->forward(f, current_stream(tensors.device()));
}

void cuda_scan_backward(std::string kernel, bool reverse, bool relu, Tensor w_t, OptionalTensor w_hr_t,
                        Tensor h_0, OptionalTensor c_0, OptionalTensor lengths, OptionalTensor reset,
                        OptionalTensor h_r, OptionalTensor c_r, OptionalTensor gy, OptionalTensor gh_n,
                        OptionalTensor gc_n, OptionalTensor gc_all, Tensor y, OptionalTensor c_all,
                        OptionalTensor gates, Tensor dgx, Tensor dgh, OptionalTensor dp, Tensor dh_0,
                        OptionalTensor dc_0, OptionalTensor dh_r, OptionalTensor dc_r) {
  const NamedKernel chosen = find_kernel(kernel);
  const CellFacts& cell = *chosen.cell;
  dimensions(y, "y", 3), dimensions(w_t, "w_t", 2);
  cuda::Backward b = {};
  b.n = y.size(0), b.B = y.size(1), b.H = w_t.size(1) / cell.gates, b.N = w_t.size(0);
  const int64_t n = b.n, B = b.B, H = b.H, N = b.N, G = cell.gates;
  CheckedTensors tensors(y, "y", *chosen.kind);
  b.y = tensors.in(y, "y", {n, B, N});
  b.w_t = tensors.in(w_t, "w_t", {N, G * H});
  b.w_hr_t = tensors.in(w_hr_t, "w_hr_t", {H, N});
  fill(b, tensors, chosen, {reverse, relu, w_hr_t, c_0, lengths, reset, h_r, c_r}, h_0, 0);
  RNNKIT_CHECK(b.total == n, "reset must be [", n, ", ", B, "], got ", b.total, " steps");
  want(c_all, cell.has_c, "c_all", "for an LSTM");
  want(gates, cell.saved != 0, "gates", "for every cell but an RNN");
  want(dp, w_hr_t.has_value(), "dp", "with a projection");
  want(dc_0, cell.has_c, "dc_0", "for an LSTM");
  want(dh_r, reset.has_value(), "dh_r", "with a reset");
  want(dc_r, reset.has_value() && cell.has_c, "dc_r", "for an LSTM with a reset");
  RNNKIT_CHECK(cell.has_c || !(gc_n.has_value() || gc_all.has_value()),
               "gc_n and gc_all are an LSTM's, got the kernel ", kernel);
  b.c_all = tensors.in(c_all, "c_all", {n, B, H});
  b.gates = tensors.in(gates, "gates", {n, B, cell.saved * H});
  b.gy = tensors.in(gy, "gy", {n, B, N});
  b.gc_all = tensors.in(gc_all, "gc_all", {n, B, H});
  b.gh_n = tensors.state(gh_n, "gh_n", B, N), b.gc_n = tensors.state(gc_n, "gc_n", B, H);
  b.dgx = tensors.out(dgx, "dgx", {n, B, G * H});
  b.dgh = tensors.out(dgh, "dgh", {n, B, G * H});
  RNNKIT_CHECK(dgx.numel() == 0 || (b.dgh == b.dgx) != cell.reset_after,
               "dgh must be dgx itself, but for a GRU with reset after memory of its own; got the kernel ",
               kernel);
  b.dp = tensors.out(dp, "dp", {n, B, N});
  b.dh_0 = tensors.written(dh_0, "dh_0", B, N), b.dc_0 = tensors.written(dc_0, "dc_0", B, H);
  b.dh_r = tensors.written(dh_r, "dh_r", B, N), b.dc_r = tensors.written(dc_r, "dc_r", B, H);
  const torch::stable::accelerator::DeviceGuard guard(tensors.device());
  const OptionalTensor memory = workspace(y, chosen.kernel->backward_bytes(b));
  b.workspace = memory.has_value() ? memory->mutable_data_ptr() : nullptr;
  chosen.kernel->backward(b, current_stream(tensors.device()));
}

std::string cuda_kernels() { return names(); }

double cuda_probe(std::string what, int64_t size) {
  current_stream(0);  // or why there is none
  const int32_t device = torch::stable::accelerator::getCurrentDeviceIndex();
  return cuda::probe(what.c_str(), size, current_stream(device));
}

#define RNNKIT_TEXT_OF(...) #__VA_ARGS__
#define RNNKIT_TEXT(...) RNNKIT_TEXT_OF(__VA_ARGS__)

// The toolkit, like 13.0, and the chips, with blanks between.
std::string cuda_built() {
  std::string text = RNNKIT_TEXT(RNNKIT_CUDA_BUILT);
  std::replace(text.begin(), text.end(), ',', ' ');
  return text;
}

}  // namespace
}  // namespace rnnkit

STABLE_TORCH_LIBRARY_FRAGMENT(rnnkit, m) {
  m.def(
      "cuda_scan_forward(str kernel, int t0, bool reverse, bool relu, Tensor gx, Tensor w_hh, Tensor? w_hr, "
      "Tensor? b_hn, Tensor h_0, Tensor? c_0, Tensor? lengths, Tensor? reset, Tensor? h_r, Tensor? c_r, "
      "Tensor(a!) y, Tensor(b!) h_n, Tensor(c!)? c_n, Tensor(d!)? c_all, Tensor(e!)? gates) -> ()");
  m.def(
      "cuda_scan_backward(str kernel, bool reverse, bool relu, Tensor w_t, Tensor? w_hr_t, Tensor h_0, "
      "Tensor? c_0, Tensor? lengths, Tensor? reset, Tensor? h_r, Tensor? c_r, Tensor? gy, Tensor? gh_n, "
      "Tensor? gc_n, Tensor? gc_all, Tensor y, Tensor? c_all, Tensor? gates, Tensor(a!) dgx, Tensor(b!) dgh, "
      "Tensor(c!)? dp, Tensor(d!) dh_0, Tensor(e!)? dc_0, Tensor(f!)? dh_r, Tensor(g!)? dc_r) -> ()");
  m.def("cuda_kernels() -> str");
  m.def("cuda_built() -> str");
  m.def("cuda_probe(str what, int size) -> float");
}

// For every device, so that a tensor elsewhere meets our words.
STABLE_TORCH_LIBRARY_IMPL(rnnkit, CompositeExplicitAutograd, m) {
  m.impl("cuda_scan_forward", TORCH_BOX(&rnnkit::cuda_scan_forward));
  m.impl("cuda_scan_backward", TORCH_BOX(&rnnkit::cuda_scan_backward));
  m.impl("cuda_kernels", TORCH_BOX(&rnnkit::cuda_kernels));
  m.impl("cuda_built", TORCH_BOX(&rnnkit::cuda_built));
  m.impl("cuda_probe", TORCH_BOX(&rnnkit::cuda_probe));
}
