// A scan on a GPU: what it reads and writes, on plain pointers, and the list of kernels that can run it. No
// torch, and no CUDA: ops.cpp fills these structures in from tensors, the tests from memory of a CPU.
//
// Every regime stands behind the same two functions, Kernel::bytes and Kernel::run: cta.cuh and step.cuh are
// two, another one is another file and further rows of rnnkit/backends/cuda/configs.py. Each row is compiled
// as a source of its own (generate.py), which enters its kernel here under its name.
//
// Shapes: n steps, B rows, H units, N the size of the state (P with a projection, else H), G gates, K blocks
// of H that are saved. Everything is contiguous. S is the type that is stored, A the one that is computed in:
// float32 for bfloat16 and float16, else S.

#pragma once

#include <cstdint>

namespace rnnkit::cuda {

// States and their gradients: A where `opmath`, else S.
struct State {
  void* data;
  bool opmath;
};

// What both passes ask. The processing order is time's, or backwards where `reverse`.
struct Sequence {
  int64_t n, B, H, N;
  int64_t t0;     // the first step's index in the whole sequence, of which lengths and reset speak
  int64_t total;  // steps of the whole sequence
  bool reverse;
  bool relu;               // an RNN's activation; else tanh
  const int64_t* lengths;  // [B], or null: every step is valid
  const bool* reset;       // [total, B], or null: a reset at t lies between t - 1 and t
  State h_r, c_r;          // [B, N], [B, H] the state at a reset; null: zeros
  const void* b_hn;        // S [H] or null: the bias inside the reset gate's product, GRU with reset after
  State h_0, c_0;          // [B, N], [B, H] the state before the first step that is processed
  void* workspace;         // Kernel::bytes of it
};

struct Forward : Sequence {
  const void* gx;    // S [n, B, G H]: x W_ih^T with the other biases
  const void* w_hh;  // S [G H, N]
  const void* w_hr;  // S [N, H], or null
  void* y;           // S [n, B, N], 0 where the step is padding
  State h_n, c_n;    // [B, N], [B, H]
  void* c_all;       // S [n, B, H], 0 where the step is padding, or null
  void* gates;       // S [n, B, K H], or null
};

struct Backward : Sequence {
  const void* w_t;                // S [N, G H]: W_hh^T
  const void* w_hr_t;             // S [H, N]: W_hr^T, or null
  const void *gy, *gc_all;        // S [n, B, N], [n, B, H], or null: zeros
  State gh_n, gc_n;               // [B, N], [B, H], or null: zeros
  const void *y, *c_all, *gates;  // as the forward left them
  void* dgx;                      // S [n, B, G H]
  void* dgh;                      // the same, GRU with reset after; else it is dgx
  void* dp;                       // S [n, B, N]: of the projected state, with a projection
  State dh_0, dc_0;               // [B, N], [B, H]
  State dh_r, dc_r;               // the same; null where there is no reset
};

// What a kernel runs on: a CUDA stream, or the schedule of a launch on a CPU (tests/cuda/simt).
using Stream = const void*;

// One row of the table. What runs throws std::runtime_error where a launch fails.
struct Kernel {
  const char* name;
  int64_t (*forward_bytes)(const Forward&);
  void (*forward)(const Forward&, Stream);
  int64_t (*backward_bytes)(const Backward&);
  void (*backward)(const Backward&, Stream);
  const Kernel* next;
};

// The list, most recent first; entries have static storage.
inline const Kernel* kernels = nullptr;

struct Entry {
  explicit Entry(Kernel& kernel) {
    kernel.next = kernels;
    kernels = &kernel;
  }
};

inline const Kernel* find(const char* name) {
  for (const Kernel* k = kernels; k != nullptr; k = k->next) {
    const char *a = k->name, *b = name;
    while (*a != 0 && *a == *b) ++a, ++b;
    if (*a == *b) return k;
  }
  return nullptr;
}

}  // namespace rnnkit::cuda
