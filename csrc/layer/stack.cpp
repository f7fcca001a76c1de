// A call layer by layer. The layers are those of forward.cpp and backward.cpp; what is here is what lies
// between them: layouts, the states of all layers in one tensor, both directions side by side, dropout.

#include "stack.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstring>

namespace rnnkit {
namespace {

// Operators of torch that are worth their call: many elements, any dtype, all threads.
template <class Call>
Tensor torch_result(Call call) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(call(&made));
  return Tensor(made);
}
Tensor add(const Tensor& a, const Tensor& b) {
  return torch_result([&](auto* made) { return aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1, made); });
}
Tensor multiply(const Tensor& a, const Tensor& b) {
  return torch_result([&](auto* made) { return aoti_torch_cpu_mul_Tensor(a.get(), b.get(), made); });
}

// 0 with probability p, else 1 / (1 - p): the numbers that torch's dropout would draw for this tensor.
Tensor dropout_mask(const Tensor& y, double p) {
  const ScalarType type = y.scalar_type();
  const Tensor mask = zeros({y.size(0), y.size(1), y.size(2)}, type);
  if (p == 1 || y.numel() == 0) return mask;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bernoulli__float(mask.get(), 1 - p, nullptr));
  const double scale = type == ScalarType::Double ? 1 / (1 - p) : 1.0f / static_cast<float>(1 - p);
  return torch_result([&](auto* made) { return aoti_torch_cpu_mul_Scalar(mask.get(), scale, made); });
}

Tensor swapped(const Tensor& v, int64_t a, int64_t b) {
  std::array<int64_t, 4> sizes{}, strides{};
  const int64_t dims = v.dim();
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t from = d == a ? b : d == b ? a : d;
    sizes[d] = v.size(from), strides[d] = v.stride(from);
  }
  return view(v, dims, sizes.data(), strides.data(), 0);
}

Tensor without(const Tensor& v, int64_t dim) {
  std::array<int64_t, 4> sizes{}, strides{};
  int64_t kept = 0;
  for (int64_t d = 0; d < v.dim(); ++d) {
    if (d != dim) sizes[kept] = v.size(d), strides[kept++] = v.stride(d);
  }
  return view(v, kept, sizes.data(), strides.data(), 0);
}

Tensor with_one(const Tensor& v, int64_t dim) {
  std::array<int64_t, 4> sizes{}, strides{};
  const int64_t dims = v.dim();
  for (int64_t d = 0; d <= dims; ++d) {
    sizes[d] = d == dim ? 1 : v.size(d < dim ? d : d - 1);
    strides[d] = d == dim ? 0 : v.stride(d < dim ? d : d - 1);
  }
  if (dim < dims) strides[dim] = sizes[dim + 1] * strides[dim + 1];
  return view(v, dims + 1, sizes.data(), strides.data(), 0);
}

// A tensor of one dimension fewer: those of layer and direction i.
OptionalTensor part(const OptionalTensor& v, int64_t i) {
  if (!v.has_value()) return std::nullopt;
  std::array<int64_t, 4> sizes{}, strides{};
  for (int64_t d = 1; d < v->dim(); ++d) sizes[d - 1] = v->size(d), strides[d - 1] = v->stride(d);
  return view(*v, v->dim() - 1, sizes.data(), strides.data(), i * v->stride(0));
}

// from: contiguous, or [T, B, N] with rows in equal distances.
void copy_to_part(const Tensor& from, const Tensor& all, int64_t i) {
  const auto bytes = static_cast<int64_t>(from.element_size());
  if (from.numel() == 0) return;
  const int64_t width = from.is_contiguous() ? from.numel() : from.size(2);
  const int64_t distance = from.is_contiguous() ? width : *row_stride(from);
  char* to = static_cast<char*>(all.mutable_data_ptr()) + i * from.numel() * bytes;
  const char* row = static_cast<const char*>(from.const_data_ptr());
  for (int64_t r = from.numel() / width; r > 0; --r, to += width * bytes, row += distance * bytes) {
    std::memcpy(to, row, static_cast<size_t>(width * bytes));
  }
}

// Columns d N .. (d + 1) N of [T, B, 2 N]: one direction's.
Tensor direction_of(const Tensor& v, int64_t d, int64_t N) {
  return view(v, {v.size(0), v.size(1), N}, {v.stride(0), v.stride(1), v.stride(2)}, d * N * v.stride(2));
}

// The stack's tensors as layers take them, and one layer's at a time.
class Stack {
 public:
  explicit Stack(StackInputs& in) : in_(in), lstm_(in.cell == Cell::lstm) {
    RNNKIT_CHECK(in.layers > 0 && (in.directions == 1 || in.directions == 2),
                 "layers must be at least 1 and directions 1 or 2, got ", in.layers, " and ", in.directions);
    check_dense(in.x, "a tensor");  // others have no strides
    for (const OptionalTensor* v : {&in.h_0, &in.c_0, &in.lengths, &in.reset, &in.h_r, &in.c_r}) {
      if (v->has_value()) check_dense(**v, "a tensor");
    }
    count_ = in.layers * in.directions;
    each_ = static_cast<int64_t>(in.weights.size()) / count_;
    RNNKIT_CHECK(each_ * count_ == static_cast<int64_t>(in.weights.size()) && each_ >= 2 && each_ <= 5,
                 "each layer and direction must have 2 to 5 weights, got ", in.weights.size(), " for ",
                 count_);
    RNNKIT_CHECK((each_ % 2 == 1) == (in.P > 0), "a projection of P = ", in.P, " must come with its weights");
    for (int64_t i = 0; i < count_ && in.P > 0; ++i) {
      const Tensor& w_hr = in.weights[(i + 1) * each_ - 1];
      RNNKIT_CHECK(w_hr.dim() == 2 && w_hr.size(0) == in.P, "w_hr must be [P = ", in.P, ", H], got ",
                   shown(w_hr.sizes()));
    }
    const int64_t dims = in.layout == Layout::time_major || in.layout == Layout::batch_first ? 3 : 2;
    RNNKIT_CHECK(in.x.dim() == dims, "x must have ", dims, " dimensions, got ", shown(in.x.sizes()));
    in.x = to_layer(in.x);
    T_ = in.x.size(0), B_ = in.x.size(1);
    RNNKIT_CHECK(in.weights[1].dim() == 2, "w_hh must have 2 dimensions, got ", shown(in.weights[1].sizes()));
    N_ = in.weights[1].size(1);
    RNNKIT_CHECK(T_ > 0, "x must have at least one step");
    if (in.reset.has_value()) {
      RNNKIT_CHECK(in.reset->dim() == (in.layout == Layout::unbatched ? 1 : 2), "reset must be [T, B]");
      in.reset = in.layout == Layout::batch_first ? swapped(*in.reset, 0, 1)
                 : in.layout == Layout::unbatched ? with_one(*in.reset, 1)
                                                  : *in.reset;
    }
    if (in.lengths.has_value()) check_lengths();
    for (OptionalTensor* v : {&in.h_0, &in.c_0, &in.h_r, &in.c_r}) {
      if (!v->has_value()) continue;
      RNNKIT_CHECK((*v)->dim() == dims_of_states(), "a state must have ", dims_of_states(),
                   " dimensions, got ", shown((*v)->sizes()));
      if (in.layout == Layout::unbatched) *v = with_one(**v, 1);
      RNNKIT_CHECK(in.layout == Layout::step || (*v)->size(0) == count_, "a state must be of ", count_,
                   " layers and directions, got ", shown((*v)->sizes()));
    }
  }

  int64_t count() const { return count_; }
  int64_t each() const { return each_; }
  int64_t steps() const { return T_; }
  int64_t rows() const { return B_; }
  int64_t states() const { return N_; }
  bool lstm() const { return lstm_; }

  LayerInputs layer(int64_t k, int64_t d, const Tensor& x) const {
    LayerInputs l;
    const int64_t i = k * in_.directions + d;
    const Tensor* w = in_.weights.data() + i * each_;
    l.cell = in_.cell, l.reverse = d == 1, l.x = x;
    l.w_ih = w[0], l.w_hh = w[1];
    if (each_ >= 4) l.b_ih = w[2], l.b_hh = w[3];
    if (each_ % 2 == 1) l.w_hr = w[each_ - 1];
    l.h_0 = state(in_.h_0, i), l.c_0 = state(in_.c_0, i);
    l.h_r = state(in_.h_r, i), l.c_r = state(in_.c_r, i);
    l.lengths = in_.lengths, l.reset = in_.reset;
    return l;
  }

  // Before anything is done: whether each layer takes what the one below gives, and all have the same states.
  void check_layers() const {
    LayerInputs first = layer(0, 0, in_.x);
    first.check();
    const Tensor below =
        view(in_.x, {T_, B_, in_.directions * first.N}, {0, 0, 0}, 0);  // an output by its sizes
    for (int64_t i = 1; i < count_; ++i) {
      const int64_t k = i / in_.directions;
      LayerInputs other = layer(k, i % in_.directions, k == 0 ? in_.x : below);
      other.check();
      RNNKIT_CHECK(other.H == first.H && other.N == first.N,
                   "every layer and direction must have H = ", first.H, " and N = ", first.N, ", got ",
                   other.H, " and ", other.N);
    }
  }

  // A layer's output, or the gradient of it: both directions lie in it.
  void check_output(const Tensor& v, const char* name) const {
    check(v, name, in_.x.scalar_type(), {T_, B_, in_.directions * N_});
  }

  // [T, B, ...] in the caller's layout, and back. Of a step there is no way back: y is its state.
  Tensor to_layer(const Tensor& v) const {
    switch (in_.layout) {
      case Layout::time_major:
        return v;
      case Layout::batch_first:
        return swapped(v, 0, 1);
      case Layout::unbatched:
        return with_one(v, 1);
      case Layout::step:
        return with_one(v, 0);
    }
    fail("no such layout");
  }
  Tensor to_caller(const Tensor& v) const {
    return in_.layout == Layout::batch_first ? swapped(v, 0, 1)
           : in_.layout == Layout::unbatched ? without(v, 1)
           : in_.layout == Layout::step      ? without(v, 0)
                                             : v;
  }
  // [L D, B, N] in the caller's layout, and back; a step has none but [B, N].
  Tensor states_to_caller(const Tensor& v) const {
    return in_.layout == Layout::unbatched ? without(v, 1) : v;
  }
  OptionalTensor states_to_layer(const OptionalTensor& v) const {
    return v.has_value() && in_.layout == Layout::unbatched ? OptionalTensor(with_one(*v, 1)) : v;
  }
  // [B, N] of layer and direction i.
  OptionalTensor state(const OptionalTensor& v, int64_t i) const { return step() ? v : part(v, i); }
  bool step() const { return in_.layout == Layout::step; }
  // [L D, T, B, N] in the caller's layout, and back.
  Tensor all_to_caller(const Tensor& v) const {
    return in_.layout == Layout::batch_first ? swapped(v, 1, 2)
           : in_.layout == Layout::unbatched ? without(v, 2)
                                             : v;
  }
  OptionalTensor all_to_layer(const OptionalTensor& v) const {
    if (!v.has_value()) return v;
    return in_.layout == Layout::batch_first ? swapped(*v, 1, 2)
           : in_.layout == Layout::unbatched ? with_one(*v, 2)
                                             : *v;
  }

 private:
  int64_t dims_of_states() const {
    return in_.layout == Layout::time_major || in_.layout == Layout::batch_first ? 3 : 2;
  }

  void check_lengths() {
    if (in_.layout == Layout::unbatched && in_.lengths->dim() == 0) in_.lengths = with_one(*in_.lengths, 0);
    expect(in_.lengths, "lengths", ScalarType::Long, {B_});
    const auto* v = static_cast<const int64_t*>(in_.lengths->const_data_ptr());
    for (int64_t b = 0; b < B_; ++b) {
      RNNKIT_CHECK(v[b] >= 0 && v[b] <= T_, "lengths must lie in [0, T=", T_, "], got ", v[b], " at row ", b);
    }
  }

  StackInputs& in_;
  const bool lstm_;
  int64_t count_ = 0, each_ = 0;  // layers times directions; weights of each
  int64_t T_ = 0, B_ = 0, N_ = 0;
};

// The states of every layer and direction in one tensor; of one alone its own memory, and of a step [B, N].
class AllStates {
 public:
  explicit AllStates(const Stack& stack) : count_(stack.count()), step_(stack.step()) {}
  void put(const Tensor& v, int64_t i) {
    if (count_ == 1) {
      all_ = step_ ? v : with_one(v, 0);
      return;
    }
    if (!all_.has_value()) {
      all_ = v.dim() == 2 ? empty({count_, v.size(0), v.size(1)}, v.scalar_type())
                          : empty({count_, v.size(0), v.size(1), v.size(2)}, v.scalar_type());
    }
    copy_to_part(v, *all_, i);
  }
  const Tensor& get() const { return *all_; }

 private:
  const int64_t count_;
  const bool step_;
  OptionalTensor all_;
};

enum Place { of_x, of_h_0, of_c_0, of_lengths, of_reset, of_h_r, of_c_r, of_weights };

bool wanted(const StackOptions& o, int64_t place) { return o.needs[place] != 0; }

// The lowest layer that a gradient has to reach.
int64_t lowest_layer(const StackInputs& in, const StackOptions& o, int64_t each) {
  for (int64_t place : {of_x, of_h_0, of_c_0, of_h_r, of_c_r}) {
    if (wanted(o, place)) return 0;
  }
  for (int64_t w = 0; w < static_cast<int64_t>(in.weights.size()); ++w) {
    if (wanted(o, of_weights + w)) return w / (each * in.directions);
  }
  return in.layers;
}

// Whether a layer's input is the output that the layer below keeps anyhow.
bool input_is_output_below(const StackOptions& o, int64_t k, int64_t lowest) {
  return o.dropout == 0 && k > lowest;
}

void check_needs(const StackInputs& in, const StackOptions& o) {
  RNNKIT_CHECK(o.needs.size() == of_weights + in.weights.size(), "needs must have ",
               of_weights + in.weights.size(), " bytes, got ", o.needs.size());
}

}  // namespace

std::vector<Tensor> stack_forward(StackInputs in, const StackOptions& o, std::vector<Tensor> masks) {
  const Stack stack(in);
  const bool save = !o.needs.empty(), draws = masks.empty();
  if (save) check_needs(in, o);
  if (stack.count() > 1) stack.check_layers();  // one is checked where it runs, before anything
  const int64_t lowest = save ? lowest_layer(in, o, stack.each()) : in.layers;
  AllStates h_n(stack), c_n(stack), h_all(stack), c_all(stack);
  std::vector<Tensor> kept;
  Tensor x = in.x;
  for (int64_t k = 0; k < in.layers; ++k) {
    const bool keep = k >= lowest, last = k + 1 == in.layers;
    if (keep && k > 0 && !input_is_output_below(o, k, lowest)) kept.push_back(x);
    OptionalTensor y;  // both directions side by side, or what the layer makes
    if (in.directions == 2) y = empty({stack.steps(), stack.rows(), 2 * stack.states()}, x.scalar_type());
    for (int64_t d = 0; d < in.directions; ++d) {
      const int64_t i = k * in.directions + d;
      const bool again = keep && o.recompute;
      std::vector<Tensor> made =
          layer_forward(stack.layer(k, d, x), o.all_states || again, keep && !again, 0,
                        y.has_value() ? OptionalTensor(direction_of(*y, d, stack.states())) : std::nullopt);
      h_n.put(made[1], i);
      if (stack.lstm()) c_n.put(made[2], i);
      size_t next = stack.lstm() ? 3 : 2;
      if (o.all_states) h_all.put(stack.count() == 1 ? torch::stable::clone(made[0]) : made[0], i);
      if (stack.lstm() && (o.all_states || again)) {
        const Tensor& c = made[next++];
        if (o.all_states) c_all.put(again && stack.count() == 1 ? torch::stable::clone(c) : c, i);
        if (again) kept.push_back(c);
      }
      kept.insert(kept.end(), made.begin() + static_cast<int64_t>(next), made.end());
      if (in.directions == 1) y = made[0];
    }
    x = *y;
    if (keep && !(last && reads_output(in))) kept.push_back(x);
    if (o.dropout > 0 && !last) {
      if (draws) masks.push_back(dropout_mask(x, o.dropout));
      x = multiply(x, masks[k]);
    }
  }
  std::vector<Tensor> out;
  if (in.layout != Layout::step) out.push_back(stack.to_caller(x));
  out.push_back(stack.states_to_caller(h_n.get()));
  if (stack.lstm()) out.push_back(stack.states_to_caller(c_n.get()));
  if (o.all_states) out.push_back(stack.all_to_caller(h_all.get()));
  if (o.all_states && stack.lstm()) out.push_back(stack.all_to_caller(c_all.get()));
  if (!save) return out;
  out.insert(out.end(), masks.begin(), masks.end());
  out.insert(out.end(), kept.begin(), kept.end());
  return out;
}

std::vector<OptionalTensor> stack_backward(StackInputs in, const StackOptions& o, const StackGradients& g) {
  const Stack stack(in);
  check_needs(in, o);
  const int64_t D = in.directions, lowest = lowest_layer(in, o, stack.each());
  const bool lstm = stack.lstm(), recompute = o.recompute;
  const int64_t saved = saved_of(in.cell) == 0 ? 0 : recompute ? (lstm ? 1 : 0) : (lstm ? 2 : 1);
  const int64_t mask_count = o.dropout > 0 ? in.layers - 1 : 0;

  // Where in `kept` each layer's begin: its input where it is kept, then `saved` for each direction, then its
  // output where that is not the call's.
  struct Kept {
    int64_t x = -1, y = -1;
    std::array<int64_t, 2> rest{};
  };
  std::vector<Kept> at(in.layers);
  int64_t next = mask_count;
  for (int64_t k = lowest; k < in.layers; ++k) {
    const bool output = k + 1 == in.layers && reads_output(in);
    if (k > 0 && !input_is_output_below(o, k, lowest)) at[k].x = next++;
    for (int64_t d = 0; d < D; ++d, next += saved) at[k].rest[d] = next;
    if (!output) at[k].y = next++;
  }
  RNNKIT_CHECK(next == static_cast<int64_t>(g.kept.size()), "what is kept must be ", next, " tensors, got ",
               g.kept.size());
  RNNKIT_CHECK(!reads_output(in) || g.y.has_value(), "y must be given, as the forward gave it");

  OptionalTensor gy = g.gy;
  if (gy.has_value()) gy = stack.to_layer(*gy), stack.check_output(*gy, "gy");
  const OptionalTensor gh_n = stack.states_to_layer(g.gh_n), gc_n = stack.states_to_layer(g.gc_n);
  const OptionalTensor gh_all = stack.all_to_layer(g.gh_all), gc_all = stack.all_to_layer(g.gc_all);
  AllStates dh_0(stack), dc_0(stack), dh_r(stack), dc_r(stack);
  std::vector<OptionalTensor> dw(in.weights.size());
  for (int64_t k = in.layers - 1; k >= lowest; --k) {
    const Tensor x = k == 0 ? in.x : at[k].x >= 0 ? g.kept[at[k].x] : g.kept[at[k - 1].y];
    const Tensor y = at[k].y < 0 ? stack.to_layer(*g.y) : g.kept[at[k].y];
    stack.check_output(y, "y");
    const bool below = k > lowest || (k == 0 && wanted(o, of_x));
    OptionalTensor dx;
    for (int64_t d = 0; d < D; ++d) {
      const int64_t i = k * D + d, first = i * stack.each();
      LayerGradients own;
      own.y = D == 1 ? y : direction_of(y, d, stack.states());
      if (saved > 0 && !recompute) own.gates = g.kept[at[k].rest[d]];
      if (lstm) own.c_kept = g.kept[at[k].rest[d] + saved - 1];
      if (gy.has_value()) own.gy = D == 1 ? *gy : direction_of(*gy, d, stack.states());
      if (const OptionalTensor more = part(gh_all, i))
        own.gy = own.gy.has_value() ? add(*own.gy, *more) : more;
      own.gh_n = stack.state(gh_n, i), own.gc_n = stack.state(gc_n, i), own.gc_all = part(gc_all, i);
      int64_t needs = below ? 1 : 0;
      const auto want = [&](int bit, int64_t place) { needs |= int64_t{wanted(o, place)} << bit; };
      want(1, of_h_0), want(2, of_c_0), want(3, of_weights + first), want(4, of_weights + first + 1);
      if (stack.each() >= 4) want(5, of_weights + first + 2), want(6, of_weights + first + 3);
      if (stack.each() % 2 == 1) want(7, of_weights + first + stack.each() - 1);
      want(8, of_h_r), want(9, of_c_r);
      if (needs == 0) continue;
      const std::vector<Tensor> found = layer_backward(stack.layer(k, d, x), own, needs);
      size_t taken = 0;
      if (below) dx = dx.has_value() ? add(*dx, found[taken]) : found[taken], ++taken;
      if (wanted(o, of_h_0)) dh_0.put(found[taken++], i);
      if (wanted(o, of_c_0)) dc_0.put(found[taken++], i);
      for (int64_t w = first; w < first + stack.each(); ++w) {
        if (wanted(o, of_weights + w)) dw[w] = found[taken++];
      }
      if (wanted(o, of_h_r)) dh_r.put(found[taken++], i);
      if (wanted(o, of_c_r)) dc_r.put(found[taken++], i);
    }
    gy = dx;
    if (gy.has_value() && k > 0 && o.dropout > 0) gy = multiply(*gy, g.kept[k - 1]);
  }
  std::vector<OptionalTensor> out(of_weights);
  if (wanted(o, of_x)) out[of_x] = stack.to_caller(*gy);
  if (wanted(o, of_h_0)) out[of_h_0] = stack.states_to_caller(dh_0.get());
  if (wanted(o, of_c_0)) out[of_c_0] = stack.states_to_caller(dc_0.get());
  if (wanted(o, of_h_r)) out[of_h_r] = stack.states_to_caller(dh_r.get());
  if (wanted(o, of_c_r)) out[of_c_r] = stack.states_to_caller(dc_r.get());
  out.insert(out.end(), dw.begin(), dw.end());
  return out;
}

}  // namespace rnnkit
