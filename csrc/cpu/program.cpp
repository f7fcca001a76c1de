// Reads a program and looks at every number in it.

#include "program.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace rnnkit {
namespace {

class Reader {
 public:
  Reader(const int64_t* words, size_t count) : at_(words), end_(words + count) {}

  int64_t in(int64_t least, int64_t most) {
    if (at_ == end_) fail("it ends too early");
    const int64_t v = *at_++;
    if (v < least || v > most) {
      fail("got " + std::to_string(v) + ", expected " + std::to_string(least) + " to " +
           std::to_string(most));
    }
    return v;
  }
  int64_t size() { return in(0, 4096); }
  bool flag() { return in(0, 1) == 1; }
  // Of `count` things, or -1 for none.
  int64_t maybe(int64_t count) { return in(-1, count - 1); }
  int64_t of(int64_t count) { return in(0, count - 1); }
  double number() {
    const int64_t bits = in(INT64_MIN, INT64_MAX);
    double v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  void finish() const {
    if (at_ != end_) fail("it goes on after its end");
  }
  [[noreturn]] static void fail(const std::string& why) {
    throw std::runtime_error("rnnkit: this is no program of a cell: " + why);
  }

 private:
  const int64_t *at_, *end_;
};

// The first of `blocks` neighbours, or -1.
int64_t first_of(Reader& r, int64_t blocks, int64_t count) {
  const int64_t first = r.maybe(count);
  if (first >= 0 && first + blocks > count) Reader::fail("neighbours beyond the last");
  return first;
}

ProgramProduct read_product(Reader& r, const Program& p) {
  ProgramProduct q{};
  q.weight = r.of(p.weights), q.blocks = r.in(1, 64), q.transposed = r.flag();
  q.state = r.maybe(p.states), q.memory = first_of(r, q.blocks, p.memories);
  q.adds = first_of(r, q.blocks, p.memories), q.added = r.in(INT64_MIN, INT64_MAX),
  q.bias = r.maybe(p.biases);
  q.into = r.maybe(p.states), q.accumulates = r.flag();
  if (q.transposed ? q.state >= 0 || q.adds >= 0 || q.bias >= 0 : q.memory >= 0 || q.into >= 0)
    Reader::fail("a product of both kinds");
  return q;
}

ProgramOperand read_operand(Reader& r, const Program& p) {
  ProgramOperand o{};
  o.place = static_cast<Place>(r.of(static_cast<int64_t>(Place::count)));
  const auto index = [&](int64_t count) { o.index = r.of(count), o.block = r.in(0, 0); };
  switch (o.place) {
    case Place::state_in:
    case Place::state_out:
    case Place::before:
    case Place::d_state:
      index(p.states);
      break;
    case Place::product:
    case Place::operand: {
      o.index = r.of(static_cast<int64_t>(p.products.size()));
      const ProgramProduct& q = p.products[o.index];
      o.block = r.of(q.transposed == (o.place == Place::operand) ? q.blocks : 1);
      break;
    }
    case Place::crossing:
      index(p.crossings);
      break;
    case Place::crossing_row:
      index(p.row_crossings);
      break;
    case Place::memory:
    case Place::memory_row:
      index(p.memories);
      break;
    default:
      index(p.units);
  }
  o.load = r.flag(), o.store = r.flag();
  o.also = r.maybe(p.memories);
  return o;
}

bool on_row(const Program& p, const ProgramSpan& span, int64_t n) {
  if (n < p.named()) return n >= p.temps && n < p.temps + p.row_temps;
  const Place place = span.operands[n - p.named()].place;
  return place == Place::crossing_row || place == Place::memory_row;
}

ProgramInstruction read_instruction(Reader& r, const Program& p, const ProgramSpan& span) {
  const int64_t known = p.named() + static_cast<int64_t>(span.operands.size());
  ProgramInstruction i{};
  i.op = r.of(static_cast<int64_t>(Op::count));
  i.to = r.of(known), i.a = r.of(known), i.b = r.of(known), i.c = r.of(known);
  i.row = r.flag();
  const Op op = static_cast<Op>(i.op);
  const auto constant = [&](int64_t n) { return n >= p.temps + p.row_temps && n < p.named() - p.units; };
  const bool reads_row = op == Op::spread_ || i.row;
  const bool sums = op == Op::row_sum_ || op == Op::row_max_;
  if (constant(i.to) || (i.to >= p.named() - p.units && i.to < p.named()))
    Reader::fail("a constant is no place for a result");
  if (on_row(p, span, i.to) != (i.row || sums)) Reader::fail("a result per row in a place per unit");
  for (int64_t n : {i.a, i.b, i.c}) {
    if (!constant(n) && on_row(p, span, n) != reads_row)
      Reader::fail("an argument per row where one per unit is read");
  }
  if ((sums || op == Op::spread_) && (i.row || constant(i.a))) Reader::fail("a sum of a constant");
  return i;
}

}  // namespace

Program Program::read(const int64_t* words, size_t count) {
  Reader r(words, count);
  Program p{};
  p.states = r.in(1, 64), p.weights = r.size(), p.biases = r.size(), p.units = r.size(),
  p.memories = r.size();
  p.crossings = r.size(), p.row_crossings = r.size(), p.temps = r.size(), p.row_temps = r.size();
  for (int64_t k = r.size(); k > 0; --k) p.constants.push_back(r.number());
  for (int64_t k = r.size(); k > 0; --k) p.products.push_back(read_product(r, p));
  for (int64_t k = r.size(); k > 0; --k) {
    ProgramSpan span;
    for (int64_t m = r.size(); m > 0; --m)
      span.products.push_back(r.of(static_cast<int64_t>(p.products.size())));
    for (int64_t m = r.size(); m > 0; --m) span.operands.push_back(read_operand(r, p));
    for (int64_t m = r.in(0, 1 << 20); m > 0; --m) {
      span.code.push_back(read_instruction(r, p, span));
      const Op op = static_cast<Op>(span.code.back().op);
      p.sums_rows = p.sums_rows || op == Op::row_sum_ || op == Op::row_max_;
    }
    p.spans.push_back(std::move(span));
  }
  r.finish();
  return p;
}

}  // namespace rnnkit
