// The forward of a layer: x is projected in chunks of time, each chunk scanned while it is in the
// cache, so that inference needs no memory that grows with T beyond its output. In training the projection is
// written where the gates will stand.

#include "layer.h"

namespace rnnkit {

Tensor to_opmath(const Tensor& v, Dtype dtype) {
  return is_half(dtype) ? torch::stable::to(v, opmath_type(dtype)) : v;
}

const void* Projection::run(int64_t t0, int64_t n, const Tensor& gx, int64_t stride, int64_t offset) const {
  const Tensor& x = in_.x;
  const int64_t rows = n * in_.B, I = in_.I;
  void* first = static_cast<char*>(gx.mutable_data_ptr()) + offset * opmath_bytes(in_.dtype);
  if (gemm_.own() != nullptr && x.is_contiguous()) {
    const auto* from = static_cast<const char*>(x.const_data_ptr()) + t0 * in_.B * I * bytes_of(in_.dtype);
    gemm_.own()->run(rows, from, I, first, stride, true, workers());
    return first;
  }
  const auto strides = x.strides();
  const Tensor rows_of_x =
      x.is_contiguous() ? view(x, {rows, I}, {I, 1}, t0 * in_.B * I)
                        : view(torch::stable::contiguous(view(
                                   x, {n, in_.B, I}, {strides[0], strides[1], strides[2]}, t0 * strides[0])),
                               {rows, I}, {I, 1}, 0);
  Tensor out = view(gx, {rows, in_.G * in_.H}, {stride, 1}, offset);
  gemm_.run(rows_of_x, out);
  return first;
}

void LayerInputs::check() {
  RNNKIT_CHECK(x.dim() == 3, "x must be [T, B, I], got ", shown(x.sizes()));
  RNNKIT_CHECK(w_hh.dim() == 2, "w_hh must be [G H, N], got ", shown(w_hh.sizes()));
  dtype = dtype_of(x);
  G = gates_of(cell);
  T = x.size(0), B = x.size(1), I = x.size(2);
  RNNKIT_CHECK(w_hh.size(0) % G == 0, "w_hh must have ", G, " blocks of rows, got ", w_hh.size(0), " rows");
  H = w_hh.size(0) / G;
  if (w_hr.has_value()) {
    RNNKIT_CHECK(cell == Cell::lstm, "w_hr must be absent but for an LSTM");
    RNNKIT_CHECK(w_hr->dim() == 2 && w_hr->size(0) > 0, "w_hr must be [P, H] with P > 0, got ",
                 shown(w_hr->sizes()));
    P = w_hr->size(0);
  }
  N = P ? P : H;
  RNNKIT_CHECK(B < (int64_t{1} << 31), "B must be below 2^31, got ", B);
  const ScalarType type = x.scalar_type();
  rnnkit::check(x, "x", type, {T, B, I});
  expect(w_ih, "w_ih", type, {G * H, I});
  expect(w_hh, "w_hh", type, {G * H, N});
  expect(b_ih, "b_ih", type, {G * H});
  expect(b_hh, "b_hh", type, {G * H});
  RNNKIT_CHECK(b_ih.has_value() == b_hh.has_value(), "b_ih and b_hh must both be given, or neither");
  expect(w_hr, "w_hr", type, {P, H});
  expect(h_0, "h_0", type, {B, N});
  expect(c_0, "c_0", type, {B, H});
  expect(lengths, "lengths", ScalarType::Long, {B});
  expect(reset, "reset", ScalarType::Bool, {T, B});
  expect(h_r, "h_r", type, {B, N});
  expect(c_r, "c_r", type, {B, H});
}

Layer LayerInputs::layer() {
  if (h_r.has_value()) h_r_opmath = to_opmath(*h_r, dtype);
  if (c_r.has_value()) c_r_opmath = to_opmath(*c_r, dtype);
  Layer l{};
  l.cell = cell, l.dtype = dtype;
  l.B = B, l.H = H, l.P = P;
  l.reverse = reverse;
  l.masks = {static_cast<const int64_t*>(pointer(lengths)), static_cast<const bool*>(pointer(reset)), T, B};
  l.w_hh = w_hh.const_data_ptr();
  l.w_hr = pointer(w_hr);
  l.h_r = pointer(h_r_opmath);
  l.c_r = pointer(c_r_opmath);
  l.workers = workers();
  return l;
}

namespace {

// The state [B, width] in the compute type, which a scan updates; in the end in the dtype of x.
class StateBuffer {
 public:
  StateBuffer(const OptionalTensor& first, int64_t rows, int64_t width, Dtype dtype)
      : dtype_(dtype), state_(empty({rows, width}, opmath_type(dtype))) {
    if (first.has_value()) {
      const Tensor from = to_opmath(*first, dtype);
      std::copy_n(static_cast<const char*>(from.const_data_ptr()), bytes(), static_cast<char*>(data()));
    } else {
      std::fill_n(static_cast<char*>(data()), bytes(), 0);
    }
  }
  void* data() const { return state_.mutable_data_ptr(); }
  Tensor result(ScalarType type) const { return is_half(dtype_) ? torch::stable::to(state_, type) : state_; }

 private:
  int64_t bytes() const { return state_.numel() * opmath_bytes(dtype_); }

  Dtype dtype_;
  Tensor state_;
};

// Steps that are projected and scanned at a time: few enough that they stay in the second-level cache beside
// weights. All at once where they take much less memory than W_hh, which is packed when W_ih's panels are
// gone.
int64_t steps_at_a_time(const LayerInputs& in) {
  if (in.T * in.B <= in.N / 4) return in.T;
  const int64_t bytes = std::max<int64_t>(1, in.G * in.H * 4);
  const int64_t rows = std::clamp<int64_t>((int64_t{256} << 10) / bytes, 48, 512);
  return std::max<int64_t>(1, rows / std::max<int64_t>(1, in.B));
}

// Whether the scan multiplies x itself, so that the projection is neither written nor read. It reads W_ih at
// every step then, which pays where there are rows enough to use it: measured on a Zen 4, see docs/cpu.md.
bool scan_multiplies_x(const LayerInputs& in) {
  if (in.I == 0 || in.I > 8 * in.B || in.T == 1) return false;
  // half types that are widened it would widen at every step; dot products read pairs
  const bool pairs = in.dtype == Dtype::bf16 && engine().multiplies_bf16 && in.I % 2 == 0;
  if (is_half(in.dtype) && !pairs) return false;
  if (in.I > 1 && in.x.stride(2) != 1) return false;
  return in.I <= 8 || !torch_multiplies(in.w_ih, in.T * in.B, in.G * in.H, in.I);
}

char* at(void* base, int64_t elements, int64_t bytes) { return static_cast<char*>(base) + elements * bytes; }

// Projects x and scans, some steps at a time.
template <class ChunkAt>
void project_and_scan(const LayerInputs& in, int64_t chunk_steps, const OptionalTensor& gates, int64_t saved,
                      const ChunkAt& chunk_at, const Forward& problem) {
  const int64_t width = in.G * in.H;
  std::optional<Projection> projection(in);
  std::unique_ptr<ForwardScan> scan;
  const int64_t most = std::min(in.T, chunk_steps > 0 ? chunk_steps : steps_at_a_time(in));
  const bool in_place = saved && !is_half(in.dtype);
  // rows an odd number of cache lines apart do not fall into the same sets of the first-level cache
  const int64_t line = 64 / opmath_bytes(in.dtype);
  const int64_t stride = in_place ? saved * in.H : ((width + line - 1) / line | 1) * line;
  OptionalTensor buffer;
  if (!in_place) buffer = empty({most * in.B, stride}, opmath_type(in.dtype));
  for (int64_t done = 0; done < in.T;) {
    const int64_t n = std::min(most, in.T - done);
    const int64_t t0 = in.reverse ? in.T - done - n : done;
    ForwardChunk chunk = chunk_at(t0, n);
    chunk.gx = projection->run(t0, n, in_place ? *gates : *buffer, stride, in_place ? t0 * in.B * stride : 0);
    chunk.gx_stride = stride;
    if (done + n == in.T) projection.reset();
    if (scan == nullptr) scan = engine().forward(problem, in.T);
    scan->run(chunk);
    done += n;
  }
}

}  // namespace

std::vector<Tensor> layer_forward(LayerInputs in, bool all_states, bool save, int64_t chunk_steps,
                                  OptionalTensor into) {
  in.check();
  const ScalarType type = in.x.scalar_type();
  const bool lstm = in.cell == Cell::lstm;
  const int64_t saved = save ? saved_of(in.cell) : 0;
  StateBuffer h(in.h_0, in.B, in.N, in.dtype);
  std::optional<StateBuffer> c;
  if (lstm) c.emplace(in.c_0, in.B, in.H, in.dtype);

  if (into.has_value()) check(*into, "y", type, {in.T, in.B, in.N});
  Tensor y = into.has_value() ? *into : empty({in.T, in.B, in.N}, type);
  const auto y_stride = row_stride(y);
  RNNKIT_CHECK(y_stride.has_value(), "y must have rows in equal distances");
  OptionalTensor c_all, gates, c_kept;
  if (lstm && all_states) c_all = empty({in.T, in.B, in.H}, type);
  if (saved) gates = empty({in.T, in.B, saved * in.H}, opmath_type(in.dtype));
  if (saved && lstm) c_kept = empty({in.T, in.B, in.H}, opmath_type(in.dtype));

  if (in.T > 0 && in.B > 0 && in.H > 0) {
    const bool inside = scan_multiplies_x(in);
    Forward problem{in.layer(), pointer(in.b_ih),           pointer(in.b_hh),
                    h.data(),   lstm ? c->data() : nullptr, inside ? in.w_ih.const_data_ptr() : nullptr,
                    in.I};
    const int64_t bytes = bytes_of(in.dtype), opmath_size = opmath_bytes(in.dtype);
    const auto chunk_at = [&](int64_t t0, int64_t n) {
      ForwardChunk chunk{};
      chunk.t0 = t0, chunk.n = n;
      chunk.y = at(y.mutable_data_ptr(), t0 * in.B * *y_stride, bytes);
      chunk.y_stride = *y_stride;
      if (c_all.has_value()) chunk.c_all = at(c_all->mutable_data_ptr(), t0 * in.B * in.H, bytes);
      if (gates.has_value()) {
        chunk.gates = at(gates->mutable_data_ptr(), t0 * in.B * saved * in.H, opmath_size);
        chunk.gates_stride = saved * in.H;
      }
      if (c_kept.has_value()) chunk.c_kept = at(c_kept->mutable_data_ptr(), t0 * in.B * in.H, opmath_size);
      return chunk;
    };
    if (inside) {
      ForwardChunk chunk = chunk_at(0, in.T);
      chunk.x = in.x.const_data_ptr();
      chunk.x_step = in.x.stride(0), chunk.x_row = in.x.stride(1);
      engine().forward(problem, in.T)->run(chunk);
    } else {
      project_and_scan(in, chunk_steps, gates, saved, chunk_at, problem);
    }
  }
  std::vector<Tensor> out{y, h.result(type)};
  if (lstm) out.push_back(c->result(type));
  for (const OptionalTensor& v : {c_all, gates, c_kept}) {
    if (v.has_value()) out.push_back(*v);
  }
  return out;
}

}  // namespace rnnkit
