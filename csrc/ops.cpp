// The operators of the extension: schemas, checks, dispatch, threads. The only file that knows torch, and of
// torch only the stable ABI. Python checks what a user passes; the checks here keep a wrong call from reading
// beyond a tensor's end, and an error from here can only be a RuntimeError.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/rnn_scan.h"

namespace rnnkit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// STD_TORCH_CHECK would put the function and the path of the build before the message.
#define RNNKIT_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) {              \
      fail(__VA_ARGS__);             \
    }                                \
  } while (0)

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "rnnkit: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

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

// `tensor` in contiguous memory, after checking what it is.
Tensor expect(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  const auto got = tensor.sizes();
  RNNKIT_CHECK(tensor.scalar_type() == type && std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()),
               name, " must be ", toString(type), " ", shown(sizes), ", got ", toString(tensor.scalar_type()),
               " ", shown(got));
  RNNKIT_CHECK(tensor.is_cpu(), name, " must be on the CPU, got device index ", tensor.get_device_index());
  return torch::stable::contiguous(tensor);
}

OptionalTensor expect(const OptionalTensor& tensor, const char* name, ScalarType type,
                      std::initializer_list<int64_t> sizes) {
  return tensor.has_value() ? OptionalTensor(expect(*tensor, name, type, sizes)) : std::nullopt;
}

// A float [n, B, H] tensor's sizes.
std::tuple<int64_t, int64_t, int64_t> steps_rows_width(const Tensor& tensor, const char* name) {
  RNNKIT_CHECK(tensor.dim() == 3, name, " must be [n, B, H], got ", shown(tensor.sizes()));
  return {tensor.size(0), tensor.size(1), tensor.size(2)};
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// Rows that one thread takes at least, so that starting it pays.
int64_t rows_per_thread(int64_t steps, int64_t H) {
  constexpr int64_t multiply_adds = 1 << 15;
  return std::max<int64_t>(1, multiply_adds / std::max<int64_t>(1, steps * H * H));
}

std::tuple<Tensor, Tensor> rnn_scan_forward_cpu(Tensor gx, Tensor w_hh, Tensor h, OptionalTensor lengths,
                                                OptionalTensor reset, OptionalTensor h_r, int64_t t0,
                                                bool relu, bool reverse) {
  const auto [n, B, H] = steps_rows_width(gx, "gx");
  gx = expect(gx, "gx", ScalarType::Float, {n, B, H});
  w_hh = expect(w_hh, "w_hh", ScalarType::Float, {H, H});
  h = expect(h, "h", ScalarType::Float, {B, H});
  lengths = expect(lengths, "lengths", ScalarType::Long, {B});
  h_r = expect(h_r, "h_r", ScalarType::Float, {B, H});
  RNNKIT_CHECK(t0 >= 0, "t0 must not be negative, got ", t0);
  int64_t T = 0;
  if (reset.has_value()) {
    T = reset->dim() == 2 ? reset->size(0) : 0;
    RNNKIT_CHECK(reset->dim() == 2 && T >= t0 + n, "reset must be [T, B] with T at least t0 + n = ", t0 + n,
                 ", got ", shown(reset->sizes()));
    reset = expect(reset, "reset", ScalarType::Bool, {T, B});
  }

  Tensor y = torch::stable::new_empty(gx, {n, B, H});
  Tensor h_n = torch::stable::new_empty(gx, {B, H});
  std::vector<float> w_hh_t(H * H);
  transpose(w_hh.const_data_ptr<float>(), w_hh_t.data(), H);
  RnnForward s{};
  s.n = n, s.B = B, s.H = H, s.t0 = t0;
  s.relu = relu, s.reverse = reverse;
  s.cuts = {pointer<int64_t>(lengths), pointer<bool>(reset), T};
  s.gx = gx.const_data_ptr<float>();
  s.w_hh_t = w_hh_t.data();
  s.h = h.const_data_ptr<float>();
  s.h_r = pointer<float>(h_r);
  s.y = y.mutable_data_ptr<float>();
  s.h_n = h_n.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, B, rows_per_thread(n, H),
                              [&](int64_t first, int64_t last) { rnn_scan_forward(s, first, last); });
  return {y, h_n};
}

std::tuple<Tensor, Tensor, Tensor> rnn_scan_backward_cpu(Tensor gy, Tensor gh_n, Tensor y, Tensor w_hh,
                                                         OptionalTensor lengths, OptionalTensor reset,
                                                         bool relu, bool reverse) {
  const auto [T, B, H] = steps_rows_width(gy, "gy");
  gy = expect(gy, "gy", ScalarType::Float, {T, B, H});
  gh_n = expect(gh_n, "gh_n", ScalarType::Float, {B, H});
  y = expect(y, "y", ScalarType::Float, {T, B, H});
  w_hh = expect(w_hh, "w_hh", ScalarType::Float, {H, H});
  lengths = expect(lengths, "lengths", ScalarType::Long, {B});
  reset = expect(reset, "reset", ScalarType::Bool, {T, B});

  Tensor dg = torch::stable::new_empty(y, {T, B, H});
  Tensor dh_0 = torch::stable::new_empty(y, {B, H});
  Tensor dh_r = torch::stable::new_empty(y, {B, H});
  RnnBackward s{};
  s.T = T, s.B = B, s.H = H;
  s.relu = relu, s.reverse = reverse;
  s.cuts = {pointer<int64_t>(lengths), pointer<bool>(reset), T};
  s.gy = gy.const_data_ptr<float>();
  s.gh_n = gh_n.const_data_ptr<float>();
  s.y = y.const_data_ptr<float>();
  s.w_hh = w_hh.const_data_ptr<float>();
  s.dg = dg.mutable_data_ptr<float>();
  s.dh_0 = dh_0.mutable_data_ptr<float>();
  s.dh_r = dh_r.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, B, rows_per_thread(T, H),
                              [&](int64_t first, int64_t last) { rnn_scan_backward(s, first, last); });
  return {dg, dh_0, dh_r};
}

}  // namespace
}  // namespace rnnkit

// A fragment: Python defines operators in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(rnnkit, m) {
  m.def(
      "rnn_scan_forward(Tensor gx, Tensor w_hh, Tensor h, Tensor? lengths, Tensor? reset, Tensor? h_r, int "
      "t0, "
      "bool relu, bool reverse) -> (Tensor y, Tensor h_n)");
  m.def(
      "rnn_scan_backward(Tensor gy, Tensor gh_n, Tensor y, Tensor w_hh, Tensor? lengths, Tensor? reset, "
      "bool relu, bool reverse) -> (Tensor dg, Tensor dh_0, Tensor dh_r)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnkit, CPU, m) {
  m.impl("rnn_scan_forward", TORCH_BOX(&rnnkit::rnn_scan_forward_cpu));
  m.impl("rnn_scan_backward", TORCH_BOX(&rnnkit::rnn_scan_backward_cpu));
}
