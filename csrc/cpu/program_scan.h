// A program over time: for each step its spans, the products of a span for all rows and then its instructions
// for one block of rows after the other. Forward and backward alike: what is done before a step and after it
// differs. Included once per variant, inside its namespace.

// A row of numbers of a storage type, which is what A or a half type is.
template <class Use>
void with_row(Dtype dtype, const float*, Use use) {
  if (dtype == Dtype::bf16) {
    use(Bf16{});
  } else if (dtype == Dtype::f16) {
    use(Fp16{});
  } else {
    use(float{});
  }
}
template <class Use>
void with_row(Dtype, const double*, Use use) {
  use(double{});
}

// Compiled for each type that is computed in; storage types meet it at loads and stores alone.
template <class A>
class TypedProgramScan final : public ProgramScan {
  using V = vector_t<A>;
  static constexpr int L = lanes<A>;

 public:
  explicit TypedProgramScan(const ProgramProblem& q)
      : q_(q),
        p_(*q.program),
        width_(ceil_div(q.H, L) * L),
        block_rows_(
            std::max<int64_t>(1, std::min<int64_t>(q.B, block_bytes / (width_ * int64_t{sizeof(A)})))),
        masked_(q.masks.any()) {
    // a value that depends on a whole row, and heads, whose units fill no whole vectors, stay with one thread
    const bool apart = p_.sums_rows || p_.row_crossings > 0 || q.heads > 1;
    int64_t weights = q.H;
    for (const ProgramProduct& product : p_.products) weights += product.blocks * q.H * (q.H / q.heads);
    partition_ =
        Partition(q.workers.threads, q.B, apart ? 1 : ceil_div(ceil_div(q.H, L), max_vectors), weights, q.T);
    for (const ProgramProduct& product : p_.products) products_.emplace_back(product, q);
    for (size_t s = 0; s < q.states.size(); ++s) {
      states_[0].emplace_back(q.B, q.H);
      if (!q.backward) states_[1].emplace_back(q.B, q.H);
    }
    for (int64_t k = 0; k < p_.crossings; ++k) crossings_.emplace_back(q.B, q.H);
    row_crossings_ = PaddedMatrix<A>(p_.row_crossings, q.B + L);
    for (size_t k = 0; q.backward && k < q.d_units.size(); ++k)
      d_units_.emplace_back(q.d_units[k] == nullptr ? 0 : q.B, q.H);
    for (size_t k = 0; k < q.d_resets.size(); ++k) {
      if (q.d_resets[k] != nullptr) std::fill_n(static_cast<A*>(q.d_resets[k]), q.B * q.H, A(0));
    }
    has_grad_.assign(masked_ ? partition_.slices * q.B : 0, 0);
    position_.assign(q.B, 0);
    for (int64_t b = 0; b < q.B; ++b) position_[b] = static_cast<int32_t>(b);
  }

  void run(const ProgramChunk& chunk, const std::vector<int64_t>& padded) override {
    chunk_ = &chunk, padded_ = &padded;
    for (size_t s = 0; s < q_.states.size(); ++s) states_[0][s].fill(q_.states[s], q_.B, q_.H);
    run_slices(partition_, q_.workers.parallel, [&](int64_t first, int64_t last, SpinBarrier& barrier) {
      std::vector<Thread> threads;
      for (int64_t p = first; p < last; ++p) threads.emplace_back(*this, partition_.slice(p, q_.B));
      const auto each = [&](auto phase) {
        for (Thread& thread : threads) phase(thread);
        barrier.wait(last - first);
      };
      for (int64_t k = 0; k < chunk.n; ++k) {
        const bool ascending = q_.reverse == q_.backward;
        const int64_t t = chunk.t0 + (ascending ? k : chunk.n - 1 - k);
        const bool end = q_.backward && t == (q_.reverse ? q_.T - 1 : 0) && !q_.wants_initial_grads;
        each([&](Thread& thread) { before_step(thread, t, k == 0); });
        if (q_.backward && masked_) {
          for (Thread& thread : threads) drop_rows_without_grad(thread, t);
        }
        for (const ProgramSpan& span : p_.spans) {
          each([&](Thread& thread) {
            for (int64_t n : span.products) {
              if (end && p_.products[n].into >= 0)
                continue;  // nobody asks for what comes before the first step
              products_[n].multiply(*this, thread, t);
            }
            run_span(span, thread, t);
          });
        }
        if (q_.backward) {
          for (Thread& thread : threads) after_backward_step(thread);
        }
        for (Thread& thread : threads) thread.now ^= q_.backward ? 0 : 1;
      }
    });
    const int last = q_.backward ? 0 : static_cast<int>(chunk.n & 1);
    for (size_t s = 0; s < q_.states.size(); ++s) states_[last][s].copy_to(q_.states[s], q_.B, q_.H);
  }

  void finish() override {
    for (size_t k = 0; k < d_units_.size(); ++k) {
      A* const to = static_cast<A*>(q_.d_units[k]);
      if (to == nullptr) continue;
      std::fill_n(to, q_.H, A(0));
      for (int64_t b = 0; b < q_.B; ++b) {
        for (int64_t j = 0; j < q_.H; ++j) to[j] += d_units_[k].row(b)[j];
      }
    }
  }

 private:
  struct Thread;
#include "program_product.h"

  // What a slice of the work needs of its own.
  struct Thread {
    Thread(const TypedProgramScan& scan, const ThreadSlice& slice_)
        : slice(slice_), at(static_cast<size_t>(scan.p_.named() + scan.most_operands())) {
      const Program& p = scan.p_;
      int first_vector, last_vector;
      slice.vectors(scan.q_.H, L, &first_vector, &last_vector);
      j0 = int64_t{first_vector} * L, j1 = int64_t{last_vector} * L;
      // rows of a block lie side by side where it has all their units
      whole = j0 == 0 && j1 == scan.width_;
      rows = whole ? scan.block_rows_ : 1;
      columns =
          rows > 1 || p.sums_rows ? j1 - j0 : std::min<int64_t>(j1 - j0, block_bytes / int64_t{sizeof(A)});
      const int64_t size = rows * columns + L, row_size = ceil_div(rows, L) * L;
      temps = AlignedBuffer<A>((p.temps + scan.most_operands()) * size);
      row_temps = AlignedBuffer<A>((p.row_temps + scan.most_operands()) * row_size);
      constants = AlignedBuffer<A>(static_cast<int64_t>(p.constants.size()) * L);
      units = AlignedBuffer<A>(p.units * rows * scan.width_);
      std::fill_n(temps.data, (p.temps + scan.most_operands()) * size, A(0));
      std::fill_n(row_temps.data, (p.row_temps + scan.most_operands()) * row_size, A(0));
      size_t n = 0;
      for (int64_t k = 0; k < p.temps; ++k) at.first[n++] = temps.data + k * size;
      for (int64_t k = 0; k < p.row_temps; ++k) at.first[n++] = row_temps.data + k * row_size;
      for (double value : p.constants) {
        A* const to = constants.data + static_cast<int64_t>(n - p.temps - p.row_temps) * L;
        std::fill_n(to, L, static_cast<A>(value));
        at.stride[n] = 0;
        at.first[n++] = to;
      }
      first_unit = n;
      for (int64_t k = 0; k < p.units; ++k) {
        A* const to = units.data + k * rows * scan.width_;
        std::fill_n(to, rows * scan.width_, A(0));
        for (int64_t r = 0; r < rows; ++r)
          std::copy_n(static_cast<const A*>(scan.q_.units[k]), scan.q_.H, to + r * scan.width_);
        at.first[n++] = to;
      }
      own = n;
      for (int64_t k = 0; k < scan.most_operands(); ++k) {
        buffers.push_back(temps.data + (p.temps + k) * size);
        row_buffers.push_back(row_temps.data + (p.row_temps + k) * row_size);
      }
    }
    ThreadSlice slice;
    int64_t j0, j1;  // units of the slice, whole vectors
    int now = 0;     // which of states_ is that before the step
    bool whole;
    int64_t rows, columns;  // of a block, at most
    AlignedBuffer<A> temps, row_temps, constants, units;
    OperandTable<A> at;
    size_t first_unit = 0, own = 0;
    std::vector<A*> buffers, row_buffers;  // for operands that do not lie as a block wants them
    ActiveRows active;
  };

  int64_t most_operands() const {
    size_t most = 0;
    for (const ProgramSpan& span : p_.spans) most = std::max(most, span.operands.size());
    return static_cast<int64_t>(most);
  }

  template <class From>
  static void load_row(const From* from, int64_t count, A* to) {
    for (int64_t j = 0; j < count; j += L) {
      const int n = static_cast<int>(std::min<int64_t>(L, count - j));
      storeu(to + j, load(from + j, n));
    }
  }
  template <class To>
  static void store_row(const A* from, int64_t count, To* to) {
    for (int64_t j = 0; j < count; j += L) {
      store(to + j, loadu<V>(from + j), static_cast<int>(std::min<int64_t>(L, count - j)));
    }
  }

  // One place in memory, for the first row of a block.
  struct Spot {
    void* first = nullptr;
    int64_t row = 0;  // stride of rows
    bool opmath = true;
    bool padded = false;  // rows are whole vectors
  };
  Spot memory_at(int64_t index, int64_t t, int64_t b) const {
    const ProgramMemory& m = chunk_->memory[index];
    if (m.first == nullptr) return {};
    const int64_t at = (t - chunk_->t0) * m.step + b * m.row;
    return {element(m, at), m.row, m.opmath, false};
  }
  void* element(const ProgramMemory& m, int64_t at) const {
    return m.opmath ? static_cast<void*>(static_cast<A*>(m.first) + at)
                    : static_cast<void*>(static_cast<char*>(m.first) + at * storage_bytes());
  }
  Spot spot(const ProgramOperand& o, const Thread& thread, int64_t t, int64_t b) const {
    const int64_t position = thread.slice.row0 + position_[b];
    switch (o.place) {
      case Place::state_in:
      case Place::d_state:
        return {states_[thread.now][o.index].row(b), width_, true, true};
      case Place::state_out:
        return {states_[thread.now ^ 1][o.index].row(b), width_, true, true};
      case Place::product: {
        const Product& product = products_[o.index];
        return {product.result(o.block, position), width_, true, true};
      }
      case Place::crossing:
        return {crossings_[o.index].row(position), width_, true, true};
      case Place::operand: {
        const Product& product = products_[o.index];
        return {product.operand(o.block, b), product.operand_stride(), true, product.operand_padded()};
      }
      case Place::d_unit:
        return {d_units_[o.index].row(b), width_, true, true};
      default:
        return memory_at(o.index, t, b);
    }
  }

  bool is_first_step(int64_t t, int64_t b) const {
    if (!q_.reverse) return t == 0;
    return t == (q_.masks.lengths != nullptr ? std::min(q_.masks.lengths[b], q_.T) : q_.T) - 1;
  }
  // The state that step t of row b started from; null: zeros.
  Spot state_before(int64_t s, int64_t t, int64_t b) const {
    const bool reset = q_.masks.resets_before(t, b, q_.reverse);
    if (reset || is_first_step(t, b)) {
      const void* from = reset ? q_.reset_states[s] : q_.first[s];
      if (from == nullptr) return {};
      return {static_cast<A*>(const_cast<void*>(from)) + b * q_.H, q_.H, true, false};
    }
    const ProgramMemory& m = q_.after[s];
    return {element(m, (q_.reverse ? t + 1 : t - 1) * m.step + b * m.row), m.row, m.opmath, false};
  }

  void run_span(const ProgramSpan& span, Thread& thread, int64_t t) {
    if (span.code.empty()) return;
    const std::vector<int32_t>& rows = thread.active.valid;
    const int64_t count = static_cast<int64_t>(rows.size());
    for (int64_t r = 0; r < count; r += thread.rows) {
      const int64_t here = std::min(thread.rows, count - r);
      for (int64_t j = thread.j0; j < thread.j1; j += thread.columns) {
        const int64_t width = std::min(thread.columns, thread.j1 - j);
        const BlockShape shape{here, width, std::min(width, q_.H - j)};
        run_block(span, thread, t, rows.data() + r, shape, j);
      }
    }
  }

  void run_block(const ProgramSpan& span, Thread& thread, int64_t t, const int32_t* rows,
                 const BlockShape& shape, int64_t j) {
    for (int64_t k = 0; j > 0 && k < p_.units; ++k) {
      thread.at.first[thread.first_unit + k] = thread.units.data + k * thread.rows * width_ + j;
    }
    const bool together = rows[shape.rows - 1] - rows[0] == shape.rows - 1;
    for (size_t k = 0; k < span.operands.size(); ++k) {
      thread.at.first[thread.own + k] = place(span.operands[k], k, thread, t, rows, shape, j, together);
    }
    for (const ProgramInstruction& i : span.code) Interpreter<A>::run(i, thread.at, shape);
    for (size_t k = 0; k < span.operands.size(); ++k) {
      const ProgramOperand& o = span.operands[k];
      if (o.store) keep(o, thread.at.first[thread.own + k], thread, t, rows, shape, j);
    }
    if (j > 0) {
      for (int64_t k = 0; k < p_.units; ++k)
        thread.at.first[thread.first_unit + k] = thread.units.data + k * thread.rows * width_;
    }
  }

  // Where an instruction finds an operand's block: where it stands, or in a buffer.
  A* place(const ProgramOperand& o, size_t k, Thread& thread, int64_t t, const int32_t* rows,
           const BlockShape& shape, int64_t j, bool together) const {
    if (o.place == Place::memory_row || o.place == Place::crossing_row) {
      A* const to = thread.row_buffers[k];
      for (int64_t r = 0; o.load && r < shape.rows; ++r) {
        if (o.place == Place::crossing_row) {
          to[r] = row_crossings_.row(o.index)[thread.slice.row0 + position_[rows[r]]];
        } else {
          const Spot from = memory_at(o.index, t, rows[r]);
          to[r] = from.opmath ? *static_cast<const A*>(from.first) : load_number(from.first);
        }
      }
      return to;
    }
    A* const to = thread.buffers[k];
    if (o.place == Place::before) {
      for (int64_t r = 0; r < shape.rows; ++r)
        gather(state_before(o.index, t, rows[r]), j, shape.valid, to + r * shape.width);
      return to;
    }
    const Spot first = spot(o, thread, t, rows[0]);
    const bool by_position = o.place == Place::product || o.place == Place::crossing;
    const bool whole = first.padded || shape.valid == shape.width;
    if (first.first != nullptr && first.opmath && whole &&
        (shape.rows == 1 || (first.row == shape.width && (together || by_position)))) {
      return static_cast<A*>(first.first) + j;
    }
    for (int64_t r = 0; o.load && r < shape.rows; ++r)
      gather(spot(o, thread, t, rows[r]), j, shape.valid, to + r * shape.width);
    return to;
  }

  void gather(const Spot& from, int64_t j, int64_t count, A* to) const {
    if (from.first == nullptr) {
      std::fill_n(to, count, A(0));
    } else if (from.opmath) {
      load_row(static_cast<const A*>(from.first) + j, count, to);
    } else {
      with_row(q_.dtype, static_cast<A*>(nullptr),
               [&](auto s) { load_row(static_cast<const decltype(s)*>(from.first) + j, count, to); });
    }
  }
  void scatter(const A* from, const Spot& to, int64_t j, int64_t count) const {
    if (to.first == nullptr) return;
    if (to.opmath) {
      store_row(from, count, static_cast<A*>(to.first) + j);
    } else {
      with_row(q_.dtype, static_cast<A*>(nullptr),
               [&](auto s) { store_row(from, count, static_cast<decltype(s)*>(to.first) + j); });
    }
  }
  int64_t storage_bytes() const {
    return q_.dtype == Dtype::bf16 || q_.dtype == Dtype::f16 ? 2 : int64_t{sizeof(A)};
  }
  A load_number(const void* from) const {
    A v{};
    with_row(q_.dtype, static_cast<A*>(nullptr),
             [&](auto s) { v = load_one(static_cast<const decltype(s)*>(from)); });
    return v;
  }

  void keep(const ProgramOperand& o, const A* from, Thread& thread, int64_t t, const int32_t* rows,
            const BlockShape& shape, int64_t j) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      const int32_t b = rows[r];
      if (o.place == Place::crossing_row) {
        row_crossings_.row(o.index)[thread.slice.row0 + position_[b]] = from[r];
      } else if (o.place == Place::memory_row) {
        if (!writes_rows(thread)) continue;
        const Spot to = memory_at(o.index, t, b);
        if (to.first == nullptr) continue;
        scatter(from + r, to, 0, 1);
      } else {
        const A* const row = from + r * shape.width;
        const Spot to = spot(o, thread, t, b);
        if (static_cast<const A*>(to.first) + j != row) scatter(row, to, j, shape.valid);
        if (o.also >= 0) scatter(row, memory_at(o.also, t, b), j, shape.valid);
      }
    }
  }

#include "program_steps.h"

  const ProgramProblem q_;
  const Program& p_;
  const int64_t width_;       // of a row: whole vectors
  const int64_t block_rows_;  // of a block that has all units
  const bool masked_;
  Partition partition_{1};
  const ProgramChunk* chunk_ = nullptr;
  const std::vector<int64_t>* padded_ = nullptr;
  std::vector<Product> products_;
  // The states before and after a step, by turns; backward: their gradients.
  std::vector<PaddedMatrix<A>> states_[2];
  std::vector<PaddedMatrix<A>> crossings_, d_units_;
  PaddedMatrix<A> row_crossings_;
  std::vector<uint8_t> has_grad_;  // [slices, B]
  std::vector<int32_t> position_;  // [B]: a row's place among those of its slice that have the step
};
