// The operators of the extension: their schemas and registration, for torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include <array>

#include "../cpu/program.h"
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

constexpr size_t before_weights = 7;  // x, h_0, c_0, lengths, reset, h_r, c_r

// `v`: those, and `weights` weights; it may go on.
StackInputs stack(int64_t cell, int64_t layers, int64_t directions, int64_t P, int64_t layout,
                  const std::vector<OptionalTensor>& v, size_t weights) {
  RNNKIT_CHECK(layout >= 0 && layout <= static_cast<int64_t>(Layout::step), "layout must lie in [0, 3], got ",
               layout);
  RNNKIT_CHECK(v[0].has_value(), "x must be given");
  StackInputs in;
  in.cell = checked_cell(cell), in.layers = layers, in.directions = directions, in.P = P;
  in.layout = static_cast<Layout>(layout);
  in.x = *v[0], in.h_0 = v[1], in.c_0 = v[2], in.lengths = v[3], in.reset = v[4], in.h_r = v[5],
  in.c_r = v[6];
  in.weights.reserve(weights);
  for (size_t k = before_weights; k < before_weights + weights; ++k) {
    RNNKIT_CHECK(v[k].has_value(), "weight ", k - before_weights, " must be given");
    in.weights.push_back(*v[k]);
  }
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
                                      std::string_view needs, const std::vector<OptionalTensor>& tensors,
                                      const std::vector<Tensor>& masks) {
  RNNKIT_CHECK(tensors.size() >= before_weights, "there must be ", before_weights,
               " tensors and weights, got ", tensors.size());
  return stack_forward(stack(cell, layers, directions, P, layout, tensors, tensors.size() - before_weights),
                       {all_states != 0, recompute != 0, dropout, needs}, masks);
}

std::vector<OptionalTensor> cpu_stack_backward(int64_t cell, int64_t layers, int64_t directions, int64_t P,
                                               int64_t layout, int64_t all_states, int64_t recompute,
                                               double dropout, std::string_view needs,
                                               const std::vector<OptionalTensor>& saved,
                                               const std::vector<OptionalTensor>& grads) {
  const size_t count = needs.size();
  RNNKIT_CHECK(count >= before_weights && saved.size() >= count,
               "needs must have a byte for each tensor, got ", count, " for ", saved.size(),
               " that are saved");
  StackInputs in = stack(cell, layers, directions, P, layout, saved, count - before_weights);
  StackGradients g;
  size_t next = count;
  if (reads_output(in)) {
    RNNKIT_CHECK(next < saved.size(), "y must be saved, as the forward gave it");
    g.y = saved[next++];
  }
  g.kept.reserve(saved.size() - next);
  for (; next < saved.size(); ++next) {
    RNNKIT_CHECK(saved[next].has_value(), "what is kept must be given, tensor ", next, " is not");
    g.kept.push_back(*saved[next]);
  }
  const bool has_y = in.layout != Layout::step, lstm = in.cell == Cell::lstm, all = all_states != 0;
  const std::array<std::pair<bool, OptionalTensor*>, 5> results{
      {{has_y, &g.gy}, {true, &g.gh_n}, {lstm, &g.gc_n}, {all, &g.gh_all}, {all && lstm, &g.gc_all}}};
  next = 0;
  for (const auto& [there, into] : results) {
    if (!there) continue;
    RNNKIT_CHECK(next < grads.size(), "each result must have its gradient or none, got ", grads.size());
    *into = grads[next++];
  }
  return stack_backward(std::move(in), {all, recompute != 0, dropout, needs}, g);
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

// The instructions of a program, in the order of their numbers.
std::string cpu_program_ops() {
  std::string names;
#define RNNKIT_OP(name) names += names.empty() ? #name : " " #name;
  RNNKIT_PROGRAM_OPS(RNNKIT_OP)
#undef RNNKIT_OP
  return names;
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
  m.def("cpu_program_ops() -> str");
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
  m.impl("cpu_program_ops", TORCH_BOX(&rnnkit::cpu_program_ops));
  m.impl("cpu_workers", TORCH_BOX(&rnnkit::cpu_workers));
  m.impl("cpu_quota", TORCH_BOX(&rnnkit::cpu_quota));
}
