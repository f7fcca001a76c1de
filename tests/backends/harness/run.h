// One problem through one engine: operands in memory of exactly their size (a sanitizer sees every step
// beyond it), results as doubles. What an engine must not write is compared with what it was before.

#pragma once

#include "parallel.h"
#include "plain.h"

namespace harness {

// Numbers of one type on the heap, nothing before and behind them but what `shift` asks for.
class Buffer {
 public:
  Buffer(int64_t count, Dtype dtype, bool shift = false);
  Buffer(const Values& values, Dtype dtype, bool shift = false);
  char* data() const { return bytes_.get() + skip_; }
  char* at(int64_t k) const { return data() + k * size_; }
  double operator[](int64_t k) const { return get(at(k), dtype_); }
  Values values() const;

 private:
  Dtype dtype_;
  int64_t count_, size_, skip_;
  std::unique_ptr<char[]> bytes_;
};

constexpr double untouched =
    -20480;  // in memory that an engine must leave alone, or fill; exact in every type

struct How {
  Way way{"alone", {1, &together}};
  bool save = true;             // gates and c for the backward
  bool in_place = false;        // gates over gx
  std::vector<int64_t> chunks;  // numbers of steps, in the order of the forward; empty: all in one
  bool inside = false;          // the scan multiplies x, which is gx, by a W_ih, which is the identity
};

struct Ran {
  Saved saved;
  Values c_all;              // [T, B, H]
  std::vector<Values> h, c;  // the states after each chunk, the first ones in front
};

// Throws std::runtime_error where the engine wrote what it must not.
Ran run_forward(const rnnkit::Engine& engine, const Problem& p, const How& how);

struct Gradients {
  Values of[7];  // by Result
};

// chunks: numbers of steps, in the order of the backward; empty: all in one. wants_initial_grads: see
// Backward.
Gradients run_backward(const rnnkit::Engine& engine, const Problem& p, const Saved& saved, const Way& way,
                       const std::vector<int64_t>& chunks = {}, bool wants_initial_grads = true);

}  // namespace harness
