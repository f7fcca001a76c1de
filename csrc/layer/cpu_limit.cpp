// Affinity masks and cgroups, as the kernel's files and calls give them.

#include "cpu_limit.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <stdexcept>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <bitset>
#include <fstream>
#include <sstream>
#include <vector>
#endif

namespace rnnkit {
namespace {

// `text` as a whole number from 1 on, or 0.
int64_t positive(const std::string& text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size() && number > 0 ? number : 0;
}

#ifdef __linux__
int64_t affinity_cpus() {
  if (openmp_binds()) return no_limit;
  // The kernel's own call says how many bytes it wrote; the library's clears and counts all of them.
  std::array<uint64_t, 128> mask;  // 8192 CPUs, as many as Linux can be built for
  const long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask.data());
  int64_t cpus = 0;
  for (long k = 0; k < bytes / 8; ++k) cpus += static_cast<int64_t>(std::bitset<64>(mask[k]).count());
  return cpus > 0 ? cpus : no_limit;
}

// A cgroup hierarchy that may hold quotas: version 2, or the `cpu` controller of version 1.
struct Hierarchy {
  bool v2;
  std::string path;  // of this process's cgroup, from the root of the hierarchy
};

struct Mount {
  bool v2;
  std::string root;    // the cgroup that is mounted
  std::string folder;  // where
};

bool has_word(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// Lines of /proc/self/cgroup: "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1.
std::vector<Hierarchy> read_hierarchies(const std::string& file) {
  std::vector<Hierarchy> found;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (controllers.empty() || has_word(controllers, "cpu"))
      found.push_back({controllers.empty(), line.substr(second + 1)});
  }
  return found;
}

// The kernel writes a space, a tab, a newline and a backslash in a path as \ and three octal digits.
std::string unescape(const std::string& text) {
  std::string out;
  const auto octal = [&](size_t k) { return k < text.size() && text[k] >= '0' && text[k] <= '7'; };
  for (size_t k = 0; k < text.size(); ++k) {
    if (text[k] == '\\' && octal(k + 1) && octal(k + 2) && octal(k + 3)) {
      out += static_cast<char>((text[k + 1] - '0') * 64 + (text[k + 2] - '0') * 8 + (text[k + 3] - '0'));
      k += 3;
    } else {
      out += text[k];
    }
  }
  return out;
}

// Lines of /proc/self/mountinfo: "id parent device root folder options ... - type source options".
std::vector<Mount> read_mounts(const std::string& file) {
  std::vector<Mount> found;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::string id, parent, device, root, folder, type, source, options;
    std::istringstream(line.substr(0, dash)) >> id >> parent >> device >> root >> folder;
    std::istringstream(line.substr(dash + 3)) >> type >> source >> options;
    if (folder.empty() || (type != "cgroup2" && !(type == "cgroup" && has_word(options, "cpu")))) continue;
    found.push_back({type == "cgroup2", unescape(root), unescape(folder)});
  }
  return found;
}

std::string word_of(const std::string& file, int index) {
  std::ifstream in(file);
  std::string word;
  for (int k = 0; k <= index; ++k) {
    if (!(in >> word)) return {};
  }
  return word;
}

// What one cgroup grants. "max" and -1 stand for no quota.
int64_t quota_of(const std::string& folder, bool v2) {
  const int64_t quota = positive(word_of(folder + (v2 ? "/cpu.max" : "/cpu.cfs_quota_us"), 0));
  const int64_t period =
      positive(v2 ? word_of(folder + "/cpu.max", 1) : word_of(folder + "/cpu.cfs_period_us", 0));
  return quota == 0 || period == 0 ? no_limit : (quota - 1) / period + 1;
}

// The cgroup `path` below what is mounted, "" for the mounted one itself. Also "" for a cgroup elsewhere,
// which a namespace may show: then the quota of the mounted one is all that can be read.
std::string below(const std::string& root, const std::string& path) {
  const std::string prefix = root == "/" ? "" : root;
  if (path.compare(0, prefix.size(), prefix) != 0) return {};
  const std::string rest = path.substr(prefix.size());
  return rest == "/" || rest.compare(0, 1, "/") != 0 || (rest + "/").find("/../") != std::string::npos ? ""
                                                                                                       : rest;
}
#else
int64_t affinity_cpus() { return no_limit; }
#endif

using Clock = std::chrono::steady_clock;

// Reading files costs some 75 us, and a quota changes where somebody resizes a container.
int64_t recent_quota() {
  constexpr auto age = std::chrono::duration_cast<Clock::duration>(std::chrono::seconds(10)).count();
  static std::atomic<int64_t> known{quota_cpus()};
  static std::atomic<Clock::rep> due{Clock::now().time_since_epoch().count() + age};
  const Clock::rep now = Clock::now().time_since_epoch().count();
  Clock::rep expected = due.load(std::memory_order_relaxed);
  if (now >= expected && due.compare_exchange_strong(expected, now + age))
    known.store(quota_cpus(), std::memory_order_relaxed);
  return known.load(std::memory_order_relaxed);
}

int64_t asked_threads() {
  const char* asked = std::getenv("RNNKIT_CPU_THREADS");
  if (asked == nullptr || *asked == '\0') return no_limit;
  if (const int64_t number = positive(asked)) return number;
  throw std::runtime_error(std::string("RNNKIT_CPU_THREADS must be a number of threads from 1 on, got '") +
                           asked + "'; unset it to let rnnkit count the CPUs that this process may use");
}

}  // namespace

bool openmp_binds() {
  static const bool bound = [] {
    for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}) {
      const char* value = std::getenv(name);
      if (value != nullptr && *value != '\0' && std::string(value) != "false") return true;
    }
    return false;
  }();
  return bound;
}

int64_t quota_cpus(const std::string& root) {
  int64_t least = no_limit;
#ifdef __linux__
  const std::vector<Mount> mounts = read_mounts(root + "/proc/self/mountinfo");
  for (const Hierarchy& own : read_hierarchies(root + "/proc/self/cgroup")) {
    for (const Mount& mount : mounts) {
      if (mount.v2 != own.v2) continue;
      std::string path = below(mount.root, own.path);
      while (true) {
        least = std::min(least, quota_of(root + mount.folder + path, own.v2));
        if (path.empty()) break;
        path.erase(path.rfind('/'));
      }
    }
  }
#endif
  return least;
}

int64_t CpuLimits::threads() const { return asked != no_limit ? asked : std::min(affinity, quota); }

CpuLimits cpu_limits() {
  static const int64_t asked = asked_threads();
  return {affinity_cpus(), recent_quota(), asked};
}

// A mask costs 0.3 us, and a call of 20 us asks three times.
int64_t usable_threads(bool anew) {
  thread_local Clock::time_point due{};
  thread_local int64_t threads = 0;
  const Clock::time_point now = Clock::now();
  if (anew || threads == 0 || now >= due) {
    threads = cpu_limits().threads();
    due = now + std::chrono::microseconds(100);
  }
  return threads;
}

}  // namespace rnnkit
