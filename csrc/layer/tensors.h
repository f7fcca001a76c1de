// What the files of this folder share of torch: checks of tensors with messages, and pointers into them.
// Torch's stable ABI alone. Python checks what a user passes; the checks here keep a wrong call from reading
// beyond a tensor's end, and an error from here can only be a RuntimeError.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/scan.h"

namespace rnnkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What was given does not fit: not a fault of ours, and nothing was done yet.
struct Unfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream message;
  message << "rnnkit: ";
  (message << ... << words);
  throw Unfit(message.str());
}

// A tensor whose zeros torch makes when someone asks the dispatcher for them.
struct NoMemory : Unfit {
  NoMemory() : Unfit("rnnkit: a tensor has no memory of its own") {}
};

// STD_TORCH_CHECK would put the function and the path of the build before the message.
#define RNNKIT_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) {              \
      ::rnnkit::fail(__VA_ARGS__);   \
    }                                \
  } while (0)

template <class Sizes>
std::string shown(const Sizes& sizes) {
  std::ostringstream out;
  const char* separator = "";
  out << "[";
  for (int64_t size : sizes) {
    out << separator << size;
    separator = ", ";
  }
  out << "]";
  return out.str();
}

inline void check_dense(const Tensor& tensor, const char* name) {
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  RNNKIT_CHECK(layout == aoti_torch_layout_strided(), name, " must be a dense tensor");
}

// What a tensor is, wherever it lies.
inline void check_kind(const Tensor& tensor, const char* name, ScalarType type,
                       std::initializer_list<int64_t> sizes) {
  check_dense(tensor, name);
  const auto got = tensor.sizes();
  RNNKIT_CHECK(tensor.scalar_type() == type && std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()),
               name, " must be ", toString(type), " ", shown(sizes), ", got ", toString(tensor.scalar_type()),
               " ", shown(got));
}

inline void check(const Tensor& tensor, const char* name, ScalarType type,
                  std::initializer_list<int64_t> sizes) {
  check_kind(tensor, name, type, sizes);
  RNNKIT_CHECK(tensor.is_cpu(), name, " must be on the CPU, got device index ", tensor.get_device_index());
  if (tensor.numel() != 0 && tensor.const_data_ptr() == nullptr) throw NoMemory();
}

// Checks what `tensor` is, and brings it into contiguous memory.
inline void expect(Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  check(tensor, name, type, sizes);
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
}

inline void expect(OptionalTensor& tensor, const char* name, ScalarType type,
                   std::initializer_list<int64_t> sizes) {
  if (tensor.has_value()) expect(*tensor, name, type, sizes);
}

// By how many numbers the rows of v [T, B, N] lie apart, or nothing where they do not lie in equal distances
// with their own numbers side by side.
inline std::optional<int64_t> row_stride(const Tensor& v) {
  const int64_t T = v.size(0), B = v.size(1);
  if (v.numel() == 0) return v.size(2);  // any will do
  if (v.size(2) > 1 && v.stride(2) != 1) return std::nullopt;
  if (B == 1) return v.stride(0);
  if (T > 1 && v.stride(0) != B * v.stride(1)) return std::nullopt;
  return v.stride(1);
}

inline const void* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail("x must be Float, Double, BFloat16 or Half, got ", toString(tensor.scalar_type()));
  }
}

inline bool is_half(Dtype dtype) { return dtype == Dtype::bf16 || dtype == Dtype::f16; }

// The type that a dtype is computed in, and the size of one number of it.
inline ScalarType opmath_type(Dtype dtype) {
  return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}
inline int64_t opmath_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// As many as torch has threads, but no more than run at once (cpu_limit.h), and one in a process that was
// forked after this library was loaded.
Workers workers();

// Whether torch's own GEMMs take no more threads than workers(). In a forked process they would wait for
// threads that are not there, and with more threads than CPUs OpenMP's threads spin in one another's way.
bool torch_fits_the_cpus();

// Contiguous memory on the CPU. `zeros` fills it.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type);
Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType type);

// A view of the same memory; `offset` counts elements from the first of `of`.
Tensor view(const Tensor& of, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
            int64_t offset);
Tensor view(const Tensor& of, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset);

}  // namespace rnnkit
