// The kernels of scan.h for callers in C: the names that were linked, and a scan on memory of the CPU. The
// workspace is the library's, of exactly the bytes that the kernel asks for.

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "scan.h"
#include "simt/simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using rnnkit::cuda::Backward;
using rnnkit::cuda::Forward;
using rnnkit::cuda::Kernel;

template <class Side>
void scan(const char* name, Side side, int64_t (*Kernel::*bytes)(const Side&),
          void (*Kernel::*run)(const Side&, rnnkit::cuda::Stream), const simt::Schedule& schedule) {
  const Kernel* kernel = rnnkit::cuda::find(name);
  if (kernel == nullptr) throw std::runtime_error(std::string("rnnkit: there is no kernel ") + name);
  const simt::Poisoned workspace((kernel->*bytes)(side));
  side.workspace = workspace.data();
  (kernel->*run)(side, &schedule);
  if (!workspace.intact()) {
    throw std::runtime_error(std::string("rnnkit: kernel ") + name + " stored outside its workspace");
  }
}

// 0, or 1 and the reason.
template <class F>
int told(char* reason, int64_t size, F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(reason, static_cast<size_t>(size), "%s", error.what());
    return 1;
  }
}

}  // namespace

// One name a line.
EXPORT const char* rnnkit_simt_kernels() {
  static const std::string names = [] {
    std::string s;
    for (const Kernel* k = rnnkit::cuda::kernels; k != nullptr; k = k->next) s += std::string(k->name) + "\n";
    return s;
  }();
  return names.c_str();
}

EXPORT int rnnkit_simt_forward(const char* name, const Forward* forward, const simt::Schedule* schedule,
                               char* reason, int64_t size) {
  return told(reason, size,
              [=] { scan(name, *forward, &Kernel::forward_bytes, &Kernel::forward, *schedule); });
}

EXPORT int rnnkit_simt_backward(const char* name, const Backward* backward, const simt::Schedule* schedule,
                                char* reason, int64_t size) {
  return told(reason, size,
              [=] { scan(name, *backward, &Kernel::backward_bytes, &Kernel::backward, *schedule); });
}
