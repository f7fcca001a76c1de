// What GEMMs and scans share: aligned memory, how the work is divided among threads, where they wait for one
// another, which rows a step has. Included once per variant, inside its namespace.

template <class T>
struct AlignedBuffer {
  explicit AlignedBuffer(int64_t size = 0) : memory(size > 0 ? new T[size + 64 / sizeof(T)] : nullptr) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  std::unique_ptr<T[]> memory;
  T* data;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int max_vectors = 4;  // outputs of a panel of weights, in vectors

// What one thread computes: some rows and all units, or all rows and some units (vectors of them).
struct ThreadSlice {
  int64_t row0, row1;
  bool by_units;  // slices share the units, and wait for one another between the phases of a step
  int64_t index, count;

  // This slice of `units` (of `lanes` a vector), in panels of four vectors.
  void vectors(int64_t units, int width, int* first, int* last) const {
    const int64_t all = ceil_div(units, width);
    if (!by_units) {
      *first = 0, *last = static_cast<int>(all);
      return;
    }
    const int64_t panels = ceil_div(all, max_vectors);
    *first = static_cast<int>(std::min(all, panels * index / count * max_vectors));
    *last = static_cast<int>(std::min(all, panels * (index + 1) / count * max_vectors));
  }
};

// Threads that run the same steps wait here for one another.
class SpinBarrier {
 public:
  explicit SpinBarrier(int64_t slices) : slices_(slices) {}

  // `mine`: how many slices the calling thread stands for. Throws where another slice has failed.
  void wait(int64_t mine) {
    if (mine >= slices_) return;  // slices of rows never wait, however many one call is given
    const uint32_t phase = phase_.value();
    if (failed_.load(std::memory_order_acquire)) throw OtherThreadFailed{};  // its phase ends no more
    if (arrived_.fetch_add(mine, std::memory_order_acq_rel) + mine == slices_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.set(phase + 1);
      return;
    }
    phase_.wait_while(phase);
    if (failed_.load(std::memory_order_acquire)) throw OtherThreadFailed{};
  }

  // Keeps the first exception of a slice; those that wait for it are let go. It never arrives again, so that
  // nobody else ends a phase meanwhile.
  void fail() {
    if (failing_.exchange(true)) return;
    error_ = std::current_exception();
    failed_.store(true, std::memory_order_release);
    phase_.set(phase_.value() + 1);
  }
  void rethrow() const {
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
  }

 private:
  struct OtherThreadFailed {};

  const int64_t slices_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  WaitWord phase_;
  std::atomic<bool> failing_{false}, failed_{false};
  std::exception_ptr error_;
};

// How the work is divided among threads. They take rows, which are independent, where each slice still gets
// full tiles; else units, and wait for one another once or twice a step. `weights` counts the elements read
// in a step.
struct Partition {
  int64_t slices = 1;
  bool by_units = false;

  explicit Partition(int64_t most) : slices(std::max<int64_t>(1, most)) {}

  Partition(int64_t threads, int64_t rows, int64_t unit_panels, int64_t weights, int64_t steps) {
    constexpr int64_t worth_a_thread = 1 << 16;   // multiply-adds: some microseconds
    constexpr int64_t worth_a_barrier = 1 << 15;  // the same, in one step
    if (threads < 2 || rows * weights * steps < 2 * worth_a_thread) return;
    if (rows >= 4 * threads || (rows >= 2 && rows * weights < 2 * worth_a_barrier)) {
      slices = std::min(threads, rows);
    } else if (unit_panels >= 2 && rows * weights >= 2 * worth_a_barrier) {
      slices = std::min(threads, unit_panels);
      by_units = true;
    }
  }

  ThreadSlice slice(int64_t index, int64_t rows) const {
    if (by_units) return {0, rows, true, index, slices};
    return {rows * index / slices, rows * (index + 1) / slices, false, index, slices};
  }
};

// Runs work(first, last, barrier) for all slices, some a call, concurrently where it can. What one of them
// throws is thrown here.
template <class Work>
void run_slices(const Partition& partition, Parallel parallel, Work work) {
  if (partition.slices == 1) {
    SpinBarrier alone(1);
    work(0, 1, alone);
    return;
  }
  struct Context {
    Work& work;
    SpinBarrier barrier;
  } context{work, SpinBarrier(partition.by_units ? partition.slices : 1)};
  parallel(partition.slices, &context, [](void* p, int64_t first, int64_t last) {
    auto* c = static_cast<Context*>(p);
    try {
      c->work(first, last, c->barrier);
    } catch (...) {
      c->barrier.fail();
    }
  });
  context.barrier.rethrow();
}

// A matrix [rows, width] padded to whole vectors, zero at first.
template <class A>
struct PaddedMatrix {
  PaddedMatrix() = default;
  PaddedMatrix(int64_t rows, int64_t width)
      : stride(ceil_div(width, lanes<A>) * lanes<A>), memory(rows * stride) {
    std::fill_n(memory.data, rows * stride, A{});
  }
  A* row(int64_t b) const { return memory.data + b * stride; }

  void fill(const void* from, int64_t rows, int64_t width) {
    for (int64_t b = 0; b < rows; ++b) std::copy_n(static_cast<const A*>(from) + b * width, width, row(b));
  }
  void copy_to(void* to, int64_t rows, int64_t width) const {
    for (int64_t b = 0; b < rows; ++b) std::copy_n(row(b), width, static_cast<A*>(to) + b * width);
  }

  int64_t stride = 0;
  AlignedBuffer<A> memory;
};

// The rows of a slice at a step.
struct ActiveRows {
  std::vector<int32_t> valid;  // those that have the step
  std::vector<int32_t> reset;  // of those, the rows whose state is replaced before it

  void find(const LengthsAndResets& masks, bool reverse, const ThreadSlice& slice, int64_t t) {
    valid.clear();
    reset.clear();
    for (int64_t b = slice.row0; b < slice.row1; ++b) {
      if (!masks.valid(t, b)) continue;
      valid.push_back(static_cast<int32_t>(b));
      if (masks.reset != nullptr && masks.resets_before(t, b, reverse))
        reset.push_back(static_cast<int32_t>(b));
    }
  }
};
