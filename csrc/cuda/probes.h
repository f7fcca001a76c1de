// What a GPU takes for the things that kernels are made of, measured by small kernels: see probes.cu.

#pragma once

#include <cstdint>

#include "scan.h"

namespace rnnkit::cuda {

// One reading, on the current device. benchmarks/gpu_check/probes.py says what each is called, what `size`
// means and in which unit it comes. Waits for the device. Throws std::runtime_error where there is no such
// probe, where the GPU cannot run it, and where what it waits for does not come.
double probe(const char* what, int64_t size, Stream stream);

}  // namespace rnnkit::cuda
