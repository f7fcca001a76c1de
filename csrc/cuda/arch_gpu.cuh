// The back end of arch.cuh for GPUs, sm_80 and later: PTX where CUDA C++ has no word for it. Include
// arch.cuh.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#define RNNKIT_DEVICE __device__ __forceinline__
#define RNNKIT_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define RNNKIT_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define RNNKIT_UNROLL _Pragma("unroll")

namespace rnnkit::cuda::arch {

RNNKIT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RNNKIT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
RNNKIT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
RNNKIT_DEVICE void sync() { __syncthreads(); }

RNNKIT_DEVICE uint16_t to_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
RNNKIT_DEVICE uint16_t to_fp16(float v) { return __half_as_ushort(__float2half_rn(v)); }
RNNKIT_DEVICE float from_bf16(uint16_t v) { return __bfloat162float(__ushort_as_bfloat16(v)); }
RNNKIT_DEVICE float from_fp16(uint16_t v) { return __half2float(__ushort_as_half(v)); }
RNNKIT_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

RNNKIT_DEVICE float exp(float v) { return ::expf(v); }
RNNKIT_DEVICE double exp(double v) { return ::exp(v); }
RNNKIT_DEVICE float tanh(float v) { return ::tanhf(v); }
RNNKIT_DEVICE double tanh(double v) { return ::tanh(v); }
RNNKIT_DEVICE float exp_fast(float v) { return __expf(v); }
RNNKIT_DEVICE float tanh_fast(float v) {
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

RNNKIT_DEVICE void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
RNNKIT_DEVICE void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
RNNKIT_DEVICE void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Errors that a kernel makes while it runs.
inline bool is_of_running(cudaError_t error) {
  switch (error) {
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
    case cudaErrorNvlinkUncorrectable:
      return true;
    default:
      return false;
  }
}

// Whether a launch waits for its kernel, as whoever looks for an error may ask of CUDA.
inline bool launches_wait() {
  const char* const asked = std::getenv("CUDA_LAUNCH_BLOCKING");
  return asked != nullptr && std::atoi(asked) != 0;
}

// A launch and its configuration; throws where a call for it failed, with CUDA's own words.
struct Attempt {
  const Launch& what;
  Grid grid;
  int threads;
  int64_t shared;

  // before: the error that stood there already. CUDA gives it again where nothing works after it; and a
  // launch that does not wait for its kernel gives what an earlier one did.
  void check(cudaError_t error, cudaError_t before) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is said here, and does not stand there before the next launch
    std::ostringstream message;
    message << "rnnkit: CUDA kernel " << what.kernel;
    if (what.function != nullptr) {
      message << " (" << what.pass << ", " << what.function;
      if (what.step >= 0) message << ", step " << what.step;
      message << ")";
    }
    message << " on " << grid.x << " x " << grid.y << " blocks of " << threads << " threads with " << shared
            << " bytes of shared memory: ";
    const bool earlier = error == before || (is_of_running(error) && !launches_wait());
    if (earlier) message << "CUDA had failed before this launch: ";
    message << cudaGetErrorString(error) << " (" << cudaGetErrorName(error) << ")";
    if (earlier && is_of_running(error)) {
      message << "; with CUDA_LAUNCH_BLOCKING=1 it is raised where it happens";
    }
    throw std::runtime_error(message.str());
  }
};

// More than 48 KiB of shared memory must be asked for: here, once for a kernel on a device, so that the
// launches of a long scan do not. No stream is touched, so a graph that is being captured does not mind.
inline cudaError_t ask_for_shared(const void* kernel, int64_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> granted;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = granted[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t refused =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (refused == cudaSuccess) most = bytes;
  return refused;
}

// On the current device.
template <class... Parameters, class... Arguments>
void launch(const Launch& what, void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared,
            const void* stream, const Arguments&... arguments) {
  const Attempt attempt{what, grid, threads, shared};
  const cudaError_t before = cudaPeekAtLastError();
  if (shared > 48 * 1024) {
    attempt.check(ask_for_shared(reinterpret_cast<const void*>(kernel), shared), before);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(const_cast<void*>(stream));
  attempt.check(cudaLaunchKernelEx(&config, kernel, arguments...), before);
}

}  // namespace rnnkit::cuda::arch
