// How many threads the machine lets this process keep busy: the calling thread's affinity mask, the CPU quota
// of the process's cgroups, and what RNNKIT_CPU_THREADS puts in their place. Torch counts processors alone,
// so in a container its threads take turns on fewer. Plain C++; other systems than Linux have no such limits.

#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace rnnkit {

constexpr int64_t no_limit = std::numeric_limits<int64_t>::max();

struct CpuLimits {
  int64_t affinity;  // CPUs in the mask of the calling thread
  int64_t quota;     // CPUs that the cgroups grant, at most ten seconds ago
  int64_t asked;     // RNNKIT_CPU_THREADS, read once; it takes the place of the other two

  // Threads that can run at once, or no_limit.
  int64_t threads() const;
};

// Throws std::runtime_error where RNNKIT_CPU_THREADS is no positive number.
CpuLimits cpu_limits();

// cpu_limits().threads(), at most 0.1 ms old, or asked `anew`.
int64_t usable_threads(bool anew = false);

// Whether OpenMP was told to bind its threads. Then the mask of the calling thread is its own place and no
// limit of the process; OpenMP counts the places itself. A thread that this one starts would share its place.
bool openmp_binds();

// The smallest quota of the cgroup of this process and of those above it, rounded up to whole CPUs, or
// no_limit; cgroup v2 and v1. What cannot be read or understood is no limit. `root` is put before every path:
// tests give a folder.
int64_t quota_cpus(const std::string& root = "");

}  // namespace rnnkit
