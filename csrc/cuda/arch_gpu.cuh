// The back end of arch.cuh for GPUs, sm_80 and later: PTX where CUDA C++ has no word for it. Include
// arch.cuh.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

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

// What a failed call says: kernel, configuration, CUDA's own words.
inline void check(cudaError_t error, const char* name, Grid grid, int threads, int64_t shared) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << "rnnkit: CUDA kernel " << name << " on " << grid.x << " x " << grid.y << " blocks of " << threads
          << " threads with " << shared << " bytes of shared memory: " << cudaGetErrorString(error) << " ("
          << cudaGetErrorName(error) << ")";
  throw std::runtime_error(message.str());
}

// On the current device. More than 48 KiB of shared memory must be asked for; the call costs a microsecond.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared,
            const void* stream, const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          name, grid, threads, shared);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(const_cast<void*>(stream));
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name, grid, threads, shared);
}

}  // namespace rnnkit::cuda::arch
