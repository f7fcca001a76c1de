// The product of four warps that sm_90a alone has, wgmma m64n8k16 in bfloat16, for the probes: on other chips
// the kernel has no body. B comes from shared memory, A from registers or shared memory too.
//
// Operands as PTX has them. In shared memory, without a swizzle: pieces of 8 rows (of A, or columns of B) by
// 8 terms lie in 128 bytes, a row's 16 together; the descriptor holds, each over 16, the address (bits 0 to
// 13), the bytes to the next 8 terms (16 to 29) and those to the next 8 rows (32 to 45). In registers: warp w
// holds rows 16 w to 16 w + 15 as a fragment of mma.sync m16n8k16, and so are the results. One product of
// known numbers says first whether it is so.

#pragma once

#include "arch.cuh"

namespace rnnkit::cuda {

constexpr int in_a_row = 8;  // products of a group, each one's result added to by the next: 128 terms

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
struct Wgmma {
  float d[4] = {0, 0, 0, 0};
  uint32_t a[4] = {0, 0, 0, 0};
  uint64_t a_there = 0, b_there = 0;

  static __device__ uint64_t descriptor(const void* matrix) {
    const uint64_t at = static_cast<uint64_t>(__cvta_generic_to_shared(matrix));
    return (at & 0x3ffff) >> 4 | static_cast<uint64_t>(128 >> 4) << 16 |
           static_cast<uint64_t>(256 >> 4) << 32;
  }
  // Where a row's term stands, in elements.
  static __device__ int element_offset(int row, int term) {
    return row / 8 * 128 + term / 8 * 64 + row % 8 * 8 + term % 8;
  }

  template <bool REGISTERS>
  __device__ __forceinline__ void add() {
    if (REGISTERS) {
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_there)
          : "memory");
    } else {
      asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "l"(a_there), "l"(b_there)
                   : "memory");
    }
  }
  // Registers may be read and written by products from here on.
  static __device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  static __device__ __forceinline__ void end() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
};
#endif

// `rounds` groups of products of each four warps; `wrong` in place of the clocks where a product is not what
// it must be.
template <bool REGISTERS, class Out>
__global__ void __launch_bounds__(512, 1) wgmma_products(int rounds, double wrong, Out out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ __align__(128) uint16_t as[64 * 16], bs[8 * 16];
  for (int i = threadIdx.x; i < 64 * 16; i += blockDim.x) {
    as[Wgmma::element_offset(i / 16, i % 16)] = arch::to_bf16(static_cast<float>(i / 16 + i % 16));
  }
  for (int i = threadIdx.x; i < 8 * 16; i += blockDim.x) {
    bs[Wgmma::element_offset(i / 16, i % 16)] = arch::to_bf16(static_cast<float>(i / 16 - i % 16));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // products see what plain stores wrote
  __syncthreads();
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  Wgmma w;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const two = as + Wgmma::element_offset(row + i % 2 * 8, pair + i / 2 * 8);
    w.a[i] = static_cast<uint32_t>(two[1]) << 16 | two[0];
  }
  w.a_there = Wgmma::descriptor(as), w.b_there = Wgmma::descriptor(bs);
  Wgmma::begin();
  w.add<REGISTERS>();
  Wgmma::end();
  bool right = true;
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    const int m = row + i / 2 * 8, n = pair + i % 2;
    for (int k = 0; k < 16; ++k) sum += static_cast<float>((m + k) * (n - k));
    right = right && w.d[i] == sum;
  }
  const bool all_right = __syncthreads_and(right) != 0;
  const long long begin = clock64();
  for (int i = 0; i < rounds; ++i) {
    Wgmma::begin();
    RNNKIT_UNROLL
    for (int k = 0; k < in_a_row; ++k) w.add<REGISTERS>();
    Wgmma::end();
  }
  __syncthreads();
  if (threadIdx.x == 0) *out.clocks = all_right ? static_cast<double>(clock64() - begin) : wrong;
  out.sink[threadIdx.x] = w.d[0] + w.d[1] + w.d[2] + w.d[3];
#endif
}

}  // namespace rnnkit::cuda
