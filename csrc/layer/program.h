// One layer in one direction of a cell that a user wrote, over all T on the CPU. Shapes as in scan.h.

#pragma once

#include <string_view>
#include <vector>

#include "../cpu/program.h"
#include "gemm.h"

namespace rnnkit {

// What rnnkit/custom/program.py writes before a program, about the tensors around it.
struct ProgramHeader {
  // Where a parameter per unit comes from: a declared one, or a block of b_ih.
  struct Unit {
    bool bias;
    int64_t index;
  };
  // Of a product of the forward: the gradients of its results, at the first of their memories, and its
  // operand: a state before the step, or memory.
  struct WeightGrad {
    int64_t weight, blocks;
    int64_t dy;
    int64_t state, memory;  // one of them, the other -1
  };
  int64_t gates, states, units, weights;
  std::vector<int64_t> weight_blocks;
  bool has_w_hh;                // the first weight, whose bias is b_hh
  std::vector<bool> row_steps;  // inputs of each step: whether they are per row
  int64_t saved, saved_rows;
  bool keep_first;  // the first state after each step in the compute type, beside y of a half type
  std::vector<Unit> unit_sources;
  // What a product adds: b_hh or nothing, and the blocks of b_ih whose bit is set.
  struct Bias {
    bool b_hh;
    int64_t b_ih;
  };
  std::vector<Bias> bias_sources;
  // Backward. Memories of the gradients of results that are not those of the projected input, in blocks of H;
  // of operands; and the states before or after a step that are read.
  int64_t dys, operands;
  std::vector<WeightGrad> grads;
  std::vector<bool> needs;
  std::vector<int64_t> padded;  // see ProgramScan::run
};

// tensors, in the order of CellInputs: x [T, B, I], or [T, B, G H] projected already where w_ih is missing;
// the states before [B, H], none for zeros; w_ih, b_ih, b_hh; the weights, the parameters per unit, the
// inputs of each step ([T, B, H] or [T, B], in any strides but the last); lengths, reset; the states at a
// reset or none.
//
// Gives y, the states after the last step [1, B, H], all states but the first after each step (in the compute
// type) or none, the first in that type or none, what is saved per unit [K, T, B, H] and per row [K, T, B].
std::vector<OptionalTensor> program_forward(std::string_view program, int64_t heads, int64_t reverse,
                                            int64_t keep_states, const std::vector<OptionalTensor>& tensors);

// tensors: the forward's, then y, the first state in the compute type or none, the other states after each
// step, what was saved per unit and per row; then the gradients of y, of the last states, and of all states
// but the first after each step, or none. forward: the program that makes again what was not saved. needs: a
// byte for each of the forward's tensors. Gives as many gradients.
std::vector<OptionalTensor> program_backward(std::string_view program, std::string_view forward,
                                             int64_t heads, int64_t reverse, std::string_view needs,
                                             const std::vector<OptionalTensor>& tensors);

}  // namespace rnnkit
