// The engine of csrc/cpu held against plain loops on random problems, without torch. Exit status 1 and the
// problem at the first mismatch; 2 where a problem hangs, since threads that wait for one another may.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "checks.h"

namespace harness {
namespace {

constexpr const char* usage =
    "usage: harness [--problems N] [--seed S] [--only SEED] [--isa NAME] [--threads] [--exhaustive]\n"
    "  --only SEED   one problem, by the seed that a failure names (with --threads as it was)\n"
    "  --isa NAME    one variant\n"
    "  --threads     only problems whose scans are split among threads\n"
    "  --exhaustive  sigmoid and tanh of every float32, nothing else\n";

struct Options {
  int64_t problems = 300;
  uint64_t seed = 1;
  bool one = false, threads = false, exhaustive = false;
  std::string isa;
};

Options parse(int count, char** words) {
  Options o;
  const auto wrong = [](const std::string& what) { throw std::invalid_argument(what); };
  for (int k = 1; k < count; ++k) {
    const std::string word = words[k];
    const auto next = [&]() -> std::string {
      if (++k == count) wrong(word + " needs a value");
      return words[k];
    };
    if (word == "--problems") {
      o.problems = std::stoll(next());
    } else if (word == "--seed") {
      o.seed = std::stoull(next());
    } else if (word == "--only") {
      o.seed = std::stoull(next()), o.one = true;
    } else if (word == "--isa") {
      o.isa = next();
    } else if (word == "--threads") {
      o.threads = true;
    } else if (word == "--exhaustive") {
      o.exhaustive = true;
    } else {
      wrong("unknown option " + word);
    }
  }
  return o;
}

char current[400];  // the problem in hand, for the watchdog

void hangs(int) {
  const char text[] = "FAILED: no end after 300 seconds: ";
  if (write(1, text, sizeof text - 1) < 0 || write(1, current, std::strlen(current)) < 0 ||
      write(1, "\n", 1) < 0) {
    _exit(3);
  }
  _exit(2);
}

// Which kind of problem a seed makes: every ninth is split among threads, by units or by rows.
Size size_of(uint64_t seed, bool threads) {
  if (threads) return seed % 2 ? Size::units : Size::rows;
  return seed % 9 == 0 ? Size::units : seed % 9 == 4 ? Size::rows : Size::small;
}

int run(const Options& o) {
  std::vector<const rnnkit::Engine*> engines;
  for (const rnnkit::Engine* e : rnnkit::engines()) {
    if (o.isa.empty() || o.isa == e->name) engines.push_back(e);
  }
  if (engines.empty()) throw std::invalid_argument("this processor has no variant " + o.isa);
  if (o.exhaustive) return check_functions() ? 0 : 1;
  std::signal(SIGALRM, &hangs);
  const uint64_t first = o.one ? o.seed : o.seed * 1000000;
  const uint64_t last = first + (o.one ? 1 : static_cast<uint64_t>(o.problems));
  int64_t split[3] = {}, failures = 0;
  for (uint64_t seed = first; seed < last; ++seed) {
    const Size size = size_of(seed, o.threads);
    const Problem p = random_problem(seed, size);
    std::snprintf(current, sizeof current, "%s", describe(p).c_str());
    alarm(300);
    const char* engine = "plain";
    try {
      if (!p.nan && size == Size::small) check_plain(p);
      const int64_t before = parallel_calls();
      for (const rnnkit::Engine* e : engines) {
        engine = e->name;
        check_scan(*e, p, size != Size::small);
        check_product(*e, seed);
        if (size == Size::units) failures += check_failing(*e, p);
      }
      split[static_cast<int>(size)] += parallel_calls() - before;
    } catch (const std::runtime_error& error) {
      std::printf("FAILED: %s: %s: %s\n", engine, current, error.what());
      return 1;
    }
    if ((seed - first + 1) % 100 == 0) {
      std::printf("%llu problems\n", static_cast<unsigned long long>(seed - first + 1));
      std::fflush(stdout);
    }
  }
  std::string names;
  for (const rnnkit::Engine* e : engines) names += std::string(" ") + e->name;
  std::printf(
      "%llu problems, variants%s: all agree; calls of Parallel: %lld, by size small, rows, units: %lld %lld "
      "%lld\n",
      static_cast<unsigned long long>(last - first), names.c_str(), static_cast<long long>(parallel_calls()),
      static_cast<long long>(split[0]), static_cast<long long>(split[1]), static_cast<long long>(split[2]));
  if (!o.one && o.problems >= 18 && (split[1] == 0 || split[2] == 0 || failures == 0)) {
    std::printf(
        "FAILED: no scan was split; the sizes in problem.cpp no longer fit Partition in "
        "csrc/cpu/partition.h\n");
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace harness

int main(int count, char** words) {
  try {
    return harness::run(harness::parse(count, words));
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n%s", error.what(), harness::usage);
    return 2;
  }
}
