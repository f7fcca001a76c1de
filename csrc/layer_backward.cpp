// The backward of a layer: the scan gives the gradients of the pre-activations, and one product for each weight does
// the rest. With lengths or resets, what stands where no gradient came is left out by selection, never by a
// multiplication: 0 * NaN is NaN.

#include <cstring>

#include "layer.h"

namespace rnnkit {

Tensor wide_copy(const Tensor& v, Dtype dtype);

namespace {

// Bytes; unlike memcpy and memset, of tensors without elements too, whose pointers are null.
void copy(const void* from, int64_t bytes, void* to) {
  std::copy_n(static_cast<const char*>(from), bytes, static_cast<char*>(to));
}
void clear(void* to, int64_t bytes) { std::fill_n(static_cast<char*>(to), bytes, 0); }

// A [B, width] gradient in the compute type that the scan turns from that of the last state into that of the first.
Tensor carried(const LayerInputs& in, const OptionalTensor& g, const char* name, int64_t width) {
  const int64_t bytes = in.dtype == Dtype::f64 ? 8 : 4;
  Tensor d = torch::stable::new_empty(in.x, {in.B, width}, wide(in.dtype));
  if (g.has_value()) {
    const Tensor from = wide_copy(expect(*g, name, in.x.scalar_type(), {in.B, width}), in.dtype);
    copy(from.const_data_ptr(), in.B * width * bytes, d.mutable_data_ptr());
  } else {
    clear(d.mutable_data_ptr(), in.B * width * bytes);
  }
  return d;
}

// Rows of [T, B, width] as one matrix.
Tensor rows(const Tensor& v, int64_t first, int64_t count, int64_t column, int64_t columns) {
  const int64_t width = v.size(v.dim() - 1);
  return view(v, {count, columns}, {width, 1}, first * width + column);
}

struct Scanned {
  Tensor dgx;              // [T, B, G H]
  OptionalTensor dgn, dp;  // [T, B, H], [T, B, P]
};

// Runs copy(row) for every row of [T, B, ...] whose gradient is not all zero, clear(row) for the others.
template <class Copy, class Clear>
void by_gradient(const Tensor& d, int64_t count, Copy copy, Clear clear) {
  const int64_t bytes = count ? d.numel() / count * static_cast<int64_t>(d.element_size()) : 0;
  const auto half = d.scalar_type() == ScalarType::BFloat16 || d.scalar_type() == ScalarType::Half;
  const char* from = static_cast<const char*>(d.const_data_ptr());
  for (int64_t r = 0; r < count; ++r, from += bytes) {
    bool dead = true;
    const auto all_zero = [&](auto unsigned_zero) {
      using U = decltype(unsigned_zero);
      constexpr U magnitude = static_cast<U>(~U(0)) >> 1;  // but the sign
      for (int64_t k = 0; k < bytes && dead; k += sizeof(U)) {
        U bits;
        std::memcpy(&bits, from + k, sizeof bits);
        dead = (bits & magnitude) == 0;
      }
    };
    if (half) {
      all_zero(uint16_t{});
    } else if (d.scalar_type() == ScalarType::Float) {
      all_zero(uint32_t{});
    } else {
      all_zero(uint64_t{});
    }
    dead ? clear(r) : copy(r);
  }
}

// `v` [T, B, width] with zeros where no gradient came.
Tensor selected(const LayerInputs& in, const Tensor& v, const Tensor& d) {
  Tensor out = torch::stable::new_empty(v, {in.T, in.B, v.size(2)});
  const int64_t bytes = v.size(2) * bytes_of(in.dtype);
  const char* from = static_cast<const char*>(v.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  by_gradient(
      d, in.T * in.B, [&](int64_t r) { copy(from + r * bytes, bytes, to + r * bytes); },
      [&](int64_t r) { clear(to + r * bytes, bytes); });
  return out;
}

// The state [T, B, N] that each step started from, zeros where no gradient came.
Tensor before(const LayerInputs& in, const Tensor& y, const Tensor& d, const Cuts& cuts) {
  Tensor out = torch::stable::new_empty(y, {in.T, in.B, in.N});
  const int64_t bytes = in.N * bytes_of(in.dtype);
  const char* states = static_cast<const char*>(y.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto put = [&](int64_t r, const void* from, int64_t b) {
    if (from == nullptr) {
      clear(to + r * bytes, bytes);
    } else {
      copy(static_cast<const char*>(from) + b * bytes, bytes, to + r * bytes);
    }
  };
  by_gradient(
      d, in.T * in.B,
      [&](int64_t r) {
        const int64_t t = r / in.B, b = r % in.B;
        const int64_t start = in.reverse ? (cuts.lengths != nullptr ? cuts.lengths[b] : in.T) - 1 : 0;
        if (cuts.cut(t, b, in.reverse)) {
          put(r, pointer(in.h_r), b);
        } else if (t == start) {
          put(r, pointer(in.h_0), b);
        } else {
          put(r, states, in.reverse ? r + in.B : r - in.B);
        }
      },
      [&](int64_t r) { put(r, nullptr, 0); });
  return out;
}

// dw [rows of d, N] += the sum over steps and rows of d^T (the state before the step). d has `columns` columns from
// `column` on.
void recurrent(const LayerInputs& in, const OptionalTensor& states, const Tensor& y, const Tensor& d, int64_t column,
               int64_t columns, Tensor dw) {
  const int64_t all = in.T * in.B;
  if (states.has_value()) {
    outer(rows(d, 0, all, column, columns), rows(*states, 0, all, 0, in.N), dw, false);
    return;
  }
  if (all == 0) {  // no step, no gradient: zeros
    outer(rows(d, 0, 0, column, columns), rows(y, 0, 0, 0, in.N), dw, false);
    return;
  }
  // The step before is the row B further up (down, in reverse), but for the first that was made.
  const int64_t later = in.reverse ? 0 : in.B, earlier = in.reverse ? in.B : 0;
  outer(rows(d, later, all - in.B, column, columns), rows(y, earlier, all - in.B, 0, in.N), dw, false);
  if (in.h_0.has_value()) {
    outer(rows(d, in.reverse ? all - in.B : 0, in.B, column, columns), *in.h_0, dw, true);
  }
}

// r h of the textbook GRU, or o tanh(c) of an LSTM with a projection: [T, B, H] in the dtype of x.
Tensor inner(const LayerInputs& in, const LayerGradients& g, const Tensor& states) {
  const int64_t all = in.T * in.B;
  const bool lstm = in.cell == Cell::lstm;
  const Tensor gate = rows(*g.gates, 0, all, lstm ? 3 * in.H : 0, in.H);
  Tensor other = lstm ? torch::stable::new_empty(*g.c_kept, {all, in.H}) : wide_copy(rows(states, 0, all, 0, in.H), in.dtype);
  if (lstm) {
    engine().function(1, in.dtype, all * in.H, g.c_kept->const_data_ptr(), other.mutable_data_ptr());
  } else if (!is_half(in.dtype)) {
    other = torch::stable::clone(other);
  }
  const auto times = [&](auto zero) {
    using A = decltype(zero);
    const A* from = static_cast<const A*>(gate.const_data_ptr());
    A* to = static_cast<A*>(other.mutable_data_ptr());
    const int64_t stride = gate.stride(0);
    for (int64_t r = 0; r < all; ++r) {
      for (int64_t j = 0; j < in.H; ++j) to[r * in.H + j] *= from[r * stride + j];
    }
  };
  in.dtype == Dtype::f64 ? times(double{}) : times(float{});
  return is_half(in.dtype) ? torch::stable::to(other, in.x.scalar_type()) : other;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes) { return torch::stable::new_zeros(like, sizes); }

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
  if (resets) dh_r = zeros(dh, {in.B, in.N});
  if (resets && lstm) dc_r = zeros(dh, {in.B, in.H});

  Scanned s{torch::stable::new_empty(in.x, {in.T, in.B, width}), std::nullopt, std::nullopt};
  if (in.cell == Cell::gru) s.dgn = torch::stable::new_empty(in.x, {in.T, in.B, in.H});
  if (in.P) s.dp = torch::stable::new_empty(in.x, {in.T, in.B, in.P});
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
  q.dh = dh.mutable_data_ptr();
  q.dc = dc.has_value() ? dc->mutable_data_ptr() : nullptr;
  q.dh_r = dh_r.has_value() ? dh_r->mutable_data_ptr() : nullptr;
  q.dc_r = dc_r.has_value() ? dc_r->mutable_data_ptr() : nullptr;
  if (all > 0 && in.H > 0) engine().backward(q);

  const auto narrow = [&](const Tensor& v) { return is_half(in.dtype) ? torch::stable::to(v, type) : v; };
  std::vector<Tensor> out;
  const auto wanted = [&](int bit) { return (needs >> bit & 1) != 0; };
  const Tensor d = rows(s.dgx, 0, all, 0, width);
  if (wanted(0)) {
    Tensor dx = torch::stable::new_empty(in.x, {in.T, in.B, in.I});
    Tensor flat = view(dx, {all, in.I}, {in.I, 1}, 0);
    multiply(d, in.w_ih, flat);
    out.push_back(dx);
  }
  if (wanted(1)) out.push_back(narrow(dh));
  if (wanted(2)) out.push_back(narrow(*dc));
  if (wanted(3)) {
    Tensor x = torch::stable::contiguous(in.x);
    if (guarded) x = selected(in, x, s.dgx);
    Tensor dw = torch::stable::new_empty(in.x, {width, in.I});
    outer(d, view(x, {all, in.I}, {in.I, 1}, 0), dw, false);
    out.push_back(dw);
  }
  OptionalTensor states;
  if (wanted(4) && (guarded || in.cell == Cell::gru_before)) states = before(in, g.y, s.dgx, q.layer.cuts);
  if (wanted(4)) {
    Tensor dw = torch::stable::new_empty(in.x, {width, in.N});
    const auto block = [&](int64_t first, int64_t count) {
      return view(dw, {count * in.H, in.N}, {in.N, 1}, first * in.H * in.N);
    };
    if (in.cell == Cell::gru) {
      recurrent(in, states, g.y, s.dgx, 0, 2 * in.H, block(0, 2));
      recurrent(in, states, g.y, *s.dgn, 0, in.H, block(2, 1));
    } else if (in.cell == Cell::gru_before) {
      recurrent(in, states, g.y, s.dgx, 0, 2 * in.H, block(0, 2));
      const Tensor rh = guarded ? selected(in, view(inner(in, g, *states), {in.T, in.B, in.H}, {in.B * in.H, in.H, 1}, 0), s.dgx)
                                : inner(in, g, *states);
      recurrent(in, view(rh, {in.T, in.B, in.H}, {in.B * in.H, in.H, 1}, 0), g.y, s.dgx, 2 * in.H, in.H, block(2, 1));
    } else {
      recurrent(in, states, g.y, s.dgx, 0, width, dw);
    }
    out.push_back(dw);
  }
  if (wanted(5) || wanted(6)) {
    Tensor db = torch::stable::new_empty(in.x, {width});
    sum_rows(d, db);
    if (wanted(5)) out.push_back(db);
    if (wanted(6)) {
      Tensor recurrent_db = torch::stable::clone(db);
      if (s.dgn.has_value()) {
        Tensor inside = view(recurrent_db, {in.H}, {1}, 2 * in.H);
        sum_rows(rows(*s.dgn, 0, all, 0, in.H), inside);
      }
      out.push_back(recurrent_db);
    }
  }
  if (wanted(7)) {
    Tensor m = view(inner(in, g, g.y), {in.T, in.B, in.H}, {in.B * in.H, in.H, 1}, 0);
    if (guarded) m = selected(in, m, *s.dp);
    Tensor dw = torch::stable::new_empty(in.x, {in.P, in.H});
    outer(rows(*s.dp, 0, all, 0, in.P), rows(m, 0, all, 0, in.H), dw, false);
    out.push_back(dw);
  }
  if (wanted(8)) out.push_back(narrow(*dh_r));
  if (wanted(9)) out.push_back(narrow(*dc_r));
  return out;
}

}  // namespace rnnkit
