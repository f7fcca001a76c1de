// What products and scans share: aligned memory, how the work is split among threads, how they meet, which
// rows live at a step. Included once per variant, inside its namespace.

template <class T>
struct Aligned {
  explicit Aligned(int64_t size = 0) : memory(new T[size + 64 / sizeof(T)]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    data = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  std::unique_ptr<T[]> memory;
  T* data;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int max_vectors = 4;  // outputs of a panel of weights, in vectors

// A piece of the work: some rows and all units, or all rows and some units (vectors of them).
struct Part {
  int64_t row0, row1;
  bool split;  // units are shared among the parts, which then meet between the phases of a step
  int64_t index, parts;

  // This part's share of `units` (of `lanes` a vector), in whole panels of four vectors.
  void vectors(int64_t units, int width, int* first, int* last) const {
    const int64_t all = ceil_div(units, width);
    if (!split) {
      *first = 0, *last = static_cast<int>(all);
      return;
    }
    const int64_t panels = ceil_div(all, max_vectors);
    *first = static_cast<int>(std::min(all, panels * index / parts * max_vectors));
    *last = static_cast<int>(std::min(all, panels * (index + 1) / parts * max_vectors));
  }
};

// Threads that run the same steps wait here for one another. Spins for a while, then lets others run: there
// may be more threads than cores.
class Meeting {
 public:
  explicit Meeting(int64_t parts) : parts_(parts) {}

  // `mine`: how many parts the calling thread stands for. Throws where another part has failed.
  void wait(int64_t mine) {
    if (mine >= parts_) return;  // parts of rows never meet, however many one call is given
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(mine, std::memory_order_acq_rel) + mine == parts_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn;) {
      if (failed_.load(std::memory_order_acquire)) throw Broken{};
      if (spins < 2000) {
        ++spins;
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  // Keeps the first exception of a part; those that wait for it are let go.
  void fail() {
    if (failing_.exchange(true)) return;
    error_ = std::current_exception();
    failed_.store(true, std::memory_order_release);
  }
  void rethrow() const {
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
  }

 private:
  struct Broken {};

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t parts_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
  std::atomic<bool> failing_{false}, failed_{false};
  std::exception_ptr error_;
};

// How a scan is cut into parts. Rows are independent, so they are split where each part still gets full
// tiles; else the units are, at the price of meeting once or twice a step. `weights` counts the elements read
// in a step.
struct Split {
  int64_t parts = 1;
  bool units = false;

  explicit Split(int64_t most) : parts(std::max<int64_t>(1, most)) {}

  Split(int64_t threads, int64_t rows, int64_t unit_panels, int64_t weights, int64_t steps) {
    constexpr int64_t worth_a_thread = 1 << 16;   // multiply-adds: some microseconds
    constexpr int64_t worth_a_meeting = 1 << 15;  // the same, in one step
    if (threads < 2 || rows * weights * steps < 2 * worth_a_thread) return;
    if (rows >= 4 * threads || (rows >= 2 && rows * weights < 2 * worth_a_meeting)) {
      parts = std::min(threads, rows);
    } else if (unit_panels >= 2 && rows * weights >= 2 * worth_a_meeting) {
      parts = std::min(threads, unit_panels);
      units = true;
    }
  }

  Part part(int64_t index, int64_t rows) const {
    if (units) return {0, rows, true, index, parts};
    return {rows * index / parts, rows * (index + 1) / parts, false, index, parts};
  }
};

// Runs work(first, last, meeting) for ranges that make up all parts, concurrently where it can. What one of
// them throws is thrown here.
template <class Work>
void run_parts(const Split& split, Parallel parallel, Work work) {
  if (split.parts == 1) {
    Meeting alone(1);
    work(0, 1, alone);
    return;
  }
  struct Context {
    Work& work;
    Meeting meeting;
  } context{work, Meeting(split.units ? split.parts : 1)};
  parallel(split.parts, &context, [](void* p, int64_t first, int64_t last) {
    auto* c = static_cast<Context*>(p);
    try {
      c->work(first, last, c->meeting);
    } catch (...) {
      c->meeting.fail();
    }
  });
  context.meeting.rethrow();
}

// A matrix [rows, width] padded to whole vectors, zero at first.
template <class A>
struct Padded {
  Padded() = default;
  Padded(int64_t rows, int64_t width) : stride(ceil_div(width, lanes<A>) * lanes<A>), memory(rows * stride) {
    std::fill_n(memory.data, rows * stride, A(0));
  }
  A* row(int64_t b) const { return memory.data + b * stride; }

  void fill(const void* from, int64_t rows, int64_t width) {
    for (int64_t b = 0; b < rows; ++b) std::copy_n(static_cast<const A*>(from) + b * width, width, row(b));
  }
  void copy_to(void* to, int64_t rows, int64_t width) const {
    for (int64_t b = 0; b < rows; ++b) std::copy_n(row(b), width, static_cast<A*>(to) + b * width);
  }

  int64_t stride = 0;
  Aligned<A> memory;
};

// The rows of a part that live at a step, and scratch of one thread.
struct Rows {
  std::vector<int32_t> live;
  std::vector<int32_t> cut;  // of those, the rows whose state is replaced before the step

  void at(const Cuts& cuts, bool reverse, const Part& part, int64_t t) {
    live.clear();
    cut.clear();
    for (int64_t b = part.row0; b < part.row1; ++b) {
      if (!cuts.live(t, b)) continue;
      live.push_back(static_cast<int32_t>(b));
      if (cuts.reset != nullptr && cuts.cut(t, b, reverse)) cut.push_back(static_cast<int32_t>(b));
    }
  }
};
