// Fibers: stacks that a thread of the CPU goes back and forth between, and what a sanitizer must be told of
// it. On x86-64 a switch is a few instructions; elsewhere, or with SIMT_UCONTEXT, it is swapcontext, several
// times slower.

#pragma once

#include <cstddef>
#include <string>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  char* bottom = nullptr;  // of the stack
  size_t size = 0;
  Fiber* next = nullptr;      // in a list of whoever owns it
  void* sanitizer = nullptr;  // AddressSanitizer's fake stack while it waits; ThreadSanitizer's fiber
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* sp = nullptr;
#endif
};

// The stack that the caller is on.
void adopt(Fiber& fiber);
// A new one, below it a page that may not be touched. It runs `entry`, which does not return, from its first
// switch on.
Fiber* make_fiber(void (*entry)());
// Forgets where it was: it runs `entry` at the next switch.
void reset(Fiber& fiber, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that `entry` calls.
void arrived();

// What ThreadSanitizer takes for an order of memory: all that came before a `publish` of a tag, before all
// that comes after a `see` of it.
void publish(void* tag);
void see(void* tag);
// In its reports.
void name(Fiber& fiber, const std::string& words);

#if defined(SIMT_TSAN)
constexpr bool watches_order = true;
#else
constexpr bool watches_order = false;
#endif
#if defined(SIMT_TSAN) || defined(SIMT_ASAN)
constexpr bool watched = true;
#else
constexpr bool watched = false;
#endif

}  // namespace simt
