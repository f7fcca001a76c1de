// Fibers of fiber.h. Not compiled with a sanitizer itself; the sanitizers' functions are called by hand.

#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(SIMT_UCONTEXT)
// Keeps what a called function must keep on the stack that is left, and takes it from the other.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
  .text
  .hidden simt_switch
  .globl simt_switch
  .type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size simt_switch, . - simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t stack_bytes = watched ? 256 << 10 : 64 << 10;

}  // namespace

void adopt(Fiber& fiber) {
#if defined(SIMT_ASAN)
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &fiber.size);
  pthread_attr_destroy(&attributes);
  fiber.bottom = static_cast<char*>(bottom);
#elif defined(SIMT_TSAN)
  fiber.sanitizer = __tsan_get_current_fiber();
#else
  (void)fiber;
#endif
}

Fiber* make_fiber(void (*entry)()) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  Fiber* fiber = new Fiber;
  fiber->bottom = static_cast<char*>(memory) + page;
  fiber->size = stack_bytes;
  reset(*fiber, entry);
  return fiber;
}

void reset(Fiber& fiber, void (*entry)()) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(fiber.bottom, fiber.size);
#elif defined(SIMT_TSAN)
  if (fiber.sanitizer != nullptr) __tsan_destroy_fiber(fiber.sanitizer);
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
#if defined(SIMT_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_link = nullptr;
  fiber.context.uc_stack.ss_sp = fiber.bottom;
  fiber.context.uc_stack.ss_size = fiber.size;
  makecontext(&fiber.context, entry, 0);
#else
  // What simt_switch takes: six registers and the address to return to. `entry` finds the stack as a call
  // leaves it, 8 bytes off a multiple of 16, and null where its caller would stand.
  void** end = reinterpret_cast<void**>(fiber.bottom + fiber.size);
  for (int k = 1; k <= 8; ++k) end[-k] = nullptr;
  end[-2] = reinterpret_cast<void*>(entry);
  fiber.sp = end - 8;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.bottom, to.size);
#elif defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  simt_switch(&from.sp, to.sp);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void arrived() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void name(Fiber& fiber, const std::string& words) {
#if defined(SIMT_TSAN)
  __tsan_set_fiber_name(fiber.sanitizer, words.c_str());
#else
  (void)fiber, (void)words;
#endif
}

void publish(void* tag) {
#if defined(SIMT_TSAN)
  __tsan_release(tag);
#else
  (void)tag;
#endif
}

void see(void* tag) {
#if defined(SIMT_TSAN)
  __tsan_acquire(tag);
#else
  (void)tag;
#endif
}

}  // namespace simt
