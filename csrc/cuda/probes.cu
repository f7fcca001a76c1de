// Small kernels that say what a GPU takes for the things that kernels are made of: matrix products, shared
// memory, fences, barriers, the memory of neighbours in a cluster, launches. For whoever chooses among
// designs, and for nobody else: no scan uses them. They are of GPUs alone, so what arch.cuh has no word for
// stands here as PTX.
//
// Each measures a loop of many rounds by the clock of one multiprocessor; its ends weigh nothing then. What a
// loop computes is stored, so no round can be left out, and no two chains in it begin alike, so none can
// stand for another. Whatever waits counts its looks and gives up. An empty probe launches and does not wait.

#include "probes.h"

#include <cmath>
#include <string>

#include "arch.cuh"
#include "wgmma.cuh"

namespace rnnkit::cuda {
namespace {

constexpr int threads = 256;       // of a block, where nothing else is said
constexpr int chains = 8;          // independent products of a warp, more than the unit holds at once
constexpr int patience = 1 << 20;  // looks at what does not come, some hundred clocks each
constexpr int bytes =
    128 * 1024;               // of shared memory: more than half of a multiprocessor's, so one block on each
constexpr double lost = -1;   // what a kernel that gave up leaves
constexpr double wrong = -2;  // and one whose product is not what it must be

// A kernel's results: clocks of the loop, and somewhere to put what it computed.
struct Out {
  double* clocks;
  float* sink;  // [threads of the grid]
};

__device__ __forceinline__ void keep(const Out& out, float value) {
  out.sink[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] = value;
}

// A plain store that stays where it is.
__device__ __forceinline__ void store(float* to, float value) {
  asm volatile("st.global.f32 [%0], %1;" : : "l"(to), "f"(value) : "memory");
}

template <bool TF32, int CHAINS>
__global__ void __launch_bounds__(512, 1) products(int rounds, Out out) {
  float d[CHAINS][4];
  const float lane = static_cast<float>(threadIdx.x);
  for (int c = 0; c < CHAINS; ++c) {
    for (int j = 0; j < 4; ++j) d[c][j] = lane + static_cast<float>(4 * c + j);
  }
  uint32_t a[6];  // from 2^-7 to 2^-3, in registers of their own as in a scan
  for (int i = 0; i < 6; ++i)
    a[i] = TF32 ? 0x3c000000u + ((threadIdx.x + i) << 13) : 0x3c003c00u + threadIdx.x + i;
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < rounds; ++i) {
    RNNKIT_UNROLL
    for (int c = 0; c < CHAINS; ++c) {
      if (TF32) {
        arch::mma_tf32(d[c], a[0], a[1], a[2], a[3], a[4], a[5]);
      } else {
        arch::mma_bf16(d[c], a[0], a[1], a[2], a[3], a[4], a[5]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *out.clocks = static_cast<double>(clock64() - begin);
  float sum = 0;
  for (int c = 0; c < CHAINS; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  keep(out, sum);
}

// Each lane 16 bytes, a warp 512 in a row.
__global__ void __launch_bounds__(512, 1) shared_reads(int rounds, Out out) {
  RNNKIT_SHARED(memory);
  auto* const words = reinterpret_cast<uint32_t*>(memory);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = i;
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  uint32_t low = 0, high = 0, at = threadIdx.x * 16;
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 8
  for (int i = 0; i < rounds; ++i) {
    uint32_t v[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(start + at));
    low ^= v[0] ^ v[1], high ^= v[2] ^ v[3];
    at = (at + 16 * 512) % bytes;
  }
  __syncthreads();
  if (threadIdx.x == 0) *out.clocks = static_cast<double>(clock64() - begin);
  keep(out, static_cast<float>(low ^ high));
}

// `stores` words of each thread to memory, then one thread's fence for the whole block.
__global__ void __launch_bounds__(threads, 1) fences(int rounds, int stores, Out out) {
  float* const mine = out.sink + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < rounds; ++i) {
    for (int k = 0; k < stores; ++k) {
      store(mine + static_cast<int64_t>(k) * gridDim.x * blockDim.x, static_cast<float>(i));
    }
    __syncthreads();
    if (threadIdx.x == 0) __threadfence();
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.clocks = static_cast<double>(clock64() - begin);
}

// All blocks wait for one another at a counter in memory, again and again.
__global__ void __launch_bounds__(threads, 1) grid_barriers(int rounds, unsigned* counter, Out out) {
  __shared__ bool met;
  const long long begin = clock64();
  int done = 0;
  for (; done < rounds; ++done) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned wanted = (done + 1) * gridDim.x;
      __threadfence();
      atomicAdd(counter, 1u);
      unsigned seen = 0;
      for (int look = 0; look < patience; ++look) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        if (seen >= wanted) break;
      }
      met = seen >= wanted;
    }
    __syncthreads();
    if (!met) break;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *out.clocks = done == rounds ? static_cast<double>(clock64() - begin) : lost;
  }
}

// Clocks of a multiprocessor in a nanosecond.
__global__ void rate(Out out) {
  unsigned long long from, to;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(from));
  const long long begin = clock64();
  long long end = begin;
  while (end - begin < 20000000) end = clock64();
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(to));
  *out.clocks = static_cast<double>(end - begin) / static_cast<double>(to - from);
}

__global__ void empty() {}

// Clusters, from sm_90 on; older chips have empty bodies, and the host does not launch them.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RNNKIT_CLUSTERS
#endif

#if defined(RNNKIT_CLUSTERS)
__device__ __forceinline__ uint32_t rank_of() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t blocks_of() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
// The address in a peer's shared memory that is `address` in one's own.
__device__ __forceinline__ uint32_t at_peer(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Whether a phase of a barrier in shared memory has ended.
__device__ __forceinline__ bool ended(uint32_t barrier, uint32_t parity) {
  uint32_t yes = 0;
  for (int look = 0; look < patience && yes == 0; ++look) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(yes)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
  return yes != 0;
}
#endif

// 16 bytes a lane from the peers, or to them, one after the other.
template <bool STORE>
__global__ void __launch_bounds__(threads, 1) neighbours(int rounds, Out out) {
#if defined(RNNKIT_CLUSTERS)
  RNNKIT_SHARED(memory);
  auto* const words = reinterpret_cast<uint32_t*>(memory);
  for (int i = threadIdx.x; i < bytes / 4; i += threads) words[i] = i;
  const uint32_t mine = static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + threadIdx.x * 16;
  const uint32_t rank = rank_of(), blocks = blocks_of();
  uint32_t low = 0, high = 0, peer = (rank + 1) % blocks, step = 0;
  cluster_sync();
  const long long begin = clock64();
#pragma unroll 4
  for (int i = 0; i < rounds; ++i) {
    const uint32_t there = at_peer(mine + step, peer);
    if (STORE) {
      asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%1,%1,%1};" : : "r"(there), "r"(i) : "memory");
    } else {
      uint32_t v[4];
      asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(there));
      low ^= v[0] ^ v[1], high ^= v[2] ^ v[3];
    }
    peer = peer + 1 == blocks ? 0 : peer + 1;
    if (peer == rank) peer = peer + 1 == blocks ? 0 : peer + 1;
    step = (step + threads * 16) % bytes;
  }
  cluster_sync();  // what was sent has arrived, and nobody leaves while others read
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.clocks = static_cast<double>(clock64() - begin);
  keep(out, static_cast<float>(low ^ high ^ words[threadIdx.x]));
#endif
}

// A word goes from block 0 to the last block of its cluster and back, by st.async; whoever gets it adds one.
__global__ void __launch_bounds__(32, 1) there_and_back(int rounds, Out out) {
#if defined(RNNKIT_CLUSTERS)
  __shared__ __align__(8) uint64_t barrier;
  __shared__ uint32_t word;
  const uint32_t rank = rank_of(), last = blocks_of() - 1;
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  const uint32_t word_address = static_cast<uint32_t>(__cvta_generic_to_shared(&word));
  if (threadIdx.x == 0) {
    word = 0;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                 :
                 : "r"(here)
                 : "memory");
  }
  __syncwarp();  // the barrier is one of whole warps
  cluster_sync();
  const long long begin = clock64();
  int done = 0;
  uint32_t value = 0;
  if (threadIdx.x == 0 && (rank == 0 || rank == last)) {
    const uint32_t other = rank == 0 ? last : 0;
    const uint32_t to = at_peer(word_address, other), bell = at_peer(here, other);
    const auto send = [&] {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
                   :
                   : "r"(to), "r"(value + 1), "r"(bell)
                   : "memory");
    };
    for (; done < rounds; ++done) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4;" : : "r"(here) : "memory");
      if (rank == 0) send();
      if (!ended(here, done % 2)) break;
      value = *static_cast<volatile uint32_t*>(&word);
      if (rank != 0) send();
    }
  }
  const long long end = clock64();
  __syncwarp();
  cluster_sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const bool complete = done == rounds && value == 2 * static_cast<uint32_t>(rounds);
    *out.clocks = complete ? static_cast<double>(end - begin) : lost;
  }
#endif
}

// Barriers of a cluster, with a word of each thread stored to memory before each, or none.
template <bool STORE>
__global__ void __launch_bounds__(threads, 1) cluster_barriers(int rounds, Out out) {
#if defined(RNNKIT_CLUSTERS)
  float* const mine = out.sink + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  cluster_sync();
  const long long begin = clock64();
  for (int i = 0; i < rounds; ++i) {
    if (STORE) store(mine, static_cast<float>(i));
    cluster_sync();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *out.clocks = static_cast<double>(clock64() - begin);
#endif
}

// On the host.

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("rnnkit: probe ") + what + ": " + cudaGetErrorString(error));
}

// Results on the device, and a counter that is zero.
class Room {
 public:
  Room(const char* what, int64_t count, cudaStream_t stream) : what_(what), stream_(stream) {
    const size_t size = 256 + static_cast<size_t>(count) * sizeof(float);
    must(cudaMalloc(&memory_, size), what);
    must(cudaMemsetAsync(memory_, 0, size, stream), what);
  }
  ~Room() { cudaFree(memory_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  Out out() const { return {static_cast<double*>(memory_), reinterpret_cast<float*>(at(256))}; }
  unsigned* counter() const { return reinterpret_cast<unsigned*>(at(128)); }
  double clocks() const {
    double found = 0;
    must(cudaMemcpyAsync(&found, memory_, sizeof found, cudaMemcpyDeviceToHost, stream_), what_);
    must(cudaStreamSynchronize(stream_), what_);
    if (found == lost)
      throw std::runtime_error(std::string("rnnkit: probe ") + what_ + ": blocks waited in vain");
    if (found == wrong)
      throw std::runtime_error(std::string("rnnkit: probe ") + what_ + ": its product is wrong");
    return found;
  }

 private:
  char* at(int64_t offset) const { return static_cast<char*>(memory_) + offset; }
  const char* what_;
  cudaStream_t stream_;
  void* memory_ = nullptr;
};

int attribute(cudaDeviceAttr which, const char* what) {
  int device = 0, value = 0;
  must(cudaGetDevice(&device), what);
  must(cudaDeviceGetAttribute(&value, which, device), what);
  return value;
}

// A launch whose blocks are on the device all at once: in clusters of `size`, or (0) all of the grid.
struct Together {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[1] = {};

  Together(int64_t size, int64_t blocks, int block, int shared, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = attributes, config.numAttrs = 1;
    if (size == 0) {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
    } else {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = static_cast<unsigned>(size);
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    }
  }
};

// Clusters of a kernel that the device holds at once; more than 8 blocks must be asked for.
template <class Kernel>
int fitting(Kernel kernel, int64_t size, int block, const char* what) {
  if (attribute(cudaDevAttrComputeCapabilityMajor, what) < 9) {
    throw std::runtime_error(std::string("rnnkit: probe ") + what + ": clusters need compute capability 9.0");
  }
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
  Together plan(size, size, block, bytes, nullptr);
  int clusters = 0;
  must(cudaOccupancyMaxActiveClusters(&clusters, kernel, &plan.config), what);
  return clusters;
}

// Clocks of so many rounds in as many clusters as there is room for, a block on each multiprocessor.
template <class Kernel>
double in_clusters(Kernel kernel, int64_t size, int block, int rounds, const char* what,
                   cudaStream_t stream) {
  const int clusters = fitting(kernel, size, block, what);
  if (clusters == 0)
    throw std::runtime_error(std::string("rnnkit: probe ") + what + ": no cluster of this size fits");
  const Room room(what, clusters * size * block, stream);
  Together plan(size, clusters * size, block, bytes, stream);
  must(cudaLaunchKernelEx(&plan.config, kernel, rounds, room.out()), what);
  return room.clocks();
}

template <class Kernel>
double on_one(Kernel kernel, int64_t warps, int shared, int rounds, const char* what, cudaStream_t stream) {
  const int block = static_cast<int>(warps) * 32;
  const Room room(what, block, stream);
  arch::launch(what, kernel, Grid{1, 1}, block, shared, stream, rounds, room.out());
  return room.clocks();
}

}  // namespace

double probe(const char* what, int64_t size, Stream given) {
  const auto stream = static_cast<cudaStream_t>(const_cast<void*>(given));
  const std::string name = what;
  const auto between = [&](int64_t least, int64_t most) {
    if (size >= least && size <= most) return;
    throw std::runtime_error("rnnkit: probe " + name + ": size must be " + std::to_string(least) + " to " +
                             std::to_string(most) + ", got " + std::to_string(size));
  };
  constexpr int rounds = 4096;
  const double each = static_cast<double>(rounds);
  if (name == "mma_bf16" || name == "mma_tf32") {
    between(1, 16);
    const auto kernel = name == "mma_bf16" ? products<false, chains> : products<true, chains>;
    return on_one(kernel, size, 0, rounds, what, stream) / (each * chains * static_cast<double>(size));
  }
  if (name == "mma_bf16_latency" || name == "mma_tf32_latency") {
    between(1, 1);
    const auto kernel = name == "mma_bf16_latency" ? products<false, 1> : products<true, 1>;
    return on_one(kernel, size, 0, rounds, what, stream) / each;
  }
  if (name == "wgmma_registers" || name == "wgmma_shared") {
    between(4, 16);
    if (size % 4 != 0) throw std::runtime_error("rnnkit: probe " + name + ": size must be a multiple of 4");
    if (attribute(cudaDevAttrComputeCapabilityMajor, what) != 9) {
      throw std::runtime_error("rnnkit: probe " + name + ": wgmma needs compute capability 9.0");
    }
    const auto kernel = name == "wgmma_registers" ? wgmma_products<true, Out> : wgmma_products<false, Out>;
    const int block = static_cast<int>(size) * 32;
    const Room room(what, block, stream);
    arch::launch(what, kernel, Grid{1, 1}, block, 0, stream, rounds, wrong, room.out());
    return room.clocks() / (each * in_a_row * static_cast<double>(size) / 4);
  }
  if (name == "shared_read") {
    between(1, 16);
    return each * static_cast<double>(size) * 512 / on_one(shared_reads, size, bytes, rounds, what, stream);
  }
  if (name == "fence" || name == "grid_barrier") {
    const int all = attribute(cudaDevAttrMultiProcessorCount, what);
    if (name == "fence") {
      between(0, 64);
      const Room room(what, static_cast<int64_t>(all) * threads * (size + 1), stream);
      arch::launch(what, fences, Grid{all, 1}, threads, 0, stream, rounds, static_cast<int>(size),
                   room.out());
      return room.clocks() / each;
    }
    between(0, all);
    const int64_t blocks = size == 0 ? all : size;
    const Room room(what, blocks * threads, stream);
    Together plan(0, blocks, threads, 0, stream);
    must(cudaLaunchKernelEx(&plan.config, grid_barriers, rounds, room.counter(), room.out()), what);
    return room.clocks() / each;
  }
  if (name == "clock") {
    const Room room(what, 1, stream);
    arch::launch(what, rate, Grid{1, 1}, 1, 0, stream, room.out());
    return room.clocks();
  }
  if (name == "empty") {
    between(0, 100000);
    for (int64_t i = 0; i < size; ++i) arch::launch(what, empty, Grid{1, 1}, 32, 0, stream);
    return 0;
  }
  if (name == "clusters") {
    between(1, 16);
    return fitting(neighbours<false>, size, threads, what);
  }
  if (name == "cluster_read" || name == "cluster_write") {
    between(2, 16);
    const auto kernel = name == "cluster_read" ? neighbours<false> : neighbours<true>;
    return each * threads * 16 / in_clusters(kernel, size, threads, rounds, what, stream);
  }
  if (name == "async_round_trip") {
    between(2, 16);
    return in_clusters(there_and_back, size, 32, rounds, what, stream) / each;
  }
  if (name == "cluster_barrier" || name == "cluster_barrier_stores") {
    between(2, 16);
    const auto kernel = name == "cluster_barrier" ? cluster_barriers<false> : cluster_barriers<true>;
    return in_clusters(kernel, size, threads, rounds, what, stream) / each;
  }
  throw std::runtime_error("rnnkit: there is no probe " + name + "; benchmarks/gpu_check/probes.py has their names");
}

}  // namespace rnnkit::cuda
