// A layer of a cell that a user wrote: its tensors are looked at, x is projected in chunks of time and
// scanned.

#include <string>
#include <unordered_map>

#include "program_layer.h"

namespace rnnkit {
namespace {

char* at(const void* base, int64_t elements, int64_t bytes) {
  return static_cast<char*>(const_cast<void*>(base)) + elements * bytes;
}

int64_t word(const int64_t*& at, const int64_t* end, int64_t least, int64_t most) {
  RNNKIT_CHECK(at < end && *at >= least && *at <= most, "the header of a program must hold other numbers");
  return *at++;
}

ProgramHeader read_header(const int64_t*& at, const int64_t* end) {
  const auto size = [&] { return word(at, end, 0, 4096); };
  const auto flag = [&] { return word(at, end, 0, 1) == 1; };
  ProgramHeader h{};
  h.gates = size(), h.states = word(at, end, 1, 64), h.units = size(), h.weights = size();
  for (int64_t k = 0; k < h.weights; ++k) h.weight_blocks.push_back(word(at, end, 1, 64));
  h.has_w_hh = flag();
  for (int64_t k = size(); k > 0; --k) h.row_steps.push_back(flag());
  h.saved = size(), h.saved_rows = size(), h.keep_first = flag();
  for (int64_t k = size(); k > 0; --k) {
    const bool bias = flag();
    h.unit_sources.push_back({bias, word(at, end, 0, (bias ? h.gates : h.units) - 1)});
  }
  for (int64_t k = size(); k > 0; --k) {
    const bool b_hh = flag();
    h.bias_sources.push_back({b_hh, word(at, end, INT64_MIN, INT64_MAX)});
  }
  h.dys = size(), h.operands = size();
  for (int64_t k = size(); k > 0; --k) {
    ProgramHeader::WeightGrad g{};
    g.weight = word(at, end, 0, h.weights - 1), g.blocks = h.weight_blocks[g.weight];
    g.dy = size(), g.state = word(at, end, -1, h.states - 1), g.memory = word(at, end, -1, 4096);
    h.grads.push_back(g);
  }
  for (int64_t k = 0; k < h.states; ++k) h.needs.push_back(flag());
  for (int64_t k = size(); k > 0; --k) h.padded.push_back(word(at, end, -4097, 4096));
  return h;
}

ReadProgram read_program(std::string_view program) {
  RNNKIT_CHECK(program.size() % sizeof(int64_t) == 0, "a program must be whole words, got ", program.size(),
               " bytes");
  std::vector<int64_t> words(program.size() / sizeof(int64_t));
  std::copy_n(program.data(), program.size(), reinterpret_cast<char*>(words.data()));
  const int64_t *from = words.data(), *end = from + words.size();
  ReadProgram read;
  ProgramHeader& header = read.header = read_header(from, end);
  const Program& code = read.code = Program::read(from, static_cast<size_t>(end - from));
  RNNKIT_CHECK(code.states == header.states && code.weights == header.weights &&
                   code.units == static_cast<int64_t>(header.unit_sources.size()) &&
                   code.biases == static_cast<int64_t>(header.bias_sources.size()),
               "a program must fit its header");
  return read;
}

// Read once by a thread: to read the words takes longer than some steps of a small layer.
std::shared_ptr<const ReadProgram> known_program(std::string_view program) {
  constexpr size_t most = 256;
  thread_local std::unordered_map<std::string, std::shared_ptr<const ReadProgram>> known;
  std::string words(program);
  const auto found = known.find(words);
  if (found != known.end()) return found->second;
  auto read = std::make_shared<const ReadProgram>(read_program(program));
  if (known.size() >= most) known.clear();
  known.emplace(std::move(words), read);
  return read;
}

}  // namespace

ProgramLayer::ProgramLayer(std::string_view program, int64_t heads_, bool reverse_, bool backward,
                           const std::vector<OptionalTensor>& tensors)
    : read_(known_program(program)),
      header(read_->header),
      code(read_->code),
      heads(heads_),
      reverse(reverse_) {
  const size_t count = 6 + 2 * header.states + header.weights + header.units + header.row_steps.size();
  RNNKIT_CHECK(tensors.size() >= count, "there must be ", count, " tensors, got ", tensors.size());
  inputs = count;
  auto next = tensors.begin();
  RNNKIT_CHECK(next->has_value(), "x must be given");
  x = **next++;
  const auto take = [&](int64_t n, std::vector<OptionalTensor>& into) {
    into.assign(next, next + n);
    next += n;
  };
  take(header.states, states);
  w_ih = *next++, b_ih = *next++, b_hh = *next++;
  take(header.weights, weights), take(header.units, units);
  take(static_cast<int64_t>(header.row_steps.size()), steps);
  lengths = *next++, reset = *next++;
  take(header.states, reset_states);
  check();
  check_places(backward);
}

void ProgramLayer::check_places(bool backward) const {
  const int64_t n = header.states, step_count = static_cast<int64_t>(header.row_steps.size());
  std::vector<bool> rows;  // of each memory
  const auto add = [&](int64_t count, bool row) { rows.insert(rows.end(), count, row); };
  if (!backward) add(header.gates, false);
  rows.insert(rows.end(), header.row_steps.begin(), header.row_steps.end());
  if (!backward) add(n, false);
  add(header.saved, false), add(header.saved_rows, true);
  if (!backward && header.keep_first) add(1, false);
  const int64_t readable = backward ? static_cast<int64_t>(rows.size()) : header.gates + step_count;
  const int64_t dgx = static_cast<int64_t>(rows.size()) + n, dys = dgx + header.gates + step_count;
  if (backward) {
    add(n + header.gates, false);
    rows.insert(rows.end(), header.row_steps.begin(), header.row_steps.end());
    add(header.dys + header.operands, false);
  }
  const auto require = [](bool fits) { RNNKIT_CHECK(fits, "a program must fit its header"); };
  const int64_t count = static_cast<int64_t>(rows.size());
  require(count == code.memories && header.gates <= 62);
  const auto inside = [&](int64_t first, int64_t blocks, int64_t from, int64_t many) {
    return first >= from && first + blocks <= from + many;
  };
  for (const ProgramProduct& q : code.products) {
    require(q.transposed == backward && q.blocks == header.weight_blocks[q.weight]);
    require(q.adds < 0 || inside(q.adds, q.blocks, 0, header.gates));
    require(q.bias < 0 || q.blocks == header.gates);
    require(q.memory < 0 || (!is_half(dtype) && (inside(q.memory, q.blocks, dgx, header.gates) ||
                                                 inside(q.memory, q.blocks, dys, header.dys))));
  }
  for (const ProgramSpan& span : code.spans) {
    for (const ProgramOperand& o : span.operands) {
      const bool forwards = o.place == Place::state_in || o.place == Place::state_out;
      const bool backwards =
          o.place == Place::before || o.place == Place::d_state || o.place == Place::d_unit;
      require(backward ? !forwards : !backwards);
      const bool row = o.place == Place::memory_row;
      if (row || o.place == Place::memory) require(rows[o.index] == row);
      if (row) require(!o.load || o.index < readable);
      if (o.place == Place::d_unit) require(o.index < static_cast<int64_t>(header.unit_sources.size()));
      if (o.place == Place::d_unit) require(!header.unit_sources[o.index].bias);
      if (o.place == Place::product) require(code.products[o.index].into < 0);
      if (o.place == Place::operand)
        require(code.products[o.index].state < 0 && code.products[o.index].memory < 0);
      require(o.also < 0 || !rows[o.also]);
    }
  }
  for (int64_t m : header.padded) {
    const int64_t index = m < 0 ? -1 - m : m;
    require(index < count && rows[index] == (m < 0));
  }
  require(header.bias_sources.empty() || !backward);
  for (const ProgramHeader::WeightGrad& g : header.grads) {
    require(backward && (g.state >= 0) != (g.memory >= 0) && g.memory < count);
    require(inside(g.dy, g.blocks, dgx, header.gates) || inside(g.dy, g.blocks, dys, header.dys));
    require(g.memory < 0 || inside(g.memory, 1, dys + header.dys, header.operands));
    require(g.state <= 0 || !is_half(dtype));
  }
}

void ProgramLayer::check() {
  dtype = dtype_of(x);
  const ScalarType type = x.scalar_type();
  RNNKIT_CHECK(x.dim() == 3, "x must be [T, B, I], got ", shown(x.sizes()));
  T = x.size(0), B = x.size(1), I = x.size(2), G = header.gates;
  RNNKIT_CHECK(G >= 1, "a cell must have gates");
  RNNKIT_CHECK(!w_ih.has_value() || w_ih->dim() == 2, "w_ih must be [G·H, I]");
  H = (w_ih.has_value() ? w_ih->size(0) : I) / G;
  RNNKIT_CHECK(heads >= 1 && H % heads == 0, "H = ", H, " must be a multiple of heads = ", heads);
  RNNKIT_CHECK(B < (int64_t{1} << 31), "B must be below 2^31, got ", B);
  rnnkit::check(x, "x", type, {T, B, w_ih.has_value() ? I : G * H});
  expect(w_ih, "w_ih", type, {G * H, I});
  expect(b_ih, "b_ih", type, {G * H});
  expect(b_hh, "b_hh", type, {G * H});
  expect(lengths, "lengths", ScalarType::Long, {B});
  expect(reset, "reset", ScalarType::Bool, {T, B});
  for (OptionalTensor& v : states) expect(v, "a state", type, {B, H});
  for (OptionalTensor& v : reset_states) expect(v, "a state at a reset", type, {B, H});
  for (size_t k = 0; k < weights.size(); ++k) {
    RNNKIT_CHECK(weights[k].has_value(), "every weight must be given");
    expect(weights[k], "a weight", type, {header.weight_blocks[k] * H, H / heads});
  }
  for (OptionalTensor& v : units) {
    RNNKIT_CHECK(v.has_value(), "every parameter per unit must be given");
    expect(v, "a parameter per unit", type, {H});
  }
  for (size_t k = 0; k < steps.size(); ++k) {
    RNNKIT_CHECK(steps[k].has_value(), "every input of a step must be given");
    if (header.row_steps[k]) {
      rnnkit::check(*steps[k], "an input per row", type, {T, B});
    } else {
      rnnkit::check(*steps[k], "an input per unit", type, {T, B, H});
      if (H > 1 && steps[k]->stride(2) != 1) *steps[k] = torch::stable::contiguous(*steps[k]);
    }
  }
  for (const ProgramHeader::Unit& u : header.unit_sources)
    RNNKIT_CHECK(!u.bias || b_ih.has_value(), "b_ih must be given");
  for (const ProgramHeader::Bias& source : header.bias_sources) {
    RNNKIT_CHECK((source.b_ih == 0 || b_ih.has_value()) && (!source.b_hh || b_hh.has_value()),
                 "the biases must be given");
  }
}

Tensor ProgramLayer::opmath(const OptionalTensor& v) {
  held_.push_back(to_opmath(*v, dtype));
  return held_.back();
}

ProgramProblem ProgramLayer::problem() {
  ProgramProblem q{};
  q.program = &code, q.dtype = dtype;
  q.T = T, q.B = B, q.H = H, q.heads = heads, q.reverse = reverse;
  q.masks = {static_cast<const int64_t*>(pointer(lengths)), static_cast<const bool*>(pointer(reset)), T, B};
  q.workers = workers();
  for (const OptionalTensor& w : weights) q.weights.push_back(w->const_data_ptr());
  const int64_t bytes = opmath_bytes(dtype);
  for (const ProgramHeader::Unit& u : header.unit_sources) {
    q.units.push_back(u.bias ? at(opmath(b_ih).const_data_ptr(), u.index * H, bytes)
                             : opmath(units[u.index]).const_data_ptr());
  }
  for (const ProgramHeader::Bias& source : header.bias_sources) {
    Tensor sum = zeros({G * H}, opmath_type(dtype));
    const auto add = [&](auto one, const OptionalTensor& bias, int64_t blocks) {
      using A = decltype(one);
      A* const to = static_cast<A*>(sum.mutable_data_ptr());
      const A* const from = static_cast<const A*>(opmath(bias).const_data_ptr());
      for (int64_t k = 0; k < G; ++k) {
        for (int64_t j = k * H; (blocks >> k & 1) && j < (k + 1) * H; ++j) to[j] += from[j];
      }
    };
    const auto add_both = [&](auto one) {
      if (source.b_ih != 0) add(one, b_ih, source.b_ih);
      if (source.b_hh) add(one, b_hh, -1);
    };
    dtype == Dtype::f64 ? add_both(double{}) : add_both(float{});
    held_.push_back(sum);
    q.biases.push_back(sum.const_data_ptr());
  }
  for (const OptionalTensor& v : reset_states)
    q.reset_states.push_back(v.has_value() ? opmath(v).const_data_ptr() : nullptr);
  return q;
}

std::vector<ProgramMemory> ProgramLayer::step_memories(int64_t t0) const {
  std::vector<ProgramMemory> m;
  for (const OptionalTensor& v : steps) {
    m.push_back({at(v->const_data_ptr(), t0 * v->stride(0), bytes_of(dtype)), !is_half(dtype), v->stride(0),
                 v->stride(1)});
  }
  return m;
}

ProgramMemory ProgramLayer::rows(const OptionalTensor& v, int64_t t0, int64_t offset, int64_t width,
                                 bool opmath) const {
  if (!v.has_value()) return {nullptr, opmath, 0, 0};
  const int64_t bytes = opmath ? opmath_bytes(dtype) : bytes_of(dtype);
  return {at(v->const_data_ptr(), t0 * B * width + offset, bytes), opmath || !is_half(dtype), B * width,
          width};
}

// Steps that are projected and scanned at a time: they stay in the second-level cache.
int64_t ProgramLayer::steps_at_a_time() const {
  if (T * B <= H / 4) return T;
  const int64_t bytes = std::max<int64_t>(1, G * H * 4);
  const int64_t rows = std::clamp<int64_t>((int64_t{256} << 10) / bytes, 48, 512);
  return std::max<int64_t>(1, rows / std::max<int64_t>(1, B));
}

// x times W_ih for some steps, without bias.
class ProgramProjection {
 public:
  explicit ProgramProjection(const ProgramLayer& in, int64_t most) : in_(in) {
    if (!in.w_ih.has_value()) {
      gx_ = torch::stable::contiguous(to_opmath(in.x, in.dtype));
      return;
    }
    x_ = in.x.is_contiguous() ? in.x : torch::stable::contiguous(in.x);
    gemm_.emplace(*in.w_ih, false, in.T * in.B, in.T > 1);
    gx_ = empty({most * in.B, in.G * in.H}, opmath_type(in.dtype));
  }

  // The memories of its blocks.
  void run(int64_t t0, int64_t n, std::vector<ProgramMemory>& m) {
    const int64_t width = in_.G * in_.H;
    if (gemm_.has_value()) {
      const Tensor from = view(*x_, {n * in_.B, in_.I}, {in_.I, 1}, t0 * in_.B * in_.I);
      Tensor out = view(*gx_, {n * in_.B, width}, {width, 1}, 0);
      gemm_->run(from, out);
    }
    for (int64_t g = 0; g < in_.G; ++g)
      m.push_back(in_.rows(gx_, gemm_.has_value() ? 0 : t0, g * in_.H, width, true));
  }

 private:
  const ProgramLayer& in_;
  OptionalTensor x_, gx_;
  std::optional<PackedGemm> gemm_;
};

ProgramForward::ProgramForward(ProgramLayer& in, int64_t most)
    : in_(in), projection_(std::make_unique<ProgramProjection>(in, most)) {
  ProgramProblem q = in.problem();
  for (int64_t s = 0; s < in.header.states; ++s) {
    states.push_back(empty({1, in.B, in.H}, opmath_type(in.dtype)));
    q.states.push_back(states.back().mutable_data_ptr());
  }
  scan_ = engine().program(q);
}
ProgramForward::~ProgramForward() = default;

void ProgramForward::run(int64_t t0, int64_t n, const std::vector<ProgramMemory>& results) {
  ProgramChunk chunk{t0, n, {}, nullptr};
  projection_->run(t0, n, chunk.memory);
  for (const ProgramMemory& m : in_.step_memories(t0)) chunk.memory.push_back(m);
  chunk.memory.insert(chunk.memory.end(), results.begin(), results.end());
  RNNKIT_CHECK(static_cast<int64_t>(chunk.memory.size()) == in_.code.memories,
               "a program must fit its header");
  scan_->run(chunk, in_.header.padded);
}

std::vector<OptionalTensor> program_forward(std::string_view program, int64_t heads, int64_t reverse,
                                            int64_t keep_states, const std::vector<OptionalTensor>& tensors) {
  ProgramLayer in(program, heads, reverse != 0, false, tensors);
  const ScalarType type = in.x.scalar_type(), wide = opmath_type(in.dtype);
  const int64_t T = in.T, B = in.B, H = in.H, K = in.header.saved, R = in.header.saved_rows;
  std::vector<OptionalTensor> after{empty({T, B, H}, type)};
  for (int64_t s = 1; s < in.header.states; ++s)
    after.push_back(keep_states >> s & 1 ? OptionalTensor(empty({T, B, H}, wide)) : std::nullopt);
  OptionalTensor saved, saved_rows, first;
  if (in.header.keep_first) first = empty({T, B, H}, wide);
  if (K) saved = empty({K, T, B, H}, wide);
  if (R) saved_rows = empty({R, T, B}, wide);
  std::vector<OptionalTensor> last;
  if (T > 0 && B > 0 && H > 0) {
    const int64_t most = std::min(T, in.w_ih.has_value() ? in.steps_at_a_time() : T);
    ProgramForward scan(in, most);
    for (int64_t s = 0; s < in.header.states; ++s) in.copy_state(in.states[s], scan.states[s]);
    for (int64_t done = 0; done < T;) {
      const int64_t n = std::min(most, T - done), t0 = in.reverse ? T - done - n : done;
      std::vector<ProgramMemory> m;
      for (int64_t s = 0; s < in.header.states; ++s) m.push_back(in.rows(after[s], t0, 0, H, s > 0));
      for (int64_t k = 0; k < K; ++k) m.push_back(in.rows(saved, t0, k * T * B * H, H, true));
      for (int64_t k = 0; k < R; ++k) m.push_back(in.rows(saved_rows, t0, k * T * B, 1, true));
      if (first.has_value()) m.push_back(in.rows(first, t0, 0, H, true));
      scan.run(t0, n, m);
      done += n;
    }
    for (const Tensor& v : scan.states) last.push_back(is_half(in.dtype) ? torch::stable::to(v, type) : v);
  } else {
    for (const OptionalTensor& v : in.states) {
      const Tensor wide_state = empty({1, B, H}, wide);
      in.copy_state(v, wide_state);
      last.push_back(is_half(in.dtype) ? torch::stable::to(wide_state, type) : wide_state);
    }
  }
  std::vector<OptionalTensor> out{after[0]};
  out.insert(out.end(), last.begin(), last.end());
  out.insert(out.end(), after.begin() + 1, after.end());
  out.push_back(first), out.push_back(saved), out.push_back(saved_rows);
  return out;
}

}  // namespace rnnkit
