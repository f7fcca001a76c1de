// Runs the source of a CUDA kernel on a CPU: what the wrappers of arch_cpu.h ask of the scheduler (simt.cpp).
// Each CUDA thread is a fiber, all of them in one thread of the CPU; a fiber gives way where it must wait,
// and which one goes on then is drawn from a seed, so an order in which a kernel fails can be repeated.
//
// What a launch says when it fails: threads that wait for ever; a barrier or a collective that not all of a
// block, a warp, reach at the same line; stores beyond shared memory. Shared memory starts as NaN. Flavours
// of the library say more: AddressSanitizer any access beyond shared memory, ThreadSanitizer any two accesses
// to the same place, one of them a store, that no barrier orders, whatever the order was that they came in.
//
// Not modelled: bank conflicts, latency, registers, approximate functions, and stores that another thread
// sees late. A fiber gives way only in a wrapper.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Shared by all kernels of a process, in libsimt.so.
namespace simt __attribute__((visibility("default"))) {

  // The order of a launch. `seed % 4` is how one of the threads that can go on is drawn: 0 uniformly; 1 the
  // one that could last, so one warp runs ahead; 2 by warps' priorities, 3 by blocks', drawn anew now and
  // then. A fair order keeps all warps in near lock step, and hides races. `ordered`: no draw at all, the
  // first that can.
  struct Schedule {
    uint64_t seed = 0;
    bool ordered = false;
    mutable uint64_t launches = 0;  // so far; each has an order of its own
  };

  // A line of a kernel's source: as a default argument, the caller's.
  struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
      return {file, line};
    }
  };

  struct Block {
    int64_t x, y;
    unsigned char* shared;
  };

  struct Thread {
    int index;
    const Block* block;
  };

  // The thread that runs.
  extern Thread* current;

  struct Launch {
    const char* kernel;
    int64_t x, y;  // blocks
    int threads;   // of each
    int64_t shared;
    const Schedule* schedule;  // null: the one of seed 0
    void (*body)(const void* call);
    const void* call;
  };

  // Throws std::runtime_error where the machine would refuse the launch, and where threads wait for ever.
  // Blocks run a few at once, in an order of the seed; the call returns when all of them have ended.
  void run(const Launch& launch);

  // All threads of the block.
  void barrier(Place place);

  // All 32 lanes of the warp: the last to come runs `act` on what each of them brought, in the order of
  // lanes. Orders no memory, as on a GPU.
  void collective(const char* what, Place place, void* mine, void (*act)(void* const* lanes));

  // Memory of exactly that many bytes, aligned to 256, all bits set: NaN in every format. Where no sanitizer
  // watches it, both ends are guarded against stores.
  class Poisoned {
   public:
    explicit Poisoned(int64_t bytes);
    ~Poisoned();
    Poisoned(const Poisoned&) = delete;
    Poisoned& operator=(const Poisoned&) = delete;
    unsigned char* data() const { return data_; }
    bool intact() const;

   private:
    int64_t bytes_;
    unsigned char *memory_, *data_;
  };

}  // namespace simt
