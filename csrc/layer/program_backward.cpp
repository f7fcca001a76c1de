// The backward of a layer of a user's cell: the scan gives the gradients of the projected input and of each
// product's results, and one product for each weight does the rest, chunk by chunk of time.

#include "program_layer.h"

namespace rnnkit {
namespace {

using RowPointers = std::vector<const void*>;

char* at(const void* base, int64_t elements, int64_t bytes) {
  return static_cast<char*>(const_cast<void*>(base)) + elements * bytes;
}

// What the backward is given beside the forward's tensors.
struct Given {
  std::vector<OptionalTensor> after;  // the states after each step, y first
  OptionalTensor first;               // the first in the compute type
  OptionalTensor saved, saved_rows;
  std::vector<OptionalTensor> last, every;  // gradients: of the last states; of the states after each step
};

Given read(const ProgramLayer& in, const std::vector<OptionalTensor>& tensors) {
  const int64_t n = in.header.states, T = in.T, B = in.B, H = in.H;
  const size_t count = in.inputs + static_cast<size_t>(3 * n + 3);
  RNNKIT_CHECK(tensors.size() == count, "there must be ", count, " tensors, got ", tensors.size());
  const ScalarType type = in.x.scalar_type(), wide = opmath_type(in.dtype);
  auto next = tensors.begin() + static_cast<int64_t>(in.inputs);
  Given g;
  const auto take = [&](ScalarType of, std::initializer_list<int64_t> sizes, const char* name) {
    OptionalTensor v = *next++;
    expect(v, name, of, sizes);
    return v;
  };
  for (int64_t s = 0; s < n; ++s) {
    g.after.push_back(take(s > 0 ? wide : type, {T, B, H}, "a state after each step"));
    if (s == 0) g.first = take(wide, {T, B, H}, "the first state after each step");
  }
  g.saved = take(wide, {in.header.saved, T, B, H}, "what was saved");
  g.saved_rows = take(wide, {in.header.saved_rows, T, B}, "what was saved per row");
  OptionalTensor gy = *next++;
  if (gy.has_value()) {
    rnnkit::check(*gy, "gy", type, {T, B, H});
    if (gy->stride(2) != 1 && gy->stride(2) != 0) gy = torch::stable::contiguous(*gy);
  }
  g.every.push_back(gy);
  for (int64_t s = 0; s < n; ++s) g.last.push_back(take(type, {1, B, H}, "the gradient of a state"));
  for (int64_t s = 1; s < n; ++s) g.every.push_back(take(type, {T, B, H}, "the gradient of a state"));
  for (int64_t s = 0; s < n; ++s)
    RNNKIT_CHECK(!in.header.needs[s] || g.after[s].has_value(), "state ", s, " must be given");
  return g;
}

// Where each row's numbers stand at n steps, where `alive` (empty: everywhere) says so.
RowPointers pointers(const ProgramMemory& m, int64_t n, int64_t B, int64_t bytes,
                     const std::vector<uint8_t>& alive) {
  RowPointers rows(n * B);
  for (int64_t t = 0, r = 0; t < n; ++t) {
    for (int64_t b = 0; b < B; ++b, ++r)
      rows[r] = alive.empty() || alive[r] ? at(m.first, t * m.step + b * m.row, bytes) : nullptr;
  }
  return rows;
}

class ProgramBackward {
 public:
  ProgramBackward(std::string_view program, std::string_view forward, int64_t heads, bool reverse,
                  std::string_view needs, const std::vector<OptionalTensor>& tensors)
      : in_(program, heads, reverse, true, tensors),
        g_(read(in_, tensors)),
        needs_(needs),
        n_(in_.header.states),
        T_(in_.T),
        B_(in_.B),
        H_(in_.H),
        width_(in_.G * in_.H),
        type_(in_.x.scalar_type()),
        wide_(opmath_type(in_.dtype)) {
    RNNKIT_CHECK(needs.size() == in_.inputs, "needs must have a byte for each of ", in_.inputs, " tensors");
    if ((in_.header.saved && !g_.saved.has_value()) ||
        (in_.header.saved_rows && !g_.saved_rows.has_value())) {
      again_.emplace(forward, heads, reverse, false, tensors);
      const ProgramHeader &made = again_->header, &read = in_.header;
      RNNKIT_CHECK(made.states == n_ && made.gates == read.gates && made.saved == read.saved &&
                       made.saved_rows == read.saved_rows && !made.keep_first,
                   "both programs must be of one cell");
    }
  }

  std::vector<OptionalTensor> run() {
    allocate();
    if (T_ > 0 && B_ > 0 && H_ > 0) scan();
    return results();
  }

 private:
  bool wanted(size_t k) const { return needs_[k] != 0; }
  // Where the forward's tensors stand: x first, then the states.
  size_t projection_at(size_t k) const { return 1 + static_cast<size_t>(n_) + k; }  // w_ih, b_ih, b_hh
  size_t weight_at(size_t k) const { return projection_at(3) + k; }
  size_t unit_at(size_t k) const { return weight_at(in_.weights.size()) + k; }
  size_t step_at(size_t k) const { return unit_at(in_.units.size()) + k; }
  size_t reset_at(size_t k) const { return step_at(in_.steps.size()) + 2 + k; }  // behind lengths and reset

  void allocate() {
    if (wanted(0)) dx_ = zeros_where(T_ == 0 || B_ == 0 || H_ == 0, {T_, B_, in_.x.size(2)}, type_);
    if (in_.w_ih.has_value() && wanted(projection_at(0))) dw_ih_ = zeros({width_, in_.I}, wide_);
    if (in_.b_ih.has_value()) db_ih_ = zeros({width_}, wide_);
    if (in_.b_hh.has_value()) db_hh_ = zeros({width_}, wide_);
    for (size_t k = 0; k < in_.weights.size(); ++k)
      dw_.push_back(zeros({in_.header.weight_blocks[k] * H_, H_ / in_.heads}, wide_));
    for (size_t k = 0; k < in_.units.size(); ++k) du_.push_back(zeros({H_}, wide_));
    for (size_t k = 0; k < in_.steps.size(); ++k) {
      if (!wanted(step_at(k))) {
        dsteps_.emplace_back();
      } else if (in_.header.row_steps[k]) {
        dsteps_.push_back(zeros({T_, B_}, type_));
      } else {
        dsteps_.push_back(zeros({T_, B_, H_}, type_));
      }
    }
    for (int64_t s = 0; s < n_; ++s) {
      dh_.push_back(empty({B_, H_}, wide_));
      in_.copy_state(g_.last[s], dh_.back());
      dr_.push_back(zeros({B_, H_}, wide_));
    }
  }

  static Tensor zeros_where(bool condition, std::initializer_list<int64_t> sizes, ScalarType type) {
    return condition ? zeros(sizes, type) : empty(sizes, type);
  }

  ProgramProblem problem() {
    ProgramProblem q = in_.problem();
    q.backward = true;
    for (int64_t s = 0; s < n_; ++s) {
      q.states.push_back(dh_[s].mutable_data_ptr());
      q.first.push_back(in_.states[s].has_value() ? in_.opmath(in_.states[s]).const_data_ptr() : nullptr);
      q.after.push_back(after(s, 0));
      const OptionalTensor& g = g_.every[s];
      q.grads.push_back(pointer(g));
      q.grad_strides.push_back(g.has_value() ? Strides{g->stride(0), g->stride(1), H_ == 1 ? 1 : g->stride(2)}
                                             : Strides{});
      q.d_resets.push_back(dr_[s].mutable_data_ptr());
    }
    q.wants_initial_grads = false;  // where nobody asks, the last step's product is left out
    for (size_t s = 0; s < static_cast<size_t>(n_); ++s)
      q.wants_initial_grads = q.wants_initial_grads || wanted(1 + s) || wanted(reset_at(s));
    for (size_t k = 0; k < in_.header.unit_sources.size(); ++k) {
      const ProgramHeader::Unit& u = in_.header.unit_sources[k];
      q.d_units.push_back(u.bias ? nullptr : du_[u.index].mutable_data_ptr());
    }
    return q;
  }

  void scan() {
    const int64_t rows = std::clamp<int64_t>(T_ * B_ / 8, 16, 512);
    int64_t most = std::min(T_, std::max<int64_t>(1, rows / B_));
    if (T_ * B_ <= H_ && !again_.has_value()) most = T_;
    const std::unique_ptr<ProgramScan> scan = engine().program(problem());
    const bool masked = in_.lengths.has_value() || in_.reset.has_value();
    const bool straight = !in_.w_ih.has_value() && dx_.has_value();  // dgx is what is asked for
    const Tensor dgx = straight ? *dx_ : empty({most, B_, width_}, type_);
    const OptionalTensor dys =
        in_.header.dys ? OptionalTensor(empty({most, B_, in_.header.dys * H_}, type_)) : std::nullopt;
    const OptionalTensor operands = in_.header.operands
                                        ? OptionalTensor(empty({in_.header.operands, most, B_, H_}, type_))
                                        : std::nullopt;
    std::vector<uint8_t> alive(masked ? most * B_ : 0, 1);
    for (int64_t done = 0; done < T_;) {
      const int64_t n = std::min(most, T_ - done), t0 = in_.reverse ? done : T_ - done - n;
      ProgramChunk chunk{t0, n, in_.step_memories(t0), masked ? alive.data() : nullptr};
      std::vector<ProgramMemory>& m = chunk.memory;
      saved_memories(t0, n, most, m);
      for (int64_t s = 0; s < n_; ++s) m.push_back(after(s, t0));
      const size_t first = m.size();
      for (int64_t k = 0; k < in_.G; ++k)
        m.push_back(in_.rows(dgx, straight ? t0 : 0, k * H_, width_, false));
      for (size_t k = 0; k < in_.steps.size(); ++k)
        m.push_back(in_.rows(dsteps_[k], t0, 0, in_.header.row_steps[k] ? 1 : H_, false));
      for (int64_t k = 0; k < in_.header.dys; ++k)
        m.push_back(in_.rows(dys, 0, k * H_, in_.header.dys * H_, false));
      for (int64_t k = 0; k < in_.header.operands; ++k)
        m.push_back(in_.rows(operands, 0, k * most * B_ * H_, H_, false));
      RNNKIT_CHECK(static_cast<int64_t>(m.size()) == in_.code.memories, "a program must fit its header");
      scan->run(chunk, in_.header.padded);
      weight_grads(chunk, m[first], alive);
      done += n;
    }
    scan->finish();
  }

  // The states after each step from t0 on, as they were computed where that was kept.
  ProgramMemory after(int64_t s, int64_t t0) const {
    const bool wide = s > 0 || g_.first.has_value();
    return in_.rows(s == 0 && wide ? g_.first : g_.after[s], t0, 0, H_, wide);
  }

  void saved_memories(int64_t t0, int64_t n, int64_t most, std::vector<ProgramMemory>& m) {
    const int64_t K = in_.header.saved, R = in_.header.saved_rows;
    if (!again_.has_value()) {
      for (int64_t k = 0; k < K; ++k) m.push_back(in_.rows(g_.saved, t0, k * T_ * B_ * H_, H_, true));
      for (int64_t k = 0; k < R; ++k) m.push_back(in_.rows(g_.saved_rows, t0, k * T_ * B_, 1, true));
      return;
    }
    if (forward_ == nullptr) {
      forward_ = std::make_unique<ProgramForward>(*again_, most);
      if (K) saved_ = empty({K, most, B_, H_}, wide_);
      if (R) saved_rows_ = empty({R, most, B_}, wide_);
    }
    load_states(in_.reverse ? t0 + n : t0 - 1);
    std::vector<ProgramMemory> results(static_cast<size_t>(n_), ProgramMemory{nullptr, true, 0, 0});
    for (int64_t k = 0; k < K; ++k) results.push_back(in_.rows(saved_, 0, k * most * B_ * H_, H_, true));
    for (int64_t k = 0; k < R; ++k) results.push_back(in_.rows(saved_rows_, 0, k * most * B_, 1, true));
    forward_->run(t0, n, results);
    m.insert(m.end(), results.begin() + n_, results.end());
  }

  // The states after step `previous`; those before the first step where a row has had none.
  void load_states(int64_t previous) {
    const bool inside = previous >= 0 && previous < T_;
    const auto* lengths = static_cast<const int64_t*>(pointer(in_.lengths));
    const int64_t bytes = opmath_bytes(in_.dtype);
    for (int64_t s = 0; s < n_; ++s) {
      const Tensor& to = forward_->states[s];
      in_.copy_state(in_.states[s], to);
      if (!inside) continue;
      const OptionalTensor& from = s == 0 && g_.first.has_value() ? g_.first : g_.after[s];
      RNNKIT_CHECK(from.has_value(), "state ", s, " must be given");
      const Tensor after = to_opmath(view(*from, {B_, H_}, {H_, 1}, previous * B_ * H_), in_.dtype);
      for (int64_t b = 0; b < B_; ++b) {
        if (lengths != nullptr && previous >= lengths[b]) continue;
        std::copy_n(at(after.const_data_ptr(), b * H_, bytes), H_ * bytes,
                    at(to.const_data_ptr(), b * H_, bytes));
      }
    }
  }

  // The states that the chunk's steps started from, of a type that products read.
  RowPointers states_before(int64_t s, const ProgramChunk& chunk, const std::vector<uint8_t>& alive) {
    const LengthsAndResets masks{static_cast<const int64_t*>(pointer(in_.lengths)),
                                 static_cast<const bool*>(pointer(in_.reset)), T_, B_};
    const int64_t bytes = bytes_of(in_.dtype);
    const void *first = pointer(in_.states[s]), *reset = pointer(in_.reset_states[s]);
    const void* const after = pointer(g_.after[s]);
    RowPointers rows(chunk.n * B_);
    for (int64_t k = 0, r = 0; k < chunk.n; ++k) {
      const int64_t t = chunk.t0 + k;
      for (int64_t b = 0; b < B_; ++b, ++r) {
        const int64_t start =
            in_.reverse ? (masks.lengths != nullptr ? std::min(masks.lengths[b], T_) : T_) - 1 : 0;
        if (!alive.empty() && !alive[r]) {
          rows[r] = nullptr;
        } else if (masks.resets_before(t, b, in_.reverse)) {
          rows[r] = reset == nullptr ? nullptr : at(reset, b * H_, bytes);
        } else if (t == start) {
          rows[r] = first == nullptr ? nullptr : at(first, b * H_, bytes);
        } else {
          rows[r] = at(after, ((in_.reverse ? t + 1 : t - 1) * B_ + b) * H_, bytes);
        }
      }
    }
    return rows;
  }

  // Some columns of the chunk's gradients, as a matrix.
  Tensor matrix(const ProgramMemory& m, int64_t rows, int64_t column, int64_t columns) const {
    const int64_t sizes[] = {rows, columns}, strides[] = {m.row, 1};
    using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
    return torch::stable::from_blob(at(m.first, column, bytes_of(in_.dtype)), Ints(sizes, 2),
                                    Ints(strides, 2), in_.x.device(), type_);
  }

  void weight_grads(const ProgramChunk& chunk, const ProgramMemory& dgx, const std::vector<uint8_t>& alive) {
    const int64_t rows = chunk.n * B_, bytes = bytes_of(in_.dtype);
    const Tensor d = matrix(dgx, rows, 0, width_);
    std::vector<WeightGrad> pairs;
    RowPointers of_x, operand;
    if (in_.w_ih.has_value()) {
      if (dx_.has_value()) {
        if (!times_w_ih_) times_w_ih_.emplace(*in_.w_ih, true, T_ * B_, T_ * B_ > 16);
        Tensor to = view(*dx_, {rows, in_.I}, {in_.I, 1}, chunk.t0 * B_ * in_.I);
        times_w_ih_->run(d, to);
      }
      if (!x_.has_value()) x_ = torch::stable::contiguous(in_.x);
      of_x = pointers({at(x_->const_data_ptr(), chunk.t0 * B_ * in_.I, bytes), false, B_ * in_.I, in_.I},
                      chunk.n, B_, bytes, alive);
      if (dw_ih_.has_value()) pairs.push_back({of_x, *dw_ih_});
    }
    const auto shared = [&](const ProgramHeader::WeightGrad& g) {
      return is_dgx(g, chunk, dgx) && in_.heads == 1;
    };
    bool done = false;  // one product whose gradients are those of the projected input goes with it
    for (const ProgramHeader::WeightGrad& g : in_.header.grads) {
      if (done || !shared(g) || !wanted(weight_at(g.weight))) continue;
      operand = operand_rows(g, chunk, alive, bytes);
      pairs.push_back({operand, dw_[g.weight]});
      done = true;
    }
    gemm_tn(d, pairs, sum_of_dgx(chunk, dgx), true);
    bool first = true;
    for (const ProgramHeader::WeightGrad& g : in_.header.grads) {
      const bool together = first && done && shared(g) && wanted(weight_at(g.weight));
      if (together) first = false;
      product_grads(g, chunk, dgx, alive, bytes, together);
    }
  }

  bool is_dgx(const ProgramHeader::WeightGrad& g, const ProgramChunk& chunk, const ProgramMemory& dgx) const {
    return chunk.memory[g.dy].first == dgx.first && g.blocks == in_.G;
  }

  // The gradient of b_ih, of b_hh, or of both where W_hh h meets the projected input as it is.
  OptionalTensor sum_of_dgx(const ProgramChunk& chunk, const ProgramMemory& dgx) {
    bool recurrent = false;
    for (const ProgramHeader::WeightGrad& g : in_.header.grads)
      recurrent = recurrent || (g.weight == 0 && in_.header.has_w_hh && is_dgx(g, chunk, dgx));
    if (!db_ih_.has_value()) return recurrent ? db_hh_ : std::nullopt;
    bias_is_db_ih_ = recurrent && db_hh_.has_value();
    return db_ih_;
  }

  RowPointers operand_rows(const ProgramHeader::WeightGrad& g, const ProgramChunk& chunk,
                           const std::vector<uint8_t>& alive, int64_t bytes) {
    return g.state >= 0 ? states_before(g.state, chunk, alive)
                        : pointers(chunk.memory[g.memory], chunk.n, B_, bytes, alive);
  }

  // The gradients of a product's weight, unless it was `made`, and of its bias.
  void product_grads(const ProgramHeader::WeightGrad& g, const ProgramChunk& chunk, const ProgramMemory& dgx,
                     const std::vector<uint8_t>& alive, int64_t bytes, bool made) {
    const int64_t rows = chunk.n * B_, head = H_ / in_.heads;
    const ProgramMemory& dy = chunk.memory[g.dy];
    const bool bias = g.weight == 0 && in_.header.has_w_hh && db_hh_.has_value();
    if (bias && !is_dgx(g, chunk, dgx)) {
      gemm_tn(matrix(dy, rows, 0, g.blocks * H_), {}, db_hh_, true);
    }
    if (made || !wanted(weight_at(g.weight))) return;
    const RowPointers operand = operand_rows(g, chunk, alive, bytes);
    for (int64_t h = 0; h < in_.heads; ++h) {
      RowPointers part = operand;
      for (const void*& p : part) p = p == nullptr ? nullptr : at(p, h * head, bytes);
      const int64_t blocks = in_.heads == 1 ? 1 : g.blocks, tall = in_.heads == 1 ? g.blocks * H_ : head;
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t row = k * H_ + h * head;
        gemm_tn(matrix(dy, rows, row, tall),
                {{part, view(dw_[g.weight], {tall, head}, {head, 1}, row * head)}}, {}, true);
      }
    }
  }

  std::vector<OptionalTensor> results() {
    const auto narrow = [&](const Tensor& v) { return is_half(in_.dtype) ? torch::stable::to(v, type_) : v; };
    std::vector<OptionalTensor> out(in_.inputs);
    const auto give = [&](size_t k, const OptionalTensor& v) {
      if (wanted(k) && v.has_value()) out[k] = narrow(*v);
    };
    if (wanted(0)) out[0] = dx_;
    give(projection_at(0), dw_ih_), give(projection_at(1), db_ih_);
    if (bias_is_db_ih_ && wanted(projection_at(2))) {
      const Tensor copy = empty({width_}, wide_);
      std::copy_n(static_cast<const char*>(db_ih_->const_data_ptr()), width_ * opmath_bytes(in_.dtype),
                  static_cast<char*>(copy.mutable_data_ptr()));
      db_hh_ = copy;
    }
    give(projection_at(2), db_hh_);
    for (size_t s = 0; s < static_cast<size_t>(n_); ++s) give(1 + s, dh_[s]), give(reset_at(s), dr_[s]);
    for (size_t k = 0; k < dw_.size(); ++k) give(weight_at(k), dw_[k]);
    for (size_t k = 0; k < du_.size(); ++k) give(unit_at(k), du_[k]);
    for (size_t k = 0; k < dsteps_.size(); ++k) {
      if (wanted(step_at(k))) out[step_at(k)] = dsteps_[k];
    }
    return out;
  }

  ProgramLayer in_;
  const Given g_;
  const std::string_view needs_;
  const int64_t n_, T_, B_, H_, width_;
  const ScalarType type_, wide_;
  std::optional<ProgramLayer> again_;  // where what was not saved is made again
  std::unique_ptr<ProgramForward> forward_;
  OptionalTensor saved_, saved_rows_, x_;
  std::optional<PackedGemm> times_w_ih_;
  OptionalTensor dx_, dw_ih_, db_ih_, db_hh_;
  std::vector<OptionalTensor> dsteps_;
  std::vector<Tensor> dw_, du_, dh_, dr_;
  bool bias_is_db_ih_ = false;
};

}  // namespace

std::vector<OptionalTensor> program_backward(std::string_view program, std::string_view forward,
                                             int64_t heads, int64_t reverse, std::string_view needs,
                                             const std::vector<OptionalTensor>& tensors) {
  return ProgramBackward(program, forward, heads, reverse != 0, needs, tensors).run();
}

}  // namespace rnnkit
