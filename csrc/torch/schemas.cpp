// The operators of the extension: their schemas and registration, for torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include "../layer/cpu_limit.h"
#include "schemas.h"

namespace rnnkit {
namespace {

Cell checked_cell(int64_t cell) {
  if (cell < 0 || cell >= cell_count) unknown_cell(cell);
  return static_cast<Cell>(cell);
}

LayerInputs inputs(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0, Tensor w_ih, Tensor w_hh,
                   OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor lengths,
                   OptionalTensor reset, OptionalTensor h_r, OptionalTensor c_r, bool reverse) {
  LayerInputs in;
  in.cell = checked_cell(cell), in.reverse = reverse;
  in.x = x, in.w_ih = w_ih, in.w_hh = w_hh;
  in.h_0 = h_0, in.c_0 = c_0, in.b_ih = b_ih, in.b_hh = b_hh, in.w_hr = w_hr;
  in.lengths = lengths, in.reset = reset, in.h_r = h_r, in.c_r = c_r;
  return in;
}

// [B, T, .] as [T, B, .] and back, where batch_first.
Tensor transpose_batch(const Tensor& v, bool batch_first) {
  RNNKIT_CHECK(v.dim() == 3, "x and y must have 3 dimensions, got ", shown(v.sizes()));
  if (!batch_first) return v;
  return view(v, {v.size(1), v.size(0), v.size(2)}, {v.stride(1), v.stride(0), v.stride(2)}, 0);
}

// A module's states of one layer [1, B, width] as [B, width], and back.
OptionalTensor drop_layer_dim(const OptionalTensor& v) {
  if (!v.has_value()) return std::nullopt;
  RNNKIT_CHECK(v->dim() == 3 && v->size(0) == 1, "a state must be [1, B, .], got ", shown(v->sizes()));
  return view(*v, {v->size(1), v->size(2)}, {v->stride(1), v->stride(2)}, 0);
}
Tensor add_layer_dim(const Tensor& v) {
  const int64_t B = v.size(0), N = v.size(1);
  return view(v, {1, B, N}, {B * N, v.stride(0), v.stride(1)}, 0);
}

LayerInputs single(int64_t cell, const Tensor& x, const OptionalTensor& h_0, const OptionalTensor& c_0,
                   Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, bool batch_first) {
  return inputs(cell, transpose_batch(x, batch_first), drop_layer_dim(h_0), drop_layer_dim(c_0), w_ih, w_hh,
                b_ih, b_hh, {}, {}, {}, {}, {}, false);
}

}  // namespace

std::vector<Tensor> cpu_layer_forward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                      Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                      OptionalTensor w_hr, OptionalTensor lengths, OptionalTensor reset,
                                      OptionalTensor h_r, OptionalTensor c_r, bool reverse, bool all_states,
                                      bool save, int64_t chunk_steps) {
  return layer_forward(
      inputs(cell, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, h_r, c_r, reverse), all_states,
      save, chunk_steps);
}

std::vector<Tensor> cpu_layer_backward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                       Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                       OptionalTensor w_hr, OptionalTensor lengths, OptionalTensor reset,
                                       OptionalTensor h_r, OptionalTensor c_r, bool reverse, Tensor y,
                                       OptionalTensor gates, OptionalTensor c_kept, OptionalTensor gy,
                                       OptionalTensor gh_n, OptionalTensor gc_n, OptionalTensor gc_all,
                                       int64_t needs) {
  return layer_backward(
      inputs(cell, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, h_r, c_r, reverse),
      LayerGradients{y, gates, c_kept, gy, gh_n, gc_n, gc_all}, needs);
}

std::vector<Tensor> cpu_single(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0, Tensor w_ih,
                               Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, bool batch_first,
                               bool save) {
  std::vector<Tensor> out =
      layer_forward(single(cell, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, batch_first), false, save, 0);
  out[0] = transpose_batch(out[0], batch_first);
  const size_t states = checked_cell(cell) == Cell::lstm ? 2 : 1;
  for (size_t k = 1; k <= states; ++k) out[k] = add_layer_dim(out[k]);
  return out;
}

std::vector<Tensor> cpu_single_backward(int64_t cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                        Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                        bool batch_first, Tensor y, OptionalTensor gates,
                                        OptionalTensor c_kept, OptionalTensor gy, OptionalTensor gh_n,
                                        OptionalTensor gc_n, int64_t needs) {
  if (gy.has_value()) gy = transpose_batch(*gy, batch_first);
  std::vector<Tensor> out = layer_backward(
      single(cell, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, batch_first),
      LayerGradients{
          transpose_batch(y, batch_first), gates, c_kept, gy, drop_layer_dim(gh_n), drop_layer_dim(gc_n), {}},
      needs);
  size_t k = 0;
  if ((needs & 1) != 0) out[k] = transpose_batch(out[k], batch_first), ++k;
  for (int bit : {1, 2}) {
    if ((needs >> bit & 1) != 0) out[k] = add_layer_dim(out[k]), ++k;
  }
  return out;
}

Tensor cpu_step(int64_t cell, Tensor x, OptionalTensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                OptionalTensor b_hh) {
  RNNKIT_CHECK(cell != static_cast<int64_t>(Cell::lstm), "an LSTM's step is cpu_lstm_step");
  return cell_step(checked_cell(cell), x, h, {}, w_ih, w_hh, b_ih, b_hh).first;
}

std::tuple<Tensor, Tensor> cpu_lstm_step(Tensor x, OptionalTensor h, OptionalTensor c, Tensor w_ih,
                                         Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh) {
  auto [h_new, c_new] = cell_step(Cell::lstm, x, h, c, w_ih, w_hh, b_ih, b_hh);
  return {h_new, *c_new};
}

namespace {

Tensor cpu_function(int64_t which, Tensor x) {
  const Dtype dtype = dtype_of(x);
  RNNKIT_CHECK(which == 0 || which == 1, "which must be 0 (sigmoid) or 1 (tanh), got ", which);
  RNNKIT_CHECK(x.is_cpu() && x.is_contiguous() && !is_half(dtype),
               "x must be contiguous Float or Double on the CPU");
  Tensor out = torch::stable::empty_like(x);
  engine().function(static_cast<int>(which), dtype, x.numel(), x.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

std::string cpu_variants() {
  cpu_limits();  // a wrong RNNKIT_CPU_THREADS speaks here, before a layer runs
  std::string names = engine().name;
  for (const Engine* e : engines()) {
    names += " ";
    names += e->name;
  }
  return names;
}

// Pairs of a name and a number, 0 for no limit.
std::string cpu_workers() {
  const CpuLimits limits = cpu_limits();
  const auto number = [](int64_t limit) { return std::to_string(limit == no_limit ? 0 : limit); };
  return "workers " + number(workers().threads) + " torch " + number(torch::stable::get_num_threads()) +
         " affinity " + number(limits.affinity) + " quota " + number(limits.quota) + " asked " +
         number(limits.asked);
}

int64_t cpu_quota(std::string root) {
  const int64_t cpus = quota_cpus(root);
  return cpus == no_limit ? 0 : cpus;
}

}  // namespace
}  // namespace rnnkit

// A fragment: Python defines operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(rnnkit, m) {
#define RNNKIT_LAYER                                                                                     \
  "int cell, Tensor x, Tensor? h_0, Tensor? c_0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, " \
  "Tensor? w_hr, Tensor? lengths, Tensor? reset, Tensor? h_r, Tensor? c_r, bool reverse"
  m.def("cpu_layer_forward(" RNNKIT_LAYER ", bool all_states, bool save, int chunk) -> Tensor[]");
  m.def("cpu_layer_backward(" RNNKIT_LAYER
        ", Tensor y, Tensor? gates, Tensor? c, Tensor? gy, Tensor? gh_n, Tensor? gc_n, Tensor? gc_all, int "
        "needs) -> "
        "Tensor[]");
  m.def(
      "cpu_step(int cell, Tensor x, Tensor? h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> "
      "Tensor");
  m.def(
      "cpu_lstm_step(Tensor x, Tensor? h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) "
      "-> "
      "(Tensor, Tensor)");
  m.def("cpu_function(int which, Tensor x) -> Tensor");
  m.def("cpu_variants() -> str");
  m.def("cpu_workers() -> str");
  m.def("cpu_quota(str root) -> int");
#undef RNNKIT_LAYER
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, CPU, m) {
  m.impl("cpu_layer_forward", TORCH_BOX(&rnnkit::cpu_layer_forward));
  m.impl("cpu_layer_backward", TORCH_BOX(&rnnkit::cpu_layer_backward));
  m.impl("cpu_step", TORCH_BOX(&rnnkit::cpu_step));
  m.impl("cpu_lstm_step", TORCH_BOX(&rnnkit::cpu_lstm_step));
  m.impl("cpu_function", TORCH_BOX(&rnnkit::cpu_function));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, CompositeExplicitAutograd, m) {
  m.impl("cpu_variants", TORCH_BOX(&rnnkit::cpu_variants));
  m.impl("cpu_workers", TORCH_BOX(&rnnkit::cpu_workers));
  m.impl("cpu_quota", TORCH_BOX(&rnnkit::cpu_quota));
}
