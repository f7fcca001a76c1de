// Memory, views and threads for the files of this folder, by torch's stable ABI.

#include "tensors.h"

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstdlib>
#include <cstring>

#include "../cpu/worker_pool.h"
#include "cpu_limit.h"

namespace rnnkit {
namespace {

bool forked = false;
// OpenMP's threads, and torch's, stay with the parent.
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int32_t number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

void run_on_torchs_threads(int64_t slices, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) { body(context, first, last); });
}

// Asks for huge pages, as many as lie wholly in the memory: what is asked for is written from end to end, so
// none is used in vain. C libraries give memory of this size back at once, and 4 KiB at a time its pages were
// a twentieth of the training step of an LSTM whose gates take 64 MiB. Where the kernel says no, nothing
// changes.
void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t returned_at_once = int64_t{32} << 20;
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (bytes < returned_at_once) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(memory), first = (from + page - 1) / page * page;
  const uintptr_t end = (from + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

bool torch_fits_the_cpus() { return !forked && workers().threads == torch::stable::get_num_threads(); }

// By torch's C interface: torch::stable::new_empty goes by the dispatcher, at three times the price.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[d]))
    strides[d] = stride;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), number_of(type),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  const Tensor memory(made);
  // Torch fills new memory with NaN only where its operators make it, so tests ask for the same here.
  static const bool fill = std::getenv("RNNKIT_FILL_NEW_MEMORY") != nullptr;
  const auto bytes = memory.numel() * static_cast<int64_t>(memory.element_size());
  ask_for_huge_pages(memory.mutable_data_ptr(), bytes);
  if (fill && bytes > 0) std::memset(memory.mutable_data_ptr(), 0xff, bytes);
  return memory;
}

Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType type) {
  const Tensor made = empty(sizes, type);
  const auto bytes = made.numel() * static_cast<int64_t>(made.element_size());
  if (bytes > 0) std::memset(made.mutable_data_ptr(), 0, bytes);
  return made;
}

Tensor view(const Tensor& of, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
            int64_t offset) {
  return view(of, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset);
}

Tensor view(const Tensor& of, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(of.get(), dims, sizes, strides, offset, &made));
  return Tensor(made);
}

Workers workers() {
  RNNKIT_CHECK(watching_forks == 0, "pthread_atfork failed with error ", watching_forks);
  static const CpuLimits at_first = cpu_limits();  // refuses a wrong RNNKIT_CPU_THREADS, also with one thread
  static_cast<void>(at_first);
  const int64_t torchs = forked ? 1 : torch::stable::get_num_threads();
  const int64_t threads = torchs == 1 ? 1 : std::min(torchs, usable_threads());
  return {threads, threads == torchs || openmp_binds() ? &run_on_torchs_threads : &run_in_pool};
}

}  // namespace rnnkit
