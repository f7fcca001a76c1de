// Launches of the CUDA kernels without a GPU, for tests/cuda/test_cuda_launch.py: linked with --wrap, so that
// what arch.cuh asks of CUDA arrives here and fails, succeeds or is counted as a part of this program wishes.
// Each part prints what was raised, a line each.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "arch.cuh"
#include "scan.h"

using rnnkit::cuda::Backward;
using rnnkit::cuda::Forward;
using rnnkit::cuda::Grid;
namespace arch = rnnkit::cuda::arch;

namespace {
bool fake = false;                  // whether CUDA itself is left out
cudaError_t there = cudaSuccess;    // what stands there before a launch
cudaError_t result = cudaSuccess;   // what a launch gives
cudaError_t refusal = cudaSuccess;  // what asking for shared memory gives
int64_t until_failure = -1;         // launches that succeed before one gives it; -1: no one does
thread_local int device = 0;
std::atomic<int> asked{0}, launched{0};
}  // namespace

extern "C" {
cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __real_cudaGetDevice(int*);
cudaError_t __real_cudaPeekAtLastError();
cudaError_t __real_cudaGetLastError();

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  ++launched;
  if (!fake) return __real_cudaLaunchKernelExC(config, kernel, arguments);
  if (until_failure < 0 || until_failure-- > 0 || result == cudaSuccess) return cudaSuccess;
  return there = result;
}
cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++asked;
  return fake ? refusal : __real_cudaFuncSetAttribute(kernel, attribute, value);
}
cudaError_t __wrap_cudaGetDevice(int* index) {
  if (!fake) return __real_cudaGetDevice(index);
  *index = device;
  return cudaSuccess;
}
cudaError_t __wrap_cudaPeekAtLastError() { return fake ? there : __real_cudaPeekAtLastError(); }
cudaError_t __wrap_cudaGetLastError() {
  return fake ? std::exchange(there, cudaSuccess) : __real_cudaGetLastError();
}
}

namespace {

RNNKIT_KERNEL(32) one(int) {}
RNNKIT_KERNEL(32) other(int) {}

// Whether it ran; else what it raised is printed.
template <class F>
bool ran(F f) {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return false;
  }
}

template <class Side>
Side sides(bool projects) {
  static const int64_t memory[2] = {};
  Side side = {};
  side.n = side.total = 2, side.B = 3, side.H = 40, side.N = projects ? 24 : 40;
  if constexpr (std::is_same_v<Side, Forward>) {
    side.w_hr = projects ? memory : nullptr;
  } else {
    side.w_hr_t = projects ? memory : nullptr;
  }
  return side;
}

bool run(const char* name, bool backward, bool projects) {
  const rnnkit::cuda::Kernel* const kernel = rnnkit::cuda::find(name);
  return ran([&] {
    if (kernel == nullptr) throw std::runtime_error("there is no such row");
    if (backward) {
      kernel->backward(sides<Backward>(projects), nullptr);
    } else {
      kernel->forward(sides<Forward>(projects), nullptr);
    }
  });
}

void launch(int64_t shared, void (*kernel)(int) = one) {
  arch::launch("row", kernel, Grid{5, 2}, 32, shared, nullptr, 7);
}

// Every launch of a scan is refused once.
void walk(const char* name) {
  fake = true, result = cudaErrorInvalidConfiguration;
  for (const bool backward : {false, true}) {
    for (int64_t k = 0; until_failure = k, !run(name, backward, true); ++k) continue;
  }
}

void earlier() {
  fake = true;
  const auto meets = [](cudaError_t before, cudaError_t now) {
    there = before, result = now, until_failure = 0;
    if (ran([] { launch(0); })) std::puts("ran");
  };
  meets(cudaErrorIllegalAddress, cudaErrorIllegalAddress);
  meets(cudaErrorUnknown, cudaErrorUnknown);
  meets(cudaSuccess, cudaErrorLaunchFailure);
  meets(cudaErrorInvalidValue, cudaErrorInvalidConfiguration);
  meets(cudaErrorInvalidValue, cudaSuccess);
}

// As CUDA does it: what a launch gives stands there until someone takes it.
void again() {
  fake = true, result = cudaErrorInvalidConfiguration;
  for (int k = 0; k < 2; ++k) {
    until_failure = 0;
    ran([] { launch(0); });
  }
}

void shared() {
  fake = true;
  std::vector<std::thread> threads;
  for (int k = 0; k < 8; ++k) {
    threads.emplace_back([k] {
      device = k % 2;
      for (int i = 0; i < 500; ++i) launch(49153, one), launch(65536, other), launch(49152, other);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%d of %d\n", asked.load(), launched.load());
  launch(65536, one), launch(49153, one), launch(65536, one);
  std::printf("%d\n", asked.load());
  refusal = cudaErrorInvalidValue;
  for (int k = 0; k < 2; ++k) ran([] { launch(232449, one); });
  std::printf("%d of %d\n", asked.load(), launched.load());
}

}  // namespace

int main(int count, char** arguments) {
  const char* const part = count > 1 ? arguments[1] : "";
  if (std::strcmp(part, "refused") == 0) {
    for (int k = 2; k < count; ++k) {
      for (const bool backward : {false, true}) run(arguments[k], backward, false);
    }
  } else if (std::strcmp(part, "walk") == 0 && count == 3) {
    walk(arguments[2]);
  } else if (std::strcmp(part, "earlier") == 0) {
    earlier();
  } else if (std::strcmp(part, "again") == 0) {
    again();
  } else if (std::strcmp(part, "shared") == 0) {
    shared();
  } else {
    std::fprintf(stderr, "usage: %s refused ROW... | walk ROW | earlier | again | shared\n", arguments[0]);
    return 2;
  }
  return 0;
}
