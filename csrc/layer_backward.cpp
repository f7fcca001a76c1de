// The backward of a layer: the scan gives the gradients of the pre-activations, and one product for each
// weight does the rest. With lengths or resets, what stands where no gradient came is left out by selection,
// never by a multiplication: 0 * NaN is NaN.

#include "layer.h"

namespace rnnkit {

Tensor wide_copy(const Tensor& v, Dtype dtype);

namespace {

// A [B, width] gradient in the compute type that the scan turns from that of the last state into that of the
// first.
Tensor carried(const LayerInputs& in, const OptionalTensor& g, const char* name, int64_t width) {
  const int64_t bytes = in.dtype == Dtype::f64 ? 8 : 4;
  Tensor d = torch::stable::new_empty(in.x, {in.B, width}, wide(in.dtype));
  char* to = static_cast<char*>(d.mutable_data_ptr());  // null without elements, which memcpy may not be given
  if (g.has_value()) {
    const Tensor from = wide_copy(expect(*g, name, in.x.scalar_type(), {in.B, width}), in.dtype);
    std::copy_n(static_cast<const char*>(from.const_data_ptr()), in.B * width * bytes, to);
  } else {
    std::fill_n(to, in.B * width * bytes, 0);
  }
  return d;
}

// Some columns of all rows of [T, B, width], as a matrix.
Tensor matrix(const Tensor& v, int64_t column, int64_t columns) {
  const int64_t width = v.size(2);
  return view(v, {v.size(0) * v.size(1), columns}, {width, 1}, column);
}

struct Scanned {
  Tensor dgx;              // [T, B, G H]
  OptionalTensor dgn, dp;  // [T, B, H], [T, B, P]
  OptionalTensor inner;    // [T, B, H]
};

using Rows = std::vector<const void*>;

// Whether each row of d [T, B, width] holds a gradient: where it is all zero none came, so nothing that
// stands there may pass on NaN.
std::vector<bool> reached(const Tensor& d) {
  const int64_t count = d.size(0) * d.size(1), width = d.size(2);
  std::vector<bool> any(count);
  const auto look = [&](auto bits) {
    using U = decltype(bits);
    constexpr U magnitude = static_cast<U>(~U(0)) >> 1;  // all but the sign
    const U* v = static_cast<const U*>(d.const_data_ptr());
    for (int64_t r = 0; r < count; ++r, v += width) {
      any[r] = std::any_of(v, v + width, [](U u) { return (u & magnitude) != 0; });
    }
  };
  switch (d.element_size()) {
    case 2:
      look(uint16_t{});
      break;
    case 4:
      look(uint32_t{});
      break;
    default:
      look(uint64_t{});
  }
  return any;
}

// The rows of v [T, B, width] in any strides of time and batch, where `any` says so (empty: everywhere).
Rows rows_of(const Tensor& v, const std::vector<bool>& any) {
  const int64_t bytes = static_cast<int64_t>(v.element_size()), B = v.size(1);
  const char* base = static_cast<const char*>(v.const_data_ptr());
  Rows rows(v.size(0) * B);
  for (int64_t t = 0, r = 0; t < v.size(0); ++t) {
    for (int64_t b = 0; b < B; ++b, ++r) {
      rows[r] = any.empty() || any[r] ? base + (t * v.stride(0) + b * v.stride(1)) * bytes : nullptr;
    }
  }
  return rows;
}

// The states [N] that each step started from.
Rows before(const LayerInputs& in, const Tensor& y, const std::vector<bool>& any, const Cuts& cuts) {
  const int64_t bytes = in.N * bytes_of(in.dtype);
  const auto row = [&](const void* base, int64_t r) -> const void* {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + r * bytes;
  };
  Rows rows(in.T * in.B);
  for (int64_t t = 0, r = 0; t < in.T; ++t) {
    for (int64_t b = 0; b < in.B; ++b, ++r) {
      const int64_t start = in.reverse ? (cuts.lengths != nullptr ? cuts.lengths[b] : in.T) - 1 : 0;
      if (!any.empty() && !any[r]) {
        rows[r] = nullptr;
      } else if (cuts.cut(t, b, in.reverse)) {
        rows[r] = row(pointer(in.h_r), b);
      } else if (t == start) {
        rows[r] = row(pointer(in.h_0), b);
      } else {
        rows[r] = row(y.const_data_ptr(), in.reverse ? r + in.B : r - in.B);
      }
    }
  }
  return rows;
}

}  // namespace

std::vector<Tensor> layer_backward(LayerInputs in, LayerGradients g, int64_t needs) {
  in.check();
  const ScalarType type = in.x.scalar_type();
  const bool lstm = in.cell == Cell::lstm, guarded = in.lengths.has_value() || in.reset.has_value();
  const int64_t saved = saved_of(in.cell), width = in.G * in.H, all = in.T * in.B;
  g.y = expect(g.y, "y", type, {in.T, in.B, in.N});
  RNNKIT_CHECK(!saved || g.gates.has_value(), "gates must be given, as the forward saved them");
  RNNKIT_CHECK(!lstm || g.c_kept.has_value(), "c must be given, as the forward saved it");
  g.gates = expect(g.gates, "gates", wide(in.dtype), {in.T, in.B, saved * in.H});
  g.c_kept = expect(g.c_kept, "c", wide(in.dtype), {in.T, in.B, in.H});
  g.gc_all = expect(g.gc_all, "gc_all", type, {in.T, in.B, in.H});
  Backward q{};
  if (g.gy.has_value()) {
    check(*g.gy, "gy", type, {in.T, in.B, in.N});
    if (g.gy->stride(2) != 1 && g.gy->stride(2) != 0) g.gy = torch::stable::contiguous(*g.gy);
    q.gy_strides = {g.gy->stride(0), g.gy->stride(1), in.N == 1 ? 1 : g.gy->stride(2)};
  }
  Tensor dh = carried(in, g.gh_n, "gh_n", in.N);
  OptionalTensor dc, dh_r, dc_r;
  if (lstm) dc = carried(in, g.gc_n, "gc_n", in.H);
  const bool resets = (needs >> 8 & 3) != 0;
  if (resets) dh_r = torch::stable::new_zeros(dh, {in.B, in.N});
  if (resets && lstm) dc_r = torch::stable::new_zeros(dh, {in.B, in.H});

  Scanned s{torch::stable::new_empty(in.x, {in.T, in.B, width}), {}, {}, {}};
  if (in.cell == Cell::gru) s.dgn = torch::stable::new_empty(in.x, {in.T, in.B, in.H});
  if (in.P) s.dp = torch::stable::new_empty(in.x, {in.T, in.B, in.P});
  if (in.P || in.cell == Cell::gru_before) s.inner = torch::stable::new_empty(in.x, {in.T, in.B, in.H});
  OptionalTensor h_0, c_0;
  if (in.h_0.has_value()) h_0 = wide_copy(*in.h_0, in.dtype);
  if (in.c_0.has_value()) c_0 = wide_copy(*in.c_0, in.dtype);
  q.layer = in.layer();
  q.T = in.T;
  q.gy = pointer(g.gy);
  q.gc_all = pointer(g.gc_all);
  q.y = g.y.const_data_ptr();
  q.gates = pointer(g.gates);
  q.gates_stride = saved * in.H;
  q.c_kept = pointer(g.c_kept);
  q.h_0 = pointer(h_0);
  q.c_0 = pointer(c_0);
  q.dgx = s.dgx.mutable_data_ptr();
  q.dgn = s.dgn.has_value() ? s.dgn->mutable_data_ptr() : nullptr;
  q.dp = s.dp.has_value() ? s.dp->mutable_data_ptr() : nullptr;
  q.inner = s.inner.has_value() ? s.inner->mutable_data_ptr() : nullptr;
  q.dh = dh.mutable_data_ptr();
  q.dc = dc.has_value() ? dc->mutable_data_ptr() : nullptr;
  q.dh_r = dh_r.has_value() ? dh_r->mutable_data_ptr() : nullptr;
  q.dc_r = dc_r.has_value() ? dc_r->mutable_data_ptr() : nullptr;
  if (all > 0 && in.H > 0) engine().backward(q);

  const auto narrow = [&](const Tensor& v) { return is_half(in.dtype) ? torch::stable::to(v, type) : v; };
  std::vector<Tensor> out;
  const auto wanted = [&](int bit) { return (needs >> bit & 1) != 0; };
  const Tensor d = matrix(s.dgx, 0, width);
  const std::vector<bool> any = guarded ? reached(s.dgx) : std::vector<bool>();
  if (wanted(0)) {
    Tensor dx = torch::stable::new_empty(in.x, {in.T, in.B, in.I});
    Tensor flat = matrix(dx, 0, in.I);
    RowsTimes(in.w_ih, true, all).run(d, flat);
    out.push_back(dx);
  }
  if (wanted(1)) out.push_back(narrow(dh));
  if (wanted(2)) out.push_back(narrow(*dc));
  OptionalTensor db_ih, db_hh;
  if (wanted(5) || wanted(6)) db_ih = torch::stable::new_empty(in.x, {width});
  if (wanted(3)) {
    const Tensor x = in.x.stride(2) == 1 || in.I == 1 ? in.x : torch::stable::contiguous(in.x);
    Tensor dw = torch::stable::new_empty(in.x, {width, in.I});
    outer(d, rows_of(x, any), dw, db_ih.has_value() ? &*db_ih : nullptr);
    out.push_back(dw);
  } else if (db_ih.has_value()) {
    outer(d, Rows(all, nullptr), torch::stable::new_empty(in.x, {width, 0}), &*db_ih);
  }
  if (wanted(6)) db_hh = torch::stable::clone(*db_ih);
  if (wanted(4) || (wanted(6) && s.dgn.has_value())) {
    const Rows states = before(in, g.y, any, q.layer.cuts);
    Tensor dw = torch::stable::new_empty(in.x, {width, in.N});
    const auto block = [&](int64_t first, int64_t count) {
      return view(dw, {count * in.H, in.N}, {in.N, 1}, first * in.H * in.N);
    };
    if (in.cell == Cell::gru) {
      outer(matrix(s.dgx, 0, 2 * in.H), states, block(0, 2), nullptr);
      Tensor inside = db_hh.has_value() ? view(*db_hh, {in.H}, {1}, 2 * in.H) : dw;
      outer(matrix(*s.dgn, 0, in.H), states, block(2, 1), db_hh.has_value() ? &inside : nullptr);
    } else if (in.cell == Cell::gru_before) {
      outer(matrix(s.dgx, 0, 2 * in.H), states, block(0, 2), nullptr);
      outer(matrix(s.dgx, 2 * in.H, in.H), rows_of(*s.inner, any), block(2, 1), nullptr);
    } else {
      outer(d, states, dw, nullptr);
    }
    if (wanted(4)) out.push_back(dw);
  }
  if (wanted(5)) out.push_back(*db_ih);
  if (wanted(6)) out.push_back(*db_hh);
  if (wanted(7)) {
    Tensor dw = torch::stable::new_empty(in.x, {in.P, in.H});
    outer(matrix(*s.dp, 0, in.P), rows_of(*s.inner, guarded ? reached(*s.dp) : any), dw, nullptr);
    out.push_back(dw);
  }
  if (wanted(8)) out.push_back(narrow(*dh_r));
  if (wanted(9)) out.push_back(narrow(*dc_r));
  return out;
}

}  // namespace rnnkit
