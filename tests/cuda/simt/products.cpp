// The tensor cores of arch_cpu.h: the matrix product of a warp, from the words that its lanes brought. Sums
// in float64, rounded once; a GPU rounds oftener.

#include "arch.cuh"

namespace rnnkit::cuda::arch {
namespace {

// d[16][8] += a[16][K] b[K][8], laid out over lanes as arch.cuh says.
template <int K>
void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int g = 0; g < 8; ++g) {
    for (int half = 0; half < 2; ++half) {
      double sums[8] = {};
      for (int k = 0; k < K; ++k) {
        const double left = a[g + 8 * half][k];
        for (int n = 0; n < 8; ++n) sums[n] += left * b[k][n];
      }
      for (int n = 0; n < 8; ++n) {
        float& d = static_cast<const Product*>(lanes[4 * g + n / 2])->d[2 * half + n % 2];
        d = static_cast<float>(d + sums[n]);
      }
    }
  }
}

template <float (*from)(uint16_t)>
void multiply_halfs(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int j = 0; j < 4; ++j) {
        a[g + 8 * (j % 2)][2 * q + 8 * (j / 2) + e] = from(static_cast<uint16_t>(p.a[j] >> 16 * e));
      }
      for (int j = 0; j < 2; ++j) b[2 * q + 8 * j + e][g] = from(static_cast<uint16_t>(p.b[j] >> 16 * e));
    }
  }
  multiply<16>(lanes, a, b);
}

// A tensor core does not look at the 13 low bits.
float from_tf32(uint32_t v) { return from_bits(v & ~0x1fffu); }

}  // namespace

void multiply_bf16(void* const* lanes) { multiply_halfs<from_bf16>(lanes); }
void multiply_fp16(void* const* lanes) { multiply_halfs<from_fp16>(lanes); }

void multiply_tf32(void* const* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int j = 0; j < 4; ++j) a[g + 8 * (j % 2)][q + 4 * (j / 2)] = from_tf32(p.a[j]);
    for (int j = 0; j < 2; ++j) b[q + 4 * j][g] = from_tf32(p.b[j]);
  }
  multiply<8>(lanes, a, b);
}

}  // namespace rnnkit::cuda::arch
