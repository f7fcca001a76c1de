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

StackInputs stack(int64_t cell, int64_t layers, int64_t directions, int64_t P, int64_t layout, Tensor x,
                  OptionalTensor h_0, OptionalTensor c_0, OptionalTensor lengths, OptionalTensor reset,
                  OptionalTensor h_r, OptionalTensor c_r, std::vector<Tensor> weights) {
  RNNKIT_CHECK(layout >= 0 && layout <= static_cast<int64_t>(Layout::step), "layout must lie in [0, 3], got ",
               layout);
  StackInputs in;
  in.cell = checked_cell(cell), in.layers = layers, in.directions = directions, in.P = P;
  in.layout = static_cast<Layout>(layout);
  in.x = x, in.h_0 = h_0, in.c_0 = c_0, in.lengths = lengths, in.reset = reset, in.h_r = h_r, in.c_r = c_r;
  in.weights = std::move(weights);
  return in;
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

std::vector<Tensor> cpu_stack_forward(int64_t cell, int64_t layers, int64_t directions, int64_t P,
                                      int64_t layout, int64_t all_states, int64_t recompute, double dropout,
                                      std::string_view needs, Tensor x, OptionalTensor h_0,
                                      OptionalTensor c_0, OptionalTensor lengths, OptionalTensor reset,
                                      OptionalTensor h_r, OptionalTensor c_r, std::vector<Tensor> weights,
                                      std::vector<Tensor> masks) {
  return stack_forward(
      stack(cell, layers, directions, P, layout, x, h_0, c_0, lengths, reset, h_r, c_r, std::move(weights)),
      {all_states != 0, recompute != 0, dropout, needs}, std::move(masks));
}

std::vector<Tensor> cpu_stack_backward(int64_t cell, int64_t layers, int64_t directions, int64_t P,
                                       int64_t layout, int64_t all_states, int64_t recompute, double dropout,
                                       std::string_view needs, Tensor x, OptionalTensor h_0,
                                       OptionalTensor c_0, OptionalTensor lengths, OptionalTensor reset,
                                       OptionalTensor h_r, OptionalTensor c_r, std::vector<Tensor> weights,
                                       OptionalTensor y, std::vector<Tensor> kept, OptionalTensor gy,
                                       OptionalTensor gh_n, OptionalTensor gc_n, OptionalTensor gh_all,
                                       OptionalTensor gc_all) {
  return stack_backward(
      stack(cell, layers, directions, P, layout, x, h_0, c_0, lengths, reset, h_r, c_r, std::move(weights)),
      {all_states != 0, recompute != 0, dropout, needs},
      {y, std::move(kept), gy, gh_n, gc_n, gh_all, gc_all});
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
  usable_threads(true);  // so that it agrees with the limits
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
  m.def("cpu_function(int which, Tensor x) -> Tensor");
  m.def("cpu_variants() -> str");
  m.def("cpu_workers() -> str");
  m.def("cpu_quota(str root) -> int");
#undef RNNKIT_LAYER
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, CPU, m) {
  m.impl("cpu_layer_forward", TORCH_BOX(&rnnkit::cpu_layer_forward));
  m.impl("cpu_layer_backward", TORCH_BOX(&rnnkit::cpu_layer_backward));
  m.impl("cpu_function", TORCH_BOX(&rnnkit::cpu_function));
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, CompositeExplicitAutograd, m) {
  m.impl("cpu_variants", TORCH_BOX(&rnnkit::cpu_variants));
  m.impl("cpu_workers", TORCH_BOX(&rnnkit::cpu_workers));
  m.impl("cpu_quota", TORCH_BOX(&rnnkit::cpu_quota));
}
