// The recurrence of every cell over time on plain pointers: what csrc/layer and the harness call. No torch.
// Each processor variant (avx512_bf16.cpp, avx512.cpp, avx2.cpp, baseline.cpp) compiles the same templates
// into an Engine.
//
// Shapes: T steps in all, n of them in a chunk, B rows, H units, P projected units (0: none), N = P or H the
// size of the state, G gates, S the storage type of `dtype`, A the type it is computed in (float, or double
// for f64). Everything is contiguous unless a stride is named; strides count elements.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace rnnkit {

enum class Cell : int64_t { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };
enum class Dtype { f32, f64, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// By the number of a cell.
constexpr const char* cell_names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};
constexpr int64_t cell_count = sizeof cell_names / sizeof *cell_names;

// Throws std::runtime_error that names the number and the cells there are.
[[noreturn]] void unknown_cell(int64_t number);

// Where a cell is dispatched, every one is listed: a new one is then a warning of the compiler (an error in
// the harness), and a number that is none of them never another cell's formulas.
constexpr int64_t gates_of(Cell cell) {
  switch (cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return 1;
    case Cell::lstm:
      return 4;
    case Cell::gru:
    case Cell::gru_reset_before:
      return 3;
  }
  unknown_cell(static_cast<int64_t>(cell));
}

// Blocks of H that the forward keeps per step for the backward; rnnkit/cells.py has the same number.
constexpr int64_t saved_of(Cell cell) {
  switch (cell) {
    case Cell::rnn_tanh:
    case Cell::rnn_relu:
      return 0;
    case Cell::lstm:
    case Cell::gru:
      return 4;
    case Cell::gru_reset_before:
      return 3;
  }
  unknown_cell(static_cast<int64_t>(cell));
}

// Which steps are valid in each row, those below its length, and before which a reset replaces its state.
struct LengthsAndResets {
  const int64_t* lengths;  // [B], or null: every step is valid
  const bool* reset;       // [T, B], or null
  int64_t T, B;

  bool any() const { return lengths != nullptr || reset != nullptr; }
  bool valid(int64_t t, int64_t b) const { return lengths == nullptr || t < lengths[b]; }

  // A reset at step s separates s - 1 from s: in reverse that is before s - 1 is processed.
  bool resets_before(int64_t t, int64_t b, bool reverse) const {
    const int64_t s = reverse ? t + 1 : t;
    return reset != nullptr && s < T && valid(s, b) && reset[s * B + b];
  }
};

// Runs body(context, first, last) over ranges that make up 0 .. slices - 1, concurrently where it can.
using Parallel = void (*)(int64_t slices, void* context,
                          void (*body)(void* context, int64_t first, int64_t last));

// Who does the work: into how many slices it may be divided, which changes no result, and what runs them.
struct Workers {
  int64_t threads;
  Parallel parallel;
};

// What a scan is, in either direction of time and of differentiation.
struct Layer {
  Cell cell;
  Dtype dtype;
  int64_t B, H, P;
  bool reverse;
  LengthsAndResets masks;  // masks.T is the T of the whole sequence
  const void* w_hh;        // S [G H, N]
  const void* w_hr;        // S [P, H], or null
  const void* h_r;         // A [B, N] the state at a reset, or null: zeros
  const void* c_r;         // A [B, H]
  Workers workers;
};

// One chunk of time for a forward scan.
struct ForwardChunk {
  int64_t t0, n;   // the steps t0 .. t0 + n - 1
  const void* gx;  // A [n, B, gx_stride >= G H] x W_ih^T, without biases; null where the scan multiplies x
  int64_t gx_stride;
  const void* x;  // S [n, B, I] by these strides; see Forward::w_ih
  int64_t x_step, x_row;
  void* y;  // S [n, B, y_stride >= N], 0 where the step is padding
  int64_t y_stride;
  void* c_all;  // S [n, B, H], or null
  void* gates;  // A [n, B, saved_of H], or null; where S is A it may be gx itself, with that stride
  int64_t gates_stride;
  void* c_kept;  // A [n, B, H] beside gates (LSTM), or null
};

// A forward scan, from the start to the end of time (from the end in reverse) in any number of chunks. The
// weights are packed when it is made. The results do not depend on the chunks.
class ForwardScan {
 public:
  virtual ~ForwardScan() = default;
  // h A [B, N] and c A [B, H] are the states before the chunk's first step, and after run() those after its
  // last: whoever puts another chunk's states there may run that one next.
  virtual void run(const ForwardChunk& chunk) = 0;
};

struct Forward {
  Layer layer;
  const void* b_ih;  // S [G H], or null
  const void* b_hh;  // S [G H], or null
  void* h;           // A [B, N]
  void* c;           // A [B, H], LSTM
  const void*
      w_ih;   // S [G H, I] where the scan shall multiply x itself, tile by tile, null where it gets gx.
  int64_t I;  // Only for types that are multiplied as they are stored; for bfloat16 I is even
};

// Strides of a gradient that came from outside: unit is 1, or 0 for a gradient expanded from one number a
// row.
struct Strides {
  int64_t step, row, unit;
};

struct Backward {
  Layer layer;
  int64_t T;
  const void* gy;  // S [T, B, N] by gy_strides, or null: zeros
  Strides gy_strides;
  const void* gc_all;  // S [T, B, H], or null
  const void* y;       // S [T, B, y_stride >= N] as the forward gave it
  int64_t y_stride;
  const void* h_0;           // A [B, N]
  const void* c_0;           // A [B, H]
  bool wants_initial_grads;  // whether the four below are wanted in the end, so that the last step to run
                             // gives the gradient of its own state
  void* dh;                  // A [B, N] in: of h_n; out: of the state before the steps that have run
  void* dc;                  // A [B, H] the same of c, LSTM
  void* dh_r;                // A [B, N] summed over the resets, or null
  void* dc_r;                // A [B, H]
};

// One chunk of time for a backward scan, and its results there; those a cell does not have are null.
struct BackwardChunk {
  int64_t t0, n;      // the steps t0 .. t0 + n - 1
  const void* gates;  // A [n, B, gates_stride] as the forward gave them, null for the vanilla RNN
  int64_t gates_stride;
  const void* c_kept;    // A [n, B, H], LSTM; the step processed before them, if there is one, stands beside
  void* dgx;             // S [n, B, G H] of the pre-activations, 0 where no gradient comes
  void* dgn;             // S [n, B, H] of W_hn h + b_hn: GRU with reset after
  void* dp;              // S [n, B, P] of the projected state: with a projection
  void* second_operand;  // S [n, B, H] what a step's second product multiplied, r h or o tanh(c): the
                         // textbook GRU, or with a projection. Not written where no gradient comes
};

// A backward scan, from the end of time to its start (from the start where the forward ran in reverse) in any
// number of chunks. The weights are packed when it is made. The results do not depend on the chunks.
class BackwardScan {
 public:
  virtual ~BackwardScan() = default;
  virtual void run(const BackwardChunk& chunk) = 0;
};

// out [M, N] = a [M, K] times one matrix for any number of M, packed once or not at all.
// Storage and arithmetic as in a scan. Rows of `a` and `out` are lda and ldo apart. A row's result depends on
// nothing but itself.
class GemmKernel {
 public:
  virtual ~GemmKernel() = default;
  // out is A where `out_opmath`, else S.
  virtual void run(int64_t M, const void* a, int64_t lda, void* out, int64_t ldo, bool out_opmath,
                   const Workers& workers) const = 0;
};

// What the columns of a matrix a [K, ...] are multiplied with: out [M, N] += sum over k of a[k, :M]^T row[k].
struct GemmTNRight {
  int64_t M, N;
  const void* const* rows;  // K rows, S [N] each, or null: zeros
  void* out;                // A [M, N], rows ldo apart
  int64_t ldo;
};

// The gradients of up to two weights, whose left operand is packed once for both; sums are made in the order
// of k. Where not `add`, outputs and `sum` are written, whatever stands there.
struct GemmTN {
  Dtype dtype;
  bool add;
  int64_t M, K;
  const void* a;  // S [K, M], rows lda apart
  int64_t lda;
  GemmTNRight right[2];  // M: no more than that of `a`; N = 0 where there is none
  void* sum;             // A [M] += sum over k of a[k], or null
  Workers workers;
};

struct ProgramProblem;  // program.h
class ProgramScan;

struct Engine {
  const char* name;
  // Whether bfloat16 is multiplied as it is stored, by dot products: what products read is rounded to it, the
  // state and the gradients of pre-activations too. Elsewhere it is widened, and they are not.
  bool multiplies_bf16;
  bool (*supported)();
  std::unique_ptr<ForwardScan> (*forward)(const Forward& problem, int64_t T);
  std::unique_ptr<BackwardScan> (*backward)(const Backward& problem);
  // a w^T with w S [N, K]; pack: false for weights that serve a single step. It changes the order of the
  // sums.
  std::unique_ptr<GemmKernel> (*gemm_nt)(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                         const Workers& workers);
  // a w with w S [K, N]; pack: false for weights that serve a few rows, with the same sums
  std::unique_ptr<GemmKernel> (*gemm_nn)(Dtype dtype, int64_t N, int64_t K, const void* w, bool pack,
                                         const Workers& workers);
  void (*gemm_tn)(const GemmTN& problem);
  std::unique_ptr<ProgramScan> (*program)(const ProgramProblem& problem);
  // What the tests hold against float64: 0 sigmoid, 1 tanh, of n values.
  void (*function)(int which, Dtype dtype, int64_t n, const void* in, void* out);
};

// The variants that this processor can run, best first.
const std::vector<const Engine*>& engines();

// The one in use: the best, or what RNNKIT_CPU_ISA names. Throws std::runtime_error that lists those at hand
// where it names another.
const Engine& engine();

}  // namespace rnnkit
