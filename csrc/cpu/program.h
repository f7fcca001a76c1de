// A cell that a user wrote, as the engine runs it: a program of vector instructions for each stage of a step,
// between products with the recurrent weights. rnnkit/custom/program.py writes it, forward and backward
// alike. Compiled once, for every cell; no torch.
//
// Shapes as in scan.h. A value per unit is [B, H], a value per row [B]. A stage ("span") begins with its
// products and goes on with instructions on blocks of rows, whose values stay in the first-level cache. An
// instruction names its operands by number:
//
//   0 ..                temporaries per unit, then temporaries per row, then constants, then parameters per
//                       unit (blocks of [H])
//   from there on       the span's own operands: what stands in memory, see Place

#pragma once

#include <memory>
#include <vector>

#include "scan.h"

namespace rnnkit {

// As torch's functions of these names; comparisons give 1 and 0. muladd a b + c, nmuladd c - a b, copy a,
// spread a value per row over its units, row_sum and row_max a value per unit to one per row.
// clang-format off
#define RNNKIT_PROGRAM_OPS(X)                                                                      \
  X(add) X(sub) X(mul) X(div) X(pow) X(maximum) X(minimum) X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(where) \
  X(neg) X(abs) X(sigmoid) X(tanh) X(relu) X(exp) X(expm1) X(log) X(log1p) X(sqrt) X(rsqrt)             \
  X(reciprocal) X(sin) X(cos) X(erf) X(round) X(floor) X(copy) X(muladd) X(nmuladd) X(spread)           \
  X(row_sum) X(row_max)
// clang-format on

enum class Op : int64_t {
#define RNNKIT_OP(name) name##_,
  RNNKIT_PROGRAM_OPS(RNNKIT_OP)
#undef RNNKIT_OP
      count
};

// Where an operand of a span stands. `index` and `block` say which one.
enum class Place : int64_t {
  state_in,      // index: a state [B, H] before the step (forward)
  state_out,     // the same after it
  product,       // index: a product, block: of its result
  crossing,      // index: a value that a later span of the same step reads
  crossing_row,  // the same per row
  operand,       // index: a product whose operand this is, block: of it
  memory,        // index: of ProgramChunk::memory, [n, B, H]
  memory_row,    // the same, [n, B]
  before,        // index: a state before the step (backward)
  d_state,       // index: the gradient of a state: that which has arrived, then that before the step
  d_unit,        // index: the gradient of a parameter per unit, summed for each row over time
  count
};

struct ProgramInstruction {
  int64_t op, to, a, b, c;
  bool row;  // on values per row
};

struct ProgramOperand {
  Place place;
  int64_t index, block;
  bool load, store;
  int64_t also;  // memory that is written too, or -1
};

// A weight [blocks H, H] times an operand [B, H]: `blocks` results; or transposed: an operand [B, blocks H],
// one result.
struct ProgramProduct {
  int64_t weight, blocks;
  bool transposed;
  int64_t state;     // whose value it multiplies itself (forward), or -1: what is stored to Place::operand,
  int64_t memory;    // or -1; transposed: the first of `blocks` neighbours in memory, which make one row
  int64_t adds;      // the first of `blocks` memories that are added to the results, or -1;
  int64_t added;     // and to which of them, as bits
  int64_t bias;      // that is added, or -1
  int64_t into;      // whose gradient the result is (Place::d_state), or -1
  bool accumulates;  // on what stands there
};

struct ProgramSpan {
  std::vector<int64_t> products;
  std::vector<ProgramOperand> operands;
  std::vector<ProgramInstruction> code;
};

struct Program {
  int64_t states, weights, biases, units, memories, crossings, row_crossings, temps, row_temps;
  std::vector<double> constants;
  std::vector<ProgramProduct> products;
  std::vector<ProgramSpan> spans;
  bool sums_rows = false;  // whether a value depends on a whole row

  int64_t named() const {  // operands before a span's own
    return temps + row_temps + static_cast<int64_t>(constants.size()) + units;
  }

  // From what rnnkit/custom/program.py wrote. Throws std::runtime_error for what is no program: every number
  // in it is looked at, so that none leads beyond an array.
  static Program read(const int64_t* words, size_t count);
};

// Some numbers for each step and row of a chunk: [n, B, width], of type S or A; null: there are none.
struct ProgramMemory {
  void* first;  // of the chunk's first step
  bool opmath;
  int64_t step, row;  // strides
};

struct ProgramChunk {
  int64_t t0, n;
  std::vector<ProgramMemory> memory;
  uint8_t* alive = nullptr;  // backward: [n, B], whether a gradient came to the row; may be null
};

struct ProgramProblem {
  const Program* program;
  Dtype dtype;
  int64_t T, B, H, heads;
  bool reverse;
  LengthsAndResets masks;
  Workers workers;
  std::vector<const void*> weights;  // S [blocks H, H / heads]
  std::vector<const void*> biases;   // A [blocks H]
  std::vector<const void*> units;    // A [H]
  std::vector<void*> states;         // A [B, H]: forward: the states, backward: their gradients; in and out
  std::vector<const void*> reset_states;  // A [B, H] or null: zeros (forward, and backward)

  // For the backward.
  bool backward = false;
  std::vector<const void*> first;    // A [B, H]: the states before the first step
  std::vector<ProgramMemory> after;  // the states after each step, from step 0 on
  std::vector<const void*> grads;    // S [T, B, H] gradients of the states after each step, or null
  std::vector<Strides> grad_strides;
  bool wants_initial_grads = true;
  std::vector<void*> d_resets;  // A [B, H] summed over the resets, or null
  std::vector<void*> d_units;   // A [H] each, or null
};

// The recurrence over time, in any number of chunks: forward from the start to the end of time, backward from
// the end to the start (the other way round in reverse). The weights are packed when it is made. A row's
// results depend on nothing but itself. A forward's padding is zeroed in the memories that `padded` names,
// and a backward's where no gradient comes to a row.
class ProgramScan {
 public:
  virtual ~ProgramScan() = default;
  virtual void run(const ProgramChunk& chunk, const std::vector<int64_t>& padded) = 0;
  // Once, after the last chunk of a backward: d_units.
  virtual void finish() = 0;
};

}  // namespace rnnkit
