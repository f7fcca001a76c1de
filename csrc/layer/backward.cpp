// The backward of a layer: the scan gives the gradients of the pre-activations, and one product for each
// weight does the rest. With lengths or resets, what stands where no gradient came is left out by selection,
// never by a multiplication: 0 * NaN is NaN.

#include "layer.h"

namespace rnnkit {

namespace {

// A [B, width] gradient in the compute type that the scan turns from that of the last state into that of the
// first.
Tensor state_grad(const LayerInputs& in, const OptionalTensor& g, const char* name, int64_t width) {
  const int64_t bytes = opmath_bytes(in.dtype);
  Tensor d = empty({in.B, width}, opmath_type(in.dtype));
  char* to =
      static_cast<char*>(d.mutable_data_ptr());  // null without elements, which memcpy may not be given
  if (g.has_value()) {
    Tensor given = *g;
    expect(given, name, in.x.scalar_type(), {in.B, width});
    const Tensor from = to_opmath(given, in.dtype);
    std::copy_n(static_cast<const char*>(from.const_data_ptr()), in.B * width * bytes, to);
  } else {
    std::fill_n(to, in.B * width * bytes, 0);
  }
  return d;
}

Tensor copy_of(const Tensor& v) {
  Tensor made = empty({v.size(0)}, v.scalar_type());
  const auto bytes = v.numel() * static_cast<int64_t>(v.element_size());
  std::copy_n(static_cast<const char*>(v.const_data_ptr()), bytes,
              static_cast<char*>(made.mutable_data_ptr()));
  return made;
}

// Some columns of all rows of [n, B, width], as a matrix.
Tensor matrix(const Tensor& v, int64_t column, int64_t columns) {
  const int64_t width = v.size(2);
  return view(v, {v.size(0) * v.size(1), columns}, {width, 1}, column);
}

// A chunk of time, and what the scan gives for it.
struct ChunkGrads {
  int64_t t0, n;
  Tensor dgx;                              // [n, B, G H]
  OptionalTensor dgn, dp, second_operand;  // [n, B, H], [n, B, P], [n, B, H]
};

using RowPointers = std::vector<const void*>;

// Whether each row of d [n, B, width] holds a gradient: where it is all zero none came, so nothing that
// stands there may pass on NaN. Empty where `masked` is false: everywhere.
std::vector<bool> rows_with_grad(const Tensor& d, bool masked) {
  if (!masked) return {};
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

// The rows of v at n steps from t0 on, in any strides of time and batch, where `any` says so (empty:
// everywhere).
RowPointers rows_of(const Tensor& v, int64_t t0, int64_t n, const std::vector<bool>& any) {
  const int64_t bytes = static_cast<int64_t>(v.element_size()), B = v.size(1);
  const int64_t step = v.stride(0) * bytes, row = v.stride(1) * bytes;
  const char* base = static_cast<const char*>(v.const_data_ptr()) + t0 * step;
  RowPointers rows(n * B);
  for (int64_t t = 0, r = 0; t < n; ++t) {
    for (int64_t b = 0; b < B; ++b, ++r)
      rows[r] = any.empty() || any[r] ? base + t * step + b * row : nullptr;
  }
  return rows;
}

// The states [N] that the chunk's steps started from.
RowPointers states_before(const LayerInputs& in, const ChunkGrads& s, const Tensor& y,
                          const std::vector<bool>& any, const LengthsAndResets& masks) {
  const int64_t bytes = in.N * bytes_of(in.dtype);
  const auto row = [&](const void* base, int64_t r) -> const void* {
    return base == nullptr ? nullptr : static_cast<const char*>(base) + r * bytes;
  };
  const int64_t stride = *row_stride(y) * bytes_of(in.dtype);
  const char* states = static_cast<const char*>(y.const_data_ptr());
  const void *h_0 = pointer(in.h_0), *h_r = pointer(in.h_r);
  RowPointers rows(s.n * in.B);
  for (int64_t k = 0, r = 0; k < s.n; ++k) {
    const int64_t t = s.t0 + k;
    for (int64_t b = 0; b < in.B; ++b, ++r) {
      const int64_t start =
          in.reverse ? (masks.lengths != nullptr ? std::min(masks.lengths[b], in.T) : in.T) - 1 : 0;
      if (!any.empty() && !any[r]) {
        rows[r] = nullptr;
      } else if (masks.resets_before(t, b, in.reverse)) {
        rows[r] = row(h_r, b);
      } else if (t == start) {
        rows[r] = row(h_0, b);
      } else {
        rows[r] = states + ((in.reverse ? t + 1 : t - 1) * in.B + b) * stride;
      }
    }
  }
  return rows;
}

// Steps whose pre-activations' gradients are held at a time: rows enough for a weight's gradient to be summed
// at its rate, but no more than an eighth of all (or 16). All at once where they take no more memory than
// W_hh, whose packed panels are gone before W_ih is packed, and no gates are made again beside them.
int64_t steps_at_a_time(const LayerInputs& in, bool recompute) {
  if (in.T * in.B <= in.N && !recompute) return in.T;
  const int64_t rows = std::clamp<int64_t>(in.T * in.B / 8, 16, 512);
  return std::max<int64_t>(1, rows / std::max<int64_t>(1, in.B));
}

// The gradients of the weights and of x, chunk by chunk.
class WeightGrads {
 public:
  WeightGrads(const LayerInputs& in, const LayerGradients& g, const LengthsAndResets& masks, int64_t needs)
      : in_(in), g_(g), masks_(masks), masked_(masks.any()), needs_(needs), width_(in.G * in.H) {
    if (wanted(0)) {
      // without units no product writes it
      dx = in.H > 0 ? empty({in.T, in.B, in.I}, in.x.scalar_type())
                    : zeros({in.T, in.B, in.I}, in.x.scalar_type());
    }
    if (wanted(3)) x_ = in.x.stride(2) == 1 || in.I == 1 ? in.x : torch::stable::contiguous(in.x);
    const bool none = in.T == 0 || in.B == 0 || in.H == 0;  // no chunk comes
    if (none) allocate(zeros);
  }

  void add(const ChunkGrads& s) {
    if (!added_) allocate(empty);  // this chunk writes them
    const Tensor d = matrix(s.dgx, 0, width_);
    if (dx.has_value()) {
      const int64_t rows = in_.T * in_.B;
      if (!times_w_ih_) times_w_ih_.emplace(in_.w_ih, true, rows, rows > 16);
      Tensor rows_of_dx = view(*dx, {s.n * in_.B, in_.I}, {in_.I, 1}, s.t0 * in_.B * in_.I);
      times_w_ih_->run(d, rows_of_dx);
    }
    if ((needs_ & 0xf8) == 0) return;  // no weight is asked for
    const std::vector<bool> any = rows_with_grad(s.dgx, masked_);
    const RowPointers of_x = dw_ih.has_value() ? rows_of(*x_, s.t0, s.n, any) : RowPointers{};
    const RowPointers states = dw_hh.has_value() ? states_before(in_, s, g_.y, any, masks_) : RowPointers{};
    // a GRU's candidate has gradients or a right operand of its own
    const bool gru = in_.cell == Cell::gru || in_.cell == Cell::gru_reset_before;
    const auto recurrent = [&](int64_t first, int64_t count) {
      return view(*dw_hh, {count * in_.H, in_.N}, {in_.N, 1}, first * in_.H * in_.N);
    };
    std::vector<WeightGrad> grads;
    if (dw_ih.has_value()) grads.push_back({of_x, *dw_ih});
    if (dw_hh.has_value()) grads.push_back({states, recurrent(0, gru ? 2 : in_.G)});
    gemm_tn(d, grads, db, added_);
    grads.clear();
    if (in_.cell == Cell::gru_reset_before && dw_hh.has_value()) {
      const RowPointers reset_states = rows_of(*s.second_operand, 0, s.n, any);
      gemm_tn(matrix(s.dgx, 2 * in_.H, in_.H), {{reset_states, recurrent(2, 1)}}, {}, added_);
    }
    if (in_.cell == Cell::gru) {
      if (dw_hh.has_value()) grads.push_back({states, recurrent(2, 1)});
      gemm_tn(matrix(*s.dgn, 0, in_.H), grads, db_hn, added_);
    }
    if (dw_hr.has_value()) {
      const RowPointers unprojected = rows_of(*s.second_operand, 0, s.n, rows_with_grad(*s.dp, masked_));
      gemm_tn(matrix(*s.dp, 0, in_.P), {{unprojected, *dw_hr}}, {}, added_);
    }
    added_ = true;
  }

  OptionalTensor dx, dw_ih, dw_hh, db, db_hn, dw_hr;

 private:
  bool wanted(int bit) const { return (needs_ >> bit & 1) != 0; }

  // Not before the first chunk is scanned: of one that is all, what only a scan needs is gone then.
  void allocate(Tensor (*make)(std::initializer_list<int64_t>, ScalarType)) {
    const ScalarType type = opmath_type(in_.dtype);
    if (wanted(3)) dw_ih = make({width_, in_.I}, type);
    if (wanted(4)) dw_hh = make({width_, in_.N}, type);
    if (wanted(5) || wanted(6)) db = make({width_}, type);
    if (wanted(6) && in_.cell == Cell::gru) db_hn = make({in_.H}, type);
    if (wanted(7)) dw_hr = make({in_.P, in_.H}, type);
  }

  const LayerInputs& in_;
  const LayerGradients& g_;
  const LengthsAndResets masks_;
  const bool masked_;
  const int64_t needs_, width_;
  bool added_ = false;  // whether there was a chunk before
  std::optional<PackedGemm> times_w_ih_;
  OptionalTensor x_;
};

// The gates of a chunk once more, and c of an LSTM, by the forward's scan from the state before the chunk.
class GateRecompute {
 public:
  // in, g: outlive it. h_0, c_0: in the compute type. most: steps of a chunk.
  GateRecompute(const LayerInputs& in, const LayerGradients& g, const Layer& layer, const OptionalTensor& h_0,
                const OptionalTensor& c_0, int64_t most)
      : in_(in),
        g_(g),
        masks_(layer.masks),
        h_0_(h_0),
        c_0_(c_0),
        stride_(saved_of(in.cell) * in.H),
        projection_(in),
        h_(empty({in.B, in.N}, opmath_type(in.dtype))),
        y_(empty({most, in.B, in.N}, in.x.scalar_type())),
        gates_(empty({most, in.B, stride_}, opmath_type(in.dtype))) {
    if (is_half(in.dtype)) gx_ = empty({most * in.B, in.G * in.H}, opmath_type(in.dtype));
    if (in.cell == Cell::lstm) {
      c_ = empty({in.B, in.H}, opmath_type(in.dtype));
      c_kept_ = empty({most + 1, in.B, in.H}, opmath_type(in.dtype));
    }
    const Forward problem{layer,
                          pointer(in.b_ih),
                          pointer(in.b_hh),
                          h_.mutable_data_ptr(),
                          c_.has_value() ? c_->mutable_data_ptr() : nullptr,
                          nullptr,
                          in.I};
    scan_ = engine().forward(problem, in.T);
  }

  void run(BackwardChunk& chunk) {
    const int64_t n = chunk.n, previous = in_.reverse ? chunk.t0 + n : chunk.t0 - 1;
    load_state(g_.y, h_0_, previous, h_.mutable_data_ptr(), in_.N);
    ForwardChunk made{};
    made.t0 = chunk.t0, made.n = n;
    if (c_.has_value()) {
      const auto at = [&](int64_t step) {
        return static_cast<char*>(c_kept_->mutable_data_ptr()) + step * in_.B * in_.H * bytes();
      };
      load_state(*g_.c_kept, c_0_, previous, c_->mutable_data_ptr(), in_.H);
      std::copy_n(static_cast<const char*>(c_->const_data_ptr()), in_.B * in_.H * bytes(),
                  at(in_.reverse ? n : 0));
      made.c_kept = at(in_.reverse ? 0 : 1);
    }
    made.gx_stride = gx_.has_value() ? in_.G * in_.H : stride_;
    made.gx = projection_.run(chunk.t0, n, gx_.has_value() ? *gx_ : gates_, made.gx_stride, 0);
    made.y = y_.mutable_data_ptr(), made.y_stride = in_.N;
    made.gates = gates_.mutable_data_ptr();
    made.gates_stride = stride_;
    scan_->run(made);
    chunk.gates = made.gates;
    chunk.c_kept = made.c_kept;
  }

 private:
  int64_t bytes() const { return opmath_bytes(in_.dtype); }

  // The state [B, width] in the compute type after step `previous`; `first` (null: zeros) where there is
  // none.
  void load_state(const Tensor& states, const OptionalTensor& first, int64_t previous, void* to,
                  int64_t width) {
    const bool inside = previous >= 0 && previous < in_.T;
    OptionalTensor after;
    if (inside) {
      const int64_t stride = *row_stride(states);
      after = to_opmath(view(states, {in_.B, width}, {stride, 1}, previous * in_.B * stride), in_.dtype);
    }
    const int64_t count = width * bytes();
    char* row = static_cast<char*>(to);
    for (int64_t b = 0; b < in_.B; ++b, row += count) {
      const OptionalTensor& from = inside && masks_.valid(previous, b) ? after : first;
      if (from.has_value()) {
        const int64_t distance = from->stride(0) * bytes();
        std::copy_n(static_cast<const char*>(from->const_data_ptr()) + b * distance, count, row);
      } else {
        std::fill_n(row, count, 0);
      }
    }
  }

  const LayerInputs& in_;
  const LayerGradients& g_;
  const LengthsAndResets masks_;
  const OptionalTensor h_0_, c_0_;
  const int64_t stride_;
  const Projection projection_;
  const Tensor h_, y_, gates_;      // [B, N], [n, B, N], [n, B, saved H]
  OptionalTensor gx_, c_, c_kept_;  // [n B, G H] where it cannot stand in gates; [B, H], [n + 1, B, H]
  std::unique_ptr<ForwardScan> scan_;
};

}  // namespace

std::vector<Tensor> layer_backward(LayerInputs in, LayerGradients g, int64_t needs) {
  in.check();
  const ScalarType type = in.x.scalar_type();
  const bool lstm = in.cell == Cell::lstm;
  const int64_t saved = saved_of(in.cell), width = in.G * in.H;
  check(g.y, "y", type, {in.T, in.B, in.N});
  if (!row_stride(g.y).has_value()) g.y = torch::stable::contiguous(g.y);
  const bool recompute = saved != 0 && !g.gates.has_value();
  RNNKIT_CHECK(!lstm || g.c_kept.has_value(), "c must be given, as the forward gave it");
  expect(g.gates, "gates", opmath_type(in.dtype), {in.T, in.B, saved * in.H});
  expect(g.c_kept, "c", recompute ? type : opmath_type(in.dtype), {in.T, in.B, in.H});
  expect(g.gc_all, "gc_all", type, {in.T, in.B, in.H});
  Backward q{};
  if (g.gy.has_value()) {
    check(*g.gy, "gy", type, {in.T, in.B, in.N});
    if (g.gy->stride(2) != 1 && g.gy->stride(2) != 0) g.gy = torch::stable::contiguous(*g.gy);
    q.gy_strides = {g.gy->stride(0), g.gy->stride(1), in.N == 1 ? 1 : g.gy->stride(2)};
  }
  Tensor dh = state_grad(in, g.gh_n, "gh_n", in.N);
  OptionalTensor dc, dh_r, dc_r, h_0, c_0;
  if (lstm) dc = state_grad(in, g.gc_n, "gc_n", in.H);
  const bool resets = (needs >> 8 & 3) != 0;
  if (resets) dh_r = zeros({in.B, in.N}, opmath_type(in.dtype));
  if (resets && lstm) dc_r = zeros({in.B, in.H}, opmath_type(in.dtype));
  if (in.h_0.has_value()) h_0 = to_opmath(*in.h_0, in.dtype);
  if (in.c_0.has_value()) c_0 = to_opmath(*in.c_0, in.dtype);
  q.layer = in.layer();
  q.T = in.T;
  q.gy = pointer(g.gy);
  q.gc_all = pointer(g.gc_all);
  q.y = g.y.const_data_ptr(), q.y_stride = *row_stride(g.y);
  q.h_0 = pointer(h_0);
  q.c_0 = pointer(c_0);
  q.wants_initial_grads = (needs >> 1 & 3) != 0 || resets;
  q.dh = dh.mutable_data_ptr();
  q.dc = dc.has_value() ? dc->mutable_data_ptr() : nullptr;
  q.dh_r = dh_r.has_value() ? dh_r->mutable_data_ptr() : nullptr;
  q.dc_r = dc_r.has_value() ? dc_r->mutable_data_ptr() : nullptr;

  WeightGrads weight_grads(in, g, q.layer.masks, needs);
  if (in.T > 0 && in.B > 0 && in.H > 0) {
    const int64_t most = std::min(in.T, steps_at_a_time(in, recompute));
    const auto held = [&](int64_t columns) { return empty({most, in.B, columns}, type); };
    ChunkGrads s{0, 0, held(width), {}, {}, {}};
    if (in.cell == Cell::gru) s.dgn = held(in.H);
    if (in.P) s.dp = held(in.P);
    if (in.P || in.cell == Cell::gru_reset_before) s.second_operand = held(in.H);
    const auto memory = [](const OptionalTensor& v) {
      return v.has_value() ? v->mutable_data_ptr() : nullptr;
    };
    const BackwardChunk chunk{0,
                              0,
                              nullptr,
                              saved * in.H,
                              nullptr,
                              memory(s.dgx),
                              memory(s.dgn),
                              memory(s.dp),
                              memory(s.second_operand)};
    std::optional<GateRecompute> made;
    if (recompute) made.emplace(in, g, q.layer, h_0, c_0, most);
    const int64_t row = in.B * opmath_bytes(in.dtype);  // bytes of a step for one unit
    const auto from = [&](const OptionalTensor& v, int64_t offset) -> const void* {
      return v.has_value() ? static_cast<const char*>(v->const_data_ptr()) + offset : nullptr;
    };
    std::unique_ptr<BackwardScan> scan = engine().backward(q);
    for (int64_t done = 0; done < in.T;) {
      const int64_t n = std::min(most, in.T - done);
      BackwardChunk here = chunk;
      here.n = n, here.t0 = in.reverse ? done : in.T - done - n;
      if (made.has_value()) {
        made->run(here);
      } else {
        here.gates = from(g.gates, here.t0 * row * here.gates_stride);
        here.c_kept = from(g.c_kept, here.t0 * row * in.H);
      }
      scan->run(here);
      const auto first = [&](const OptionalTensor& v) -> OptionalTensor {
        if (!v.has_value()) return std::nullopt;
        return view(*v, {n, in.B, v->size(2)}, {in.B * v->size(2), v->size(2), 1}, 0);
      };
      if (done + n == in.T) {
        scan.reset(), made.reset();  // and their panels
        if (!q.wants_initial_grads) dh = Tensor(), dc.reset();
      }
      weight_grads.add({here.t0, n, *first(s.dgx), first(s.dgn), first(s.dp), first(s.second_operand)});
      done += n;
    }
  }

  const auto narrow = [&](const Tensor& v) { return is_half(in.dtype) ? torch::stable::to(v, type) : v; };
  std::vector<Tensor> out;
  const auto wanted = [&](int bit) { return (needs >> bit & 1) != 0; };
  if (wanted(0)) out.push_back(*weight_grads.dx);
  if (wanted(1)) out.push_back(narrow(dh));
  if (wanted(2)) out.push_back(narrow(*dc));
  if (wanted(3)) out.push_back(narrow(*weight_grads.dw_ih));
  if (wanted(4)) out.push_back(narrow(*weight_grads.dw_hh));
  if (wanted(5)) out.push_back(narrow(*weight_grads.db));
  if (wanted(6)) {
    Tensor recurrent = wanted(5) ? copy_of(*weight_grads.db) : *weight_grads.db;
    if (weight_grads.db_hn.has_value()) {
      const int64_t bytes = in.H * opmath_bytes(in.dtype);
      std::copy_n(static_cast<const char*>(weight_grads.db_hn->const_data_ptr()), bytes,
                  static_cast<char*>(recurrent.mutable_data_ptr()) + 2 * bytes);
    }
    out.push_back(narrow(recurrent));
  }
  if (wanted(7)) out.push_back(narrow(*weight_grads.dw_hr));
  if (wanted(8)) out.push_back(narrow(*dh_r));
  if (wanted(9)) out.push_back(narrow(*dc_r));
  return out;
}

}  // namespace rnnkit
