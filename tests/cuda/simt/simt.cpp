// The scheduler of simt.h: which thread goes on, and what it means when none can. Not compiled with a
// sanitizer, which is to see the kernels' memory and not this one.

#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"

namespace simt {

Thread* current = nullptr;

namespace {

constexpr int64_t most_shared = 227 * 1024;  // of the largest chip in rnnkit/backends/cuda/configs.py
constexpr int most_threads = 1024;
// Threads of a launch at a time, unless one block has more; and fibers, of which ThreadSanitizer makes slow
// and large ones.
constexpr int at_once = watches_order ? 1024 : 2048;
constexpr size_t watched_fibers = 2048;
constexpr int epoch = 1024;  // draws between two sets of priorities

struct Resident;

struct Warp {
  Resident* block;
  int first, lanes;
  uint32_t ready, waiting;  // a bit for each lane
  const char* what;         // they wait in, and where
  Place place;
  void* brought[32];
  uint64_t priority;
  int position;  // among the warps that are ready
};

struct Task : Thread {
  Warp* warp;
  Fiber* fiber;
};

// A block that has begun.
struct Resident : Block {
  std::vector<Task> tasks;
  std::vector<Warp> warps;
  std::unique_ptr<Poisoned> memory;
  int arrived, left;
  Place place;       // of the barrier where `arrived` wait
  int64_t barriers;  // that it has passed
  // Of one barrier, and the next: nobody is at the one after while some still leave the first. Each block has
  // its own, or it would seem to come after the one that was here before.
  std::unique_ptr<char[]> tags;
};

struct Machine {
  std::mutex one;  // launch at a time
  const Launch* launch;
  Schedule schedule;
  uint64_t random;
  int64_t draws;
  std::vector<std::unique_ptr<Resident>> residents;  // kept for later launches
  size_t used;                                       // of them, by this one
  std::vector<Warp*> able;
  Warp* favourite;
  bool newcomers;  // since the favourite was chosen
  Resident* ended;
  Fiber* idle = nullptr;  // a list, the end of which is `last`
  Fiber* last = nullptr;
  size_t fibers = 0, unused = 0;  // of those that idle, the first `unused` were not in this launch yet
  std::vector<std::unique_ptr<Poisoned>>
      memories;  // of ended blocks, as long as a sanitizer may ask for them
  Fiber outside, *running;
  std::string failure;
  char began, finished;  // tags
};
Machine& m = *new Machine;  // never destroyed: an unloaded library's fibers may not be

uint64_t draw() {  // splitmix64
  uint64_t z = m.random += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

Task& task() { return *static_cast<Task*>(current); }
uint32_t bit(const Task& t) { return 1u << (t.index - t.warp->first); }
int count(uint32_t lanes) { return __builtin_popcount(lanes); }

void wake(Warp& w, uint32_t lanes) {
  if (lanes == 0) return;
  if (w.ready == 0) {
    w.position = static_cast<int>(m.able.size());
    m.able.push_back(&w);
    m.newcomers = true;
  }
  w.ready |= lanes;
}

void draw_priorities() {
  for (size_t r = 0; r < m.used; ++r) {
    const uint64_t of_block = draw();
    for (Warp& w : m.residents[r]->warps) w.priority = m.schedule.seed % 4 == 3 ? of_block : draw();
  }
  m.newcomers = true;
}

// The warp of which a lane goes on next.
Warp* choose() {
  const size_t n = m.able.size();
  if (m.schedule.ordered) {
    return *std::min_element(m.able.begin(), m.able.end(),
                             [](Warp* a, Warp* b) { return a->first < b->first; });
  }
  const uint64_t r = draw();
  const uint64_t mode = m.schedule.seed % 4;
  if (++m.draws % epoch == 0 && mode >= 2) draw_priorities();
  if (mode == 0 || r % 16 == 0) return m.able[(r >> 8) % n];
  if (m.favourite != nullptr && m.favourite->ready != 0 && (mode == 1 || !m.newcomers)) return m.favourite;
  m.newcomers = false;
  m.favourite = m.able.back();
  for (size_t k = 0; mode >= 2 && k < n; ++k) {
    Warp* w = m.able[(k + r) % n];
    if (w->priority > m.favourite->priority) m.favourite = w;
  }
  return m.favourite;
}

// Takes the next thread out of those that can go on; null where none can.
Task* next() {
  if (m.able.empty()) return nullptr;
  Warp& w = *choose();
  int lane = __builtin_ctz(w.ready);
  if (!m.schedule.ordered) {
    const unsigned turn = static_cast<unsigned>(draw() % 32);
    lane = static_cast<int>(turn + __builtin_ctz(w.ready >> turn | w.ready << (32 - turn) % 32)) % 32;
  }
  w.ready &= ~(1u << lane);
  if (w.ready == 0) {
    m.able.back()->position = w.position;
    m.able[w.position] = m.able.back();
    m.able.pop_back();
  }
  return &w.block->tasks[w.first + lane];
}

void entry();

// A fiber for a thread that begins. ThreadSanitizer takes what one fiber runs for ordered, so there a launch
// uses none again as long as there are others; elsewhere the warmest stack is the best.
Fiber* take_fiber() {
  if (m.idle == nullptr || (watches_order && m.unused == 0 && m.fibers < watched_fibers)) {
    ++m.fibers;
    return make_fiber(entry);
  }
  Fiber* fiber = m.idle;
  m.idle = fiber->next;
  if (m.unused > 0) --m.unused;
  return fiber;
}

void give_back(Fiber* fiber) {
  const bool behind = watches_order && m.idle != nullptr;
  fiber->next = behind ? nullptr : m.idle;
  (behind ? m.last->next : m.idle) = fiber;
  if (fiber->next == nullptr) m.last = fiber;
}

// Goes on with another thread; with whoever called `run`, where there is none.
void go(Task* to) {
  Fiber& from = *m.running;
  if (to != nullptr && to->fiber == nullptr) to->fiber = take_fiber();
  m.running = to == nullptr ? &m.outside : to->fiber;
  current = to;
  switch_fiber(from, *m.running);
}

void pause() {
  Task* self = &task();
  Task* to = next();
  if (to != self) go(to);
}

std::string in_words(const Place& place) {
  const char* name = std::strrchr(place.file, '/');
  std::ostringstream s;
  s << (name == nullptr ? place.file : name + 1) << ':' << place.line;
  return s.str();
}

std::string in_words(const Thread& t) {
  std::ostringstream s;
  s << "thread " << t.index << " of block (" << t.block->x << ", " << t.block->y << ")";
  return s.str();
}

std::string in_words(const Launch& l) {
  std::ostringstream s;
  s << "rnnkit: kernel " << l.kernel << " on " << l.x << " x " << l.y << " blocks of " << l.threads
    << " threads with " << l.shared << " bytes of shared memory: ";
  return s.str();
}

// Ends the launch, of which the calling thread is one. Does not return.
[[noreturn]] void fail(const std::string& reason) {
  m.failure = reason;
  publish(&m.finished);
  go(nullptr);
  std::abort();
}

// The present thread begins to wait in `what`: the others of its warp wait in the same, if they wait.
void meet(Task& t, const char* what, const Place& place) {
  Warp& w = *t.warp;
  if (w.waiting == 0) {
    w.what = what;
    w.place = place;
  } else if (std::strcmp(w.what, what) != 0 || w.place.line != place.line) {
    const Task& other = w.block->tasks[w.first + __builtin_ctz(w.waiting)];
    fail("divergence in a warp: " + in_words(t) + " reached " + what + " at " + in_words(place) + " while " +
         in_words(other) + " waits in " + w.what + " at " + in_words(w.place));
  }
}

// The first function on a fiber: runs one thread after the other.
void entry() {
  arrived();
  for (;;) {
    see(&m.began);
    m.launch->body(m.launch->call);
    publish(&m.finished);
    Task& t = task();
    Resident& block = *t.warp->block;
    Fiber* mine = t.fiber;
    t.fiber = nullptr;
    if (++block.left == m.launch->threads) m.ended = &block;
    Task* to = m.ended == nullptr ? next() : nullptr;
    if (to != nullptr && to->fiber == nullptr) {
      to->fiber = mine;
      current = to;
    } else {
      give_back(mine);
      go(to);
    }
  }
}

void begin(Resident& r, int64_t number) {
  const Launch& l = *m.launch;
  r.x = number % l.x;
  r.y = number / l.x;
  r.memory = std::make_unique<Poisoned>(l.shared);
  r.shared = r.memory->data();
  r.arrived = r.left = 0;
  r.barriers = 0;
  r.tags = std::make_unique<char[]>(2);
  r.tasks.resize(static_cast<size_t>(l.threads));
  r.warps.resize(static_cast<size_t>((l.threads + 31) / 32));
  for (int k = 0; k < l.threads; ++k) {
    Task& t = r.tasks[k];
    t.index = k;
    t.block = &r;
    t.warp = &r.warps[k / 32];
    // ThreadSanitizer takes who makes a fiber for what comes before it: never another thread of the launch.
    t.fiber = watches_order ? take_fiber() : nullptr;
    if (watches_order) name(*t.fiber, in_words(t));
  }
  const uint64_t of_block = draw();
  for (size_t k = 0; k < r.warps.size(); ++k) {
    Warp& w = r.warps[k];
    w.block = &r;
    w.first = static_cast<int>(32 * k);
    w.lanes = std::min(32, l.threads - w.first);
    w.ready = w.waiting = 0;
    w.priority = m.schedule.seed % 4 == 3 ? of_block : draw();
    wake(w, ~0u >> (32 - w.lanes));
  }
  publish(&m.began);
}

std::string deadlock() {
  for (size_t k = 0; k < m.used; ++k) {
    const Resident& r = *m.residents[k];
    for (const Warp& w : r.warps) {
      if (w.waiting == 0) continue;
      std::ostringstream s;
      int waiting = 0;
      for (const Warp& other : r.warps) waiting += count(other.waiting);
      s << "deadlock: " << in_words(r.tasks[w.first + __builtin_ctz(w.waiting)]) << " waits in " << w.what
        << " at " << in_words(w.place) << "; of its block's " << m.launch->threads << " threads " << waiting
        << " wait and " << r.left << " have ended";
      return s.str();
    }
  }
  return "deadlock, and nobody waits";
}

void refuse_what_a_gpu_would(const Launch& l) {
  if (l.x < 1 || l.x > 0x7fffffff || l.y < 1 || l.y > 65535) {
    throw std::runtime_error(in_words(l) + "blocks must be 1 to 2^31 - 1 by 1 to 65,535");
  }
  if (l.threads < 1 || l.threads > most_threads) {
    throw std::runtime_error(in_words(l) + "threads must be 1 to 1,024");
  }
  if (l.shared < 0 || l.shared > most_shared) {
    throw std::runtime_error(in_words(l) + "shared memory must be 0 to 232,448 bytes");
  }
}

// Blocks in the order in which they begin.
std::vector<int64_t> order_of_blocks() {
  std::vector<int64_t> order(static_cast<size_t>(m.launch->x * m.launch->y));
  for (size_t k = 0; k < order.size(); ++k) {
    const size_t j = m.schedule.ordered ? k : draw() % (k + 1);
    order[k] = order[j];
    order[j] = static_cast<int64_t>(k);
  }
  return order;
}

void end_block(Resident& r) {
  if (!r.memory->intact()) {
    m.failure =
        "block (" + std::to_string(r.x) + ", " + std::to_string(r.y) + ") stored outside its shared memory";
  }
  if (watches_order) {
    m.memories.push_back(std::move(r.memory));
  } else {
    r.memory = nullptr;
  }
}

// What a failed launch leaves: threads in the midst of something.
void abandon() {
  m.able.clear();
  for (size_t k = 0; k < m.used; ++k) {
    for (Task& t : m.residents[k]->tasks) {
      if (t.fiber == nullptr) continue;
      reset(*t.fiber, entry);
      give_back(t.fiber);
      t.fiber = nullptr;
    }
  }
}

void run_all() {
  const std::vector<int64_t> order = order_of_blocks();
  const size_t most = static_cast<size_t>(std::max(1, at_once / m.launch->threads));
  m.used = m.schedule.ordered ? 1 : std::min(order.size(), 1 + draw() % most);
  while (m.residents.size() < m.used) m.residents.push_back(std::make_unique<Resident>());
  m.able.reserve(m.used * static_cast<size_t>((m.launch->threads + 31) / 32));
  size_t begun = 0, ended = 0;
  while (begun < m.used) begin(*m.residents[begun], order[begun]), ++begun;
  while (ended < order.size() && m.failure.empty()) {
    m.ended = nullptr;
    Task* to = next();
    if (to == nullptr) {
      m.failure = deadlock();
      break;
    }
    go(to);
    if (m.ended == nullptr) continue;
    end_block(*m.ended);
    ++ended;
    if (begun < order.size()) begin(*m.ended, order[begun++]);
  }
}

}  // namespace

void run(const Launch& launch) {
  refuse_what_a_gpu_would(launch);
  const std::lock_guard<std::mutex> lock(m.one);
  const Schedule first;
  const Schedule& given = launch.schedule == nullptr ? first : *launch.schedule;
  m.launch = &launch;
  m.schedule = given;
  m.random = given.seed * 0x9e3779b97f4a7c15 + given.launches++;
  m.draws = 0;
  m.favourite = nullptr;
  m.failure.clear();
  m.unused = m.fibers;
  m.running = &m.outside;
  adopt(m.outside);
  run_all();
  current = nullptr;
  if (!m.failure.empty()) abandon();
  see(&m.finished);
  m.memories.clear();
  if (!m.failure.empty()) {
    std::ostringstream s;
    s << in_words(launch) << m.failure << " (schedule " << (given.ordered ? "in order" : "seed ");
    if (!given.ordered) s << given.seed;
    throw std::runtime_error(s.str() + ")");
  }
}

void barrier(Place place) {
  Task& t = task();
  Warp& w = *t.warp;
  Resident& r = *w.block;
  meet(t, "sync", place);
  if (r.arrived == 0) r.place = place;
  if (r.place.line != place.line) {
    fail("divergence in a block: " + in_words(t) + " reached sync at " + in_words(place) + " while " +
         std::to_string(r.arrived) + " wait in sync at " + in_words(r.place));
  }
  char* tag = &r.tags[r.barriers % 2];
  publish(tag);
  w.waiting |= bit(t);
  if (++r.arrived == m.launch->threads) {
    for (Warp& other : r.warps) {
      wake(other, other.waiting);
      other.waiting = 0;
    }
    r.arrived = 0;
    ++r.barriers;
  }
  pause();
  see(tag);
}

void collective(const char* what, Place place, void* mine, void (*act)(void* const* lanes)) {
  Task& t = task();
  Warp& w = *t.warp;
  meet(t, what, place);
  if (w.lanes != 32)
    fail(in_words(t) + " is in a warp of " + std::to_string(w.lanes) + " lanes and reached " + what);
  const uint32_t self = bit(t);
  w.brought[t.index - w.first] = mine;
  w.waiting |= self;
  if (w.waiting != ~0u) return pause();
  act(w.brought);
  w.waiting = 0;
  wake(w, ~self);
  if (m.schedule.ordered || draw() % 4 != 0) return;
  wake(w, self);
  pause();
}

namespace {
constexpr size_t guard = watched ? 0 : 256, alignment = 256;
}

Poisoned::Poisoned(int64_t bytes) : bytes_(bytes), memory_(nullptr), data_(nullptr) {
  void* memory = nullptr;
  const size_t whole = static_cast<size_t>(bytes) + 2 * guard;
  if (posix_memalign(&memory, alignment, whole) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, whole);
  memory_ = static_cast<unsigned char*>(memory);
  data_ = memory_ + guard;
}

Poisoned::~Poisoned() { std::free(memory_); }

bool Poisoned::intact() const {
  const auto set = [](unsigned char c) { return c == 0xff; };
  return std::all_of(memory_, data_, set) && std::all_of(data_ + bytes_, data_ + bytes_ + guard, set);
}

}  // namespace simt
