// Small kernels that hold the machinery of this folder: products and conversions for test_shim.py to compare,
// and kernels each of which can be had with a fault of a kind that it must find. A toy's run returns what is
// wrong with its results, or nothing; a launch throws.

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "arch.cuh"
#include "scan.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

namespace arch = rnnkit::cuda::arch;
using rnnkit::cuda::Grid;
using Stream = const void*;

// d[16][8] += a[16][K] b[K][8] by one warp, in row-major order; words of 32 bits, each one or two values.
template <int K, class T,
          void (*mma)(float (&)[4], uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, simt::Place)>
RNNKIT_KERNEL(32)
product(const T* a, const T* b, float* d) {
  constexpr int each = 4 / sizeof(T);
  const int g = arch::thread() / 4, q = arch::thread() % 4;
  uint32_t wa[4] = {}, wb[2] = {};
  for (int e = 0; e < each; ++e) {
    const int shift = 16 * e;
    for (int j = 0; j < 4; ++j) {
      const int row = g + 8 * (j % 2), column = each * q + e + K / 2 * (j / 2);
      wa[j] |= static_cast<uint32_t>(a[row * K + column]) << shift;
    }
    for (int j = 0; j < 2; ++j) {
      wb[j] |= static_cast<uint32_t>(b[(each * q + e + K / 2 * j) * 8 + g]) << shift;
    }
  }
  float sums[4];
  for (int j = 0; j < 4; ++j) sums[j] = d[(g + 8 * (j / 2)) * 8 + 2 * q + j % 2];
  mma(sums, wa[0], wa[1], wa[2], wa[3], wb[0], wb[1], simt::Place::here());
  for (int j = 0; j < 4; ++j) d[(g + 8 * (j / 2)) * 8 + 2 * q + j % 2] = sums[j];
}

// Each thread stores a number and loads its neighbour's. `fault`: no barrier between.
RNNKIT_KERNEL(96) exchange(int fault, const float* in, float* out) {
  RNNKIT_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int k = arch::thread();
  numbers[k] = in[k];
  if (!fault) arch::sync();
  out[96 * arch::block_x() + k] = numbers[(k + 1) % 96];
}

// A round: each thread adds its neighbour's number to its own. `fault` 1: the stores do not wait for the
// loads; 2: the next round's loads do not wait for the stores.
RNNKIT_KERNEL(96) rounds(int fault, int count, const float* in, float* out) {
  RNNKIT_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int k = arch::thread();
  numbers[k] = in[k];
  arch::sync();
  for (int round = 0; round < count; ++round) {
    const float sum = numbers[k] + numbers[(k + 40) % 96];
    if (fault != 1) arch::sync();
    numbers[k] = sum;
    if (fault != 2) arch::sync();
  }
  out[96 * arch::block_x() + k] = numbers[k];
}

// The same with one barrier a round, since what a round stores is not what it loads. `fault`: it is.
RNNKIT_KERNEL(96) buffers(int fault, int count, const float* in, float* out) {
  RNNKIT_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int k = arch::thread(), other = fault ? 0 : 96;
  numbers[k] = in[k];
  arch::sync();
  for (int round = 0; round < count; ++round) {
    const float* from = numbers + (round % 2 ? other : 0);
    float* to = numbers + (round % 2 ? 0 : other);
    to[k] = from[k] + from[(k + 40) % 96];
    arch::sync();
  }
  out[96 * arch::block_x() + k] = numbers[count % 2 ? other + k : k];
}

// The sum of `bytes` / 4 numbers that the first thread stores. `fault` 1: one is not stored; 2: one more is
// loaded, 3: stored, than there is memory for.
RNNKIT_KERNEL(32) memory(int fault, int numbers, float* out) {
  RNNKIT_SHARED(shared);
  float* all = reinterpret_cast<float*>(shared);
  if (arch::thread() == 0) {
    for (int k = 0; k < numbers + (fault == 3); ++k) {
      if (fault != 1 || k != 5) all[k] = static_cast<float>(k);
    }
  }
  arch::sync();
  float sum = 0;
  for (int k = 0; k < numbers + (fault == 2); ++k) sum += all[k];
  out[arch::thread()] = sum;
}

// Barriers and products in different orders. `fault` 1: a thread leaves before the barrier; 2: half a warp
// leaves out a product; 3: a warp waits at another barrier than the rest; 4: a product in a warp that is not
// whole.
RNNKIT_KERNEL(80) order(int fault, float* out) {
  const int k = arch::thread();
  float d[4] = {};
  if (fault == 1 && k == 37) return;
  arch::sync();
  if (k < (fault == 2 ? 48 : fault == 4 ? 80 : 64)) arch::mma_tf32(d, 0, 0, 0, 0, 0, 0);
  if (fault == 3 && k >= 32) arch::sync();
  if (fault != 3 || k < 32) arch::sync();
  out[80 * arch::block_x() + k] = d[0];
}

// What no order of threads shows in the result, since a fiber gives way only where it waits and both stores
// are of the same number. `fault` 1: two threads of a block store one place; 2: two blocks; 3: a product in
// the place of a barrier.
RNNKIT_KERNEL(64) hidden(int fault, float* common, float* out) {
  RNNKIT_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int k = arch::thread();
  if (k == 0 || (fault == 1 && k == 63)) numbers[64] = 1;
  if (k == 5 && (fault == 2 || arch::block_x() == 0)) *common = 2;
  numbers[k] = static_cast<float>(k);
  float d[4] = {};
  arch::mma_tf32(d, 0, 0, 0, 0, 0, 0);
  if (fault != 3) arch::sync();
  out[64 * arch::block_x() + k] = numbers[k ^ 1] + d[0];
}

// Many small blocks.
RNNKIT_KERNEL(64) many(int width, float* out) {
  RNNKIT_SHARED(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int k = arch::thread(), b = arch::block_y() * width + arch::block_x();
  numbers[k] = static_cast<float>(b);
  arch::sync();
  out[64 * b + k] = numbers[63 - k] + static_cast<float>(k);
}

constexpr int blocks = 3;

std::string differ(const std::vector<float>& got, const std::vector<float>& expected) {
  for (size_t k = 0; k < expected.size(); ++k) {
    if (!(got[k] == expected[k])) {
      return "number " + std::to_string(k) + ": got " + std::to_string(got[k]) + ", expected " +
             std::to_string(expected[k]);
    }
  }
  return "";
}

std::vector<float> ramp() {
  std::vector<float> v(96);
  for (int k = 0; k < 96; ++k) v[k] = static_cast<float>(k * 7 % 31);
  return v;
}

std::string run_exchange(int fault, Stream stream) {
  const std::vector<float> in = ramp();
  std::vector<float> out(96 * blocks), expected(out.size());
  for (int k = 0; k < 96 * blocks; ++k) expected[k] = in[(k + 1) % 96];
  arch::launch("exchange", exchange, Grid{blocks, 1}, 96, 96 * 4, stream, fault, in.data(), out.data());
  return differ(out, expected);
}

std::vector<float> after_rounds(int count) {
  std::vector<float> now = ramp(), then(96), all;
  for (int round = 0; round < count; ++round) {
    for (int k = 0; k < 96; ++k) then[k] = now[k] + now[(k + 40) % 96];
    now = then;
  }
  for (int b = 0; b < blocks; ++b) all.insert(all.end(), now.begin(), now.end());
  return all;
}

std::string run_rounds(int fault, Stream stream) {
  const std::vector<float> in = ramp();
  std::vector<float> out(96 * blocks);
  arch::launch("rounds", rounds, Grid{blocks, 1}, 96, 96 * 4, stream, fault, 5, in.data(), out.data());
  return differ(out, after_rounds(5));
}

std::string run_buffers(int fault, Stream stream) {
  const std::vector<float> in = ramp();
  std::vector<float> out(96 * blocks);
  arch::launch("buffers", buffers, Grid{blocks, 1}, 96, (fault ? 1 : 2) * 96 * 4, stream, fault, 5, in.data(),
               out.data());
  return differ(out, after_rounds(5));
}

std::string run_memory(int fault, Stream stream) {
  std::vector<float> out(32);
  arch::launch("memory", memory, Grid{1, 1}, 32, 9 * 4, stream, fault, 9, out.data());
  return differ(out, std::vector<float>(32, 36));
}

std::string run_order(int fault, Stream stream) {
  std::vector<float> out(80 * 2, 1);
  arch::launch("order", order, Grid{2, 1}, 80, 0, stream, fault, out.data());
  return differ(out, std::vector<float>(80 * 2));
}

std::string run_hidden(int fault, Stream stream) {
  std::vector<float> out(64 * blocks), expected(out.size());
  float common = 0;
  for (int k = 0; k < 64 * blocks; ++k) expected[k] = static_cast<float>((k ^ 1) % 64);
  arch::launch("hidden", hidden, Grid{blocks, 1}, 64, 65 * 4, stream, fault, &common, out.data());
  return differ(out, expected);
}

std::string run_many(int, Stream stream) {
  std::vector<float> out(64 * 300), expected(out.size());
  for (int k = 0; k < 64 * 300; ++k) expected[k] = static_cast<float>(k / 64 + k % 64);
  arch::launch("many", many, Grid{100, 3}, 64, 64 * 4, stream, 100, out.data());
  return differ(out, expected);
}

// `fault`: the launch's sizes, one that a GPU refuses.
std::string run_refused(int fault, Stream stream) {
  const Grid grids[] = {{1, 1}, {0, 1}, {1, 65536}, {1, 1}, {1, 1}};
  const int threads[] = {64, 64, 64, 1056, 64};
  const int64_t shared[] = {65 * 4, 65 * 4, 65 * 4, 65 * 4, 227 * 1024 + 1};
  std::vector<float> out(64);
  float common;
  arch::launch("hidden", hidden, grids[fault], threads[fault], shared[fault], stream, 0, &common, out.data());
  return "";
}

struct Toy {
  const char* name;
  std::string (*run)(int fault, Stream stream);
};
const Toy toys[] = {{"exchange", run_exchange}, {"rounds", run_rounds},  {"buffers", run_buffers},
                    {"memory", run_memory},     {"order", run_order},    {"hidden", run_hidden},
                    {"many", run_many},         {"refused", run_refused}};

// A scan that leaves in every field its place in the structure, and in lengths the sizes: run.py's mirror of
// scan.h.
using rnnkit::cuda::Backward;
using rnnkit::cuda::Forward;
using rnnkit::cuda::Sequence;
using rnnkit::cuda::State;

struct Marks {
  float next = 1;
  void operator()(const void* field) { *static_cast<float*>(const_cast<void*>(field)) = next++; }
  void operator()(State state) {
    if (!state.opmath) throw std::runtime_error("a state of float32 is in the compute type");
    (*this)(state.data);
  }
};

template <class... Fields>
void mark(const Sequence& s, Fields... fields) {
  const int64_t sizes[] = {s.n, s.B, s.H, s.N, s.t0, s.total, s.reverse, s.relu};
  for (int k = 0; k < 8; ++k) const_cast<int64_t*>(s.lengths)[k] = sizes[k];
  const_cast<bool*>(s.reset)[0] = true;
  static_cast<unsigned char*>(s.workspace)[99] = 1;
  Marks m;
  (m(s.h_r), m(s.c_r), m(s.b_hn), m(s.h_0), m(s.c_0));
  (m(fields), ...);
}

int64_t forward_bytes(const Forward&) { return 100; }
void forward(const Forward& f, Stream) { mark(f, f.gx, f.w_hh, f.w_hr, f.y, f.h_n, f.c_n, f.c_all, f.gates); }
int64_t backward_bytes(const Backward&) { return 100; }
void backward(const Backward& b, Stream) {
  mark(b, b.w_t, b.w_hr_t, b.gy, b.gc_all, b.gh_n, b.gc_n, b.y, b.c_all, b.gates, b.dgx, b.dgh, b.dp, b.dh_0,
       b.dc_0, b.dh_r, b.dc_r);
}

rnnkit::cuda::Kernel kernel = {"toys", forward_bytes, forward, backward_bytes, backward, nullptr};
const rnnkit::cuda::Entry enter(kernel);

}  // namespace

// 0: right; 1: wrong, and `message` says what; 2: it threw.
EXPORT int toy(const char* name, int fault, uint64_t seed, bool ordered, char* message, int64_t size) {
  const simt::Schedule schedule{seed, ordered};
  for (const Toy& t : toys) {
    if (std::string(name) != t.name) continue;
    try {
      const std::string wrong = t.run(fault, &schedule);
      std::snprintf(message, static_cast<size_t>(size), "%s", wrong.c_str());
      return wrong.empty() ? 0 : 1;
    } catch (const std::exception& error) {
      std::snprintf(message, static_cast<size_t>(size), "%s", error.what());
      return 2;
    }
  }
  std::snprintf(message, static_cast<size_t>(size), "there is no toy %s", name);
  return 2;
}

// d[16][8] += a[16][K] b[K][8], K = 16 of halfs, 8 of words.
EXPORT void toy_product(const char* kind, const void* a, const void* b, float* d, uint64_t seed) {
  const simt::Schedule schedule{seed, false};
  const auto halfs = [&](auto kernel) {
    arch::launch(kind, kernel, Grid{1, 1}, 32, 0, &schedule, static_cast<const uint16_t*>(a),
                 static_cast<const uint16_t*>(b), d);
  };
  if (kind == std::string("bf16")) halfs(product<16, uint16_t, arch::mma_bf16>);
  if (kind == std::string("fp16")) halfs(product<16, uint16_t, arch::mma_fp16>);
  if (kind == std::string("tf32")) {
    arch::launch(kind, product<8, uint32_t, arch::mma_tf32>, Grid{1, 1}, 32, 0, &schedule,
                 static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), d);
  }
}

EXPORT void toy_to_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::to_bf16(in[k]);
}
EXPORT void toy_to_fp16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::to_fp16(in[k]);
}
EXPORT void toy_to_tf32(const float* in, uint32_t* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::to_tf32(in[k]);
}
EXPORT void toy_from_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::from_bf16(in[k]);
}
EXPORT void toy_from_fp16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::from_fp16(in[k]);
}
EXPORT void toy_tanh_fast(const float* in, float* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::tanh_fast(in[k]);
}
EXPORT void toy_exp_fast(const float* in, float* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) out[k] = arch::exp_fast(in[k]);
}
