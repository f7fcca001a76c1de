// What happens where memory runs out inside one slice of a scan while the others wait for it: the error must
// reach the caller, and nobody may wait for ever.

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "checks.h"

namespace {

thread_local int64_t left = -1;  // allocations of this thread until one fails; negative: none does

void* allocate(std::size_t size) {
  if (left == 0) {
    left = -1;
    throw std::bad_alloc();
  }
  if (left > 0) --left;
  if (void* p = std::malloc(size != 0 ? size : 1)) return p;
  throw std::bad_alloc();
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace harness {
namespace {

std::atomic<int64_t> failed{0};

// As `apart`, but in the second slice the (`which` + 1)-th allocation fails.
template <int which>
void failing(int64_t slices, void* context, Body body) {
  std::vector<std::thread> threads;
  for (int64_t p = 1; p < slices; ++p) {
    threads.emplace_back([=] {
      left = p == 1 ? which : -1;
      body(context, p, p + 1);
      if (p == 1 && left < 0) ++failed;
      left = -1;
    });
  }
  body(context, 0, 1);
  for (std::thread& t : threads) t.join();
}

}  // namespace

int64_t check_failing(const rnnkit::Engine& engine, const Problem& p) {
  const Ran ran = run_forward(engine, p, How{});
  int64_t caught = 0;
  failed = 0;
  for (const rnnkit::Parallel parallel : {&failing<0>, &failing<1>}) {
    const Way way{"failing", {3, parallel}};
    const auto expects = [&](auto run) {
      const int64_t before = failed;
      bool thrown = false;
      try {
        run();
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      if (thrown != (failed > before))
        throw std::runtime_error("memory ran out in a slice, and nobody was told");
      caught += thrown;
    };
    How how;
    how.way = way;
    expects([&] { run_forward(engine, p, how); });
    expects([&] { run_backward(engine, p, ran.saved, way); });
  }
  return caught;
}

}  // namespace harness
