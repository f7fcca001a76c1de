// What the forward and the backward of a layer of a user's cell share.

#pragma once

#include <memory>
#include <optional>

#include "layer.h"
#include "program.h"

namespace rnnkit {

struct ReadProgram {
  ProgramHeader header;
  Program code;
};

// A layer's tensors, checked, and its program.
class ProgramLayer {
  std::shared_ptr<const ReadProgram> read_;

 public:
  // backward: which of both kinds the program shall be.
  ProgramLayer(std::string_view program, int64_t heads, bool reverse, bool backward,
               const std::vector<OptionalTensor>& tensors);

  // What a scan is told of it, but its states. It points into tensors that this holds.
  ProgramProblem problem();
  // Memories from step t0 on: of the inputs of each step; and of `width` numbers from `offset` on in each row
  // of v [n, B, width].
  std::vector<ProgramMemory> step_memories(int64_t t0) const;
  ProgramMemory rows(const OptionalTensor& v, int64_t t0, int64_t offset, int64_t width, bool opmath) const;
  int64_t steps_at_a_time() const;
  // v [B, H], of any type, zeros where missing, into `to` in the compute type.
  void copy_state(const OptionalTensor& v, const Tensor& to) const {
    const int64_t bytes = to.numel() * opmath_bytes(dtype);
    char* const into = static_cast<char*>(to.mutable_data_ptr());
    if (!v.has_value()) {
      std::fill_n(into, bytes, 0);
    } else {
      const Tensor from = to_opmath(*v, dtype);
      std::copy_n(static_cast<const char*>(from.const_data_ptr()), bytes, into);
    }
  }
  Tensor opmath(const OptionalTensor& v);

  const ProgramHeader& header;
  const Program& code;
  int64_t heads;
  bool reverse;
  size_t inputs;  // tensors of the forward
  Tensor x;
  OptionalTensor w_ih, b_ih, b_hh, lengths, reset;
  std::vector<OptionalTensor> states, reset_states, weights, units, steps;
  Dtype dtype = Dtype::f32;
  int64_t T = 0, B = 0, I = 0, H = 0, G = 0;

 private:
  void check();
  // That the program reads and writes what is there: each place of its kind, rows where rows stand,
  // neighbours that lie side by side.
  void check_places(bool backward) const;
  std::vector<Tensor> held_;
};

class ProgramProjection;

// A forward in chunks of time, from `states` on.
class ProgramForward {
 public:
  // in: outlives it. most: steps of a chunk.
  ProgramForward(ProgramLayer& in, int64_t most);
  ~ProgramForward();
  // results: the memories of the states after each step, then of what is saved.
  void run(int64_t t0, int64_t n, const std::vector<ProgramMemory>& results);
  std::vector<Tensor> states;  // [B, H] in the compute type

 private:
  ProgramLayer& in_;
  std::unique_ptr<ProgramProjection> projection_;
  std::unique_ptr<ProgramScan> scan_;
};

}  // namespace rnnkit
