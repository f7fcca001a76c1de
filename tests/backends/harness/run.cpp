// Operands and results of the engine's interface, csrc/cpu/scan.h.

#include "run.h"

#include <numeric>
#include <stdexcept>

namespace harness {

Buffer::Buffer(int64_t count, Dtype dtype, bool shift)
    : dtype_(dtype),
      count_(count),
      size_(format(dtype).bytes),
      skip_(shift ? size_ : 0),
      bytes_(new char[count * size_ + skip_]) {
  for (int64_t k = 0; k < count; ++k) put(untouched, dtype, at(k));
}

Buffer::Buffer(const Values& values, Dtype dtype, bool shift)
    : Buffer(static_cast<int64_t>(values.size()), dtype, shift) {
  for (size_t k = 0; k < values.size(); ++k) put(values[k], dtype, at(static_cast<int64_t>(k)));
}

Values Buffer::values() const {
  Values v(count_);
  for (int64_t k = 0; k < count_; ++k) v[k] = (*this)[k];
  return v;
}

namespace {

// [rows, width] with `gap` elements after each row.
Values spread(const Values& v, int64_t rows, int64_t width, int64_t stride) {
  Values out(rows * stride, untouched);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(v.begin() + r * width, width, out.begin() + r * stride);
  return out;
}

// The inverse; throws where a gap was written to.
Values gathered(const Buffer& v, int64_t rows, int64_t width, int64_t stride, const char* name) {
  Values out;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < stride; ++k) {
      const double x = v[r * stride + k];
      if (k < width) out.push_back(x);
      if (k >= width && x != untouched)
        throw std::runtime_error(std::string("the gap in ") + name + " was written to");
    }
  }
  return out;
}

// The operands that both directions read.
class Common {
 public:
  Common(const Problem& p, const Way& way)
      : p_(p),
        w_hh_(p.w_hh, p.dtype, p.unaligned),
        w_hr_(p.w_hr, p.dtype, p.unaligned),
        h_r_(p.h_r, p.opmath(), p.unaligned),
        c_r_(p.c_r, p.opmath(), p.unaligned),
        reset_(new bool[p.reset.size()]) {
    std::copy(p.reset.begin(), p.reset.end(), reset_.get());
    layer.cell = p.cell, layer.dtype = p.dtype;
    layer.B = p.B, layer.H = p.H, layer.P = p.P;
    layer.reverse = p.reverse;
    layer.masks = {p.has_lengths ? p.lengths.data() : nullptr, p.has_reset ? reset_.get() : nullptr, p.T,
                   p.B};
    layer.w_hh = w_hh_.data();
    layer.w_hr = p.P ? w_hr_.data() : nullptr;
    layer.h_r = p.has_h_r ? h_r_.data() : nullptr;
    layer.c_r = p.has_c_r ? c_r_.data() : nullptr;
    layer.workers = way.workers;
  }
  Common(const Common&) = delete;

  rnnkit::Layer layer{};

 private:
  const Problem& p_;
  Buffer w_hh_, w_hr_, h_r_, c_r_;
  std::unique_ptr<bool[]> reset_;
};

Values identity(int64_t n) {
  Values eye(n * n, 0);
  for (int64_t k = 0; k < n; ++k) eye[k * n + k] = 1;
  return eye;
}

}  // namespace

Ran run_forward(const rnnkit::Engine& engine, const Problem& p, const How& how) {
  const int64_t N = p.N(), H = p.H, width = p.G() * H, kept = (how.save ? p.saved() : 0) * H, all = p.T * p.B;
  const int64_t gx_stride = std::max(width, how.in_place ? kept : 0) + p.gap;
  const int64_t gates_stride = how.in_place ? gx_stride : kept + p.gap;
  const int64_t in = format(p.dtype).bytes, opmath = format(p.opmath()).bytes;
  const Common common(p, how.way);
  const Dtype x_dtype = how.inside ? p.dtype : p.opmath();
  const Buffer gx(spread(p.gx, all, width, gx_stride), x_dtype, p.unaligned);
  const Buffer gates(how.in_place || kept == 0 ? 0 : all * gates_stride, p.opmath(), p.unaligned);
  const Buffer b_ih(p.b_ih, p.dtype, p.unaligned), b_hh(p.b_hh, p.dtype, p.unaligned);
  const Buffer h(p.h_0, p.opmath(), p.unaligned), c(p.c_0, p.opmath(), p.unaligned);
  const Buffer y(all * N, p.dtype, p.unaligned), c_all(p.all_states ? all * H : 0, p.dtype, p.unaligned);
  const bool keeps_c = p.lstm() && kept != 0;
  const Buffer c_kept(keeps_c ? all * H : 0, p.opmath(), p.unaligned);
  rnnkit::Forward f{common.layer, nullptr, nullptr, h.data(), p.lstm() ? c.data() : nullptr, nullptr, 0};
  const Buffer w_ih(how.inside ? identity(width) : Values{}, p.dtype, p.unaligned);
  if (how.inside) f.w_ih = w_ih.data(), f.I = width;
  if (p.bias) f.b_ih = b_ih.data(), f.b_hh = b_hh.data();
  const std::unique_ptr<rnnkit::ForwardScan> scan = engine.forward(f, p.T);

  Ran ran;
  ran.h.push_back(h.values()), ran.c.push_back(c.values());
  std::vector<int64_t> chunks = how.chunks;
  if (chunks.empty()) chunks.push_back(p.T);
  int64_t done = 0;
  for (int64_t n : chunks) {
    const int64_t t0 = p.reverse ? p.T - done - n : done, first = t0 * p.B;
    rnnkit::ForwardChunk r{};
    r.t0 = t0, r.n = n;
    (how.inside ? r.x : r.gx) = gx.data() + first * gx_stride * format(x_dtype).bytes;
    r.gx_stride = r.x_row = gx_stride, r.x_step = p.B * gx_stride;
    r.y = y.data() + first * N * in, r.y_stride = N;
    if (p.all_states) r.c_all = c_all.data() + first * H * in;
    if (kept != 0) r.gates = (how.in_place ? gx : gates).data() + first * gates_stride * opmath;
    r.gates_stride = gates_stride;
    if (keeps_c) r.c_kept = c_kept.data() + first * H * opmath;
    scan->run(r);
    done += n;
    ran.h.push_back(h.values()), ran.c.push_back(c.values());
  }
  ran.saved.y = y.values();
  ran.c_all = c_all.values();
  ran.saved.c = c_kept.values();
  const Buffer& holder = how.in_place ? gx : gates;
  if (kept != 0) {
    // In place a row may be longer than what is saved: then the rest of it is input.
    const int64_t used = how.in_place ? std::max(width, kept) : kept;
    const Values rows = gathered(holder, all, used, gates_stride, "gates");
    for (int64_t r = 0; r < all; ++r) {
      ran.saved.gates.insert(ran.saved.gates.end(), rows.begin() + r * used, rows.begin() + r * used + kept);
    }
  }
  if (!how.in_place && !all_same(gathered(gx, all, width, gx_stride, "gx"), p.gx)) {
    throw std::runtime_error("gx was written to");
  }
  return ran;
}

Gradients run_backward(const rnnkit::Engine& engine, const Problem& p, const Saved& saved, const Way& way,
                       const std::vector<int64_t>& chunks, bool wants_initial_grads) {
  const int64_t N = p.N(), H = p.H, kept = p.saved() * H, all = p.T * p.B, stride = kept + p.gap;
  const Common common(p, way);
  const Dtype opmath = p.opmath();
  const bool shift = p.unaligned, gru = p.cell == Cell::gru;
  const Buffer gy(p.gy, p.dtype, shift), gc_all(p.gc_all, p.dtype, shift), y(saved.y, p.dtype, shift);
  const Buffer gates(kept != 0 ? spread(saved.gates, all, kept, stride) : Values{}, opmath, shift);
  const Buffer c(saved.c, opmath, shift), h_0(p.h_0, opmath, shift), c_0(p.c_0, opmath, shift);
  const Buffer dgx(all * p.G() * H, p.dtype, shift), dgn(gru ? all * H : 0, p.dtype, shift);
  const Buffer dp(p.P ? all * N : 0, p.dtype, shift), dh(p.gh_n, opmath, shift), dc(p.gc_n, opmath, shift);
  const Buffer dh_r(p.asks_h_r ? p.B * N : 0, opmath, shift), dc_r(p.asks_c_r ? p.B * H : 0, opmath, shift);
  const bool twice = p.P != 0 || p.cell == Cell::gru_reset_before;
  const Buffer second_operand(twice ? all * H : 0, p.dtype, shift);
  rnnkit::Backward q{};
  q.layer = common.layer;
  q.T = p.T;
  q.gy = p.has_gy ? gy.data() : nullptr;
  q.gy_strides = p.gy_strides;
  q.gc_all = p.has_gc_all ? gc_all.data() : nullptr;
  q.y = y.data(), q.y_stride = N;
  if (p.lstm()) q.dc = dc.data();
  q.h_0 = p.has_h_0 ? h_0.data() : nullptr;
  q.c_0 = p.lstm() && p.has_c_0 ? c_0.data() : nullptr;
  q.wants_initial_grads = wants_initial_grads;
  q.dh = dh.data();
  q.dh_r = p.asks_h_r ? dh_r.data() : nullptr;
  q.dc_r = p.asks_c_r ? dc_r.data() : nullptr;
  const auto scan = engine.backward(q);
  const int64_t size = p.dtype == Dtype::f64 ? 8 : p.dtype == Dtype::f32 ? 4 : 2;
  std::vector<int64_t> steps = chunks.empty() ? std::vector<int64_t>{p.T} : chunks;
  int64_t done = 0;
  for (int64_t n : steps) {
    rnnkit::BackwardChunk chunk{};
    chunk.t0 = p.reverse ? done : p.T - done - n, chunk.n = n;
    const auto from = [&](const Buffer& v, int64_t width) {
      return v.data() + chunk.t0 * p.B * width * size;
    };
    const int64_t first = chunk.t0 * p.B * format(opmath).bytes;
    chunk.gates = kept != 0 ? gates.data() + first * stride : nullptr;
    chunk.gates_stride = stride;
    chunk.c_kept = p.lstm() ? c.data() + first * H : nullptr;
    chunk.dgx = from(dgx, p.G() * H);
    chunk.dgn = gru ? from(dgn, H) : nullptr;
    chunk.dp = p.P ? from(dp, N) : nullptr;
    chunk.second_operand = twice ? from(second_operand, H) : nullptr;
    scan->run(chunk);
    done += n;
  }
  return {{dgx.values(), dgn.values(), dp.values(), dh.values(), dc.values(), dh_r.values(), dc_r.values()}};
}

}  // namespace harness
