// What is done before a step and after it: which rows have it, resets and padding, and in a backward the
// gradients that arrive. Included inside of TypedProgramScan.

void before_step(Thread& thread, int64_t t, bool first) {
  if (first || masked_) {
    thread.active.find(q_.masks, q_.reverse, thread.slice, t);
    number_rows(thread);
  }
  q_.backward ? add_output_grads(thread, t) : apply_resets_and_padding(thread, t);
}

// Where slices share rows each keeps its place.
void number_rows(const Thread& thread) {
  if (thread.slice.by_units) return;
  int32_t k = 0;
  for (int32_t b : thread.active.valid) position_[b] = k++;
}

// Units of the slice that exist.
int64_t units_of(const Thread& thread) const {
  return std::max<int64_t>(0, std::min(thread.j1, q_.H) - thread.j0);
}

void apply_resets_and_padding(const Thread& thread, int64_t t) {
  if (!masked_) return;
  const int64_t j = thread.j0, n = units_of(thread);
  std::vector<PaddedMatrix<A>>&now = states_[thread.now], &next = states_[thread.now ^ 1];
  for (size_t s = 0; s < now.size(); ++s) {
    const A* from = static_cast<const A*>(q_.reset_states[s]);
    for (int32_t b : thread.active.reset) {
      A* const to = now[s].row(b) + j;
      from == nullptr ? std::fill_n(to, n, A(0)) : std::copy_n(from + b * q_.H + j, n, to);
    }
  }
  if (q_.masks.lengths == nullptr) return;
  for (int64_t b = thread.slice.row0; b < thread.slice.row1; ++b) {
    if (q_.masks.valid(t, b)) continue;
    for (size_t s = 0; s < now.size(); ++s) std::copy_n(now[s].row(b) + j, n, next[s].row(b) + j);
    clear(thread, t, b);
  }
}

// Whether a slice writes what a row has once: of slices that share rows the first does.
static bool writes_rows(const Thread& thread) { return !thread.slice.by_units || thread.slice.index == 0; }

// Zeros in the memories that have none from a program's own instructions at this step.
void clear(const Thread& thread, int64_t t, int64_t b) const {
  const int64_t j = thread.j0, n = units_of(thread);
  for (int64_t m : *padded_) {
    if (m < 0 && !writes_rows(thread)) continue;
    const Spot to = memory_at(m < 0 ? -1 - m : m, t, b);
    if (to.first == nullptr) continue;
    const int64_t at = m < 0 ? 0 : j, count = m < 0 ? 1 : n;  // negative: one number a row
    const int64_t bytes = to.opmath ? int64_t{sizeof(A)} : storage_bytes();
    std::fill_n(static_cast<char*>(to.first) + at * bytes, count * bytes, char{});
  }
}

uint8_t* grad_flags(const Thread& thread) {
  return has_grad_.data() + (thread.slice.by_units ? thread.slice.index : 0) * q_.B;
}

// Adds the gradients of this step's states to what came from later steps.
void add_output_grads(const Thread& thread, int64_t t) {
  const int64_t n = units_of(thread);
  for (int32_t b : thread.active.valid) {
    bool any = false;
    for (size_t s = 0; s < states_[0].size(); ++s) {
      A* const d = states_[0][s].row(b) + thread.j0;
      if (q_.grads[s] != nullptr) {
        const Strides& strides = q_.grad_strides[s];
        const char* const row =
            static_cast<const char*>(q_.grads[s]) + (t * strides.step + b * strides.row) * storage_bytes();
        with_row(q_.dtype, d, [&](auto storage) {
          const auto* from = reinterpret_cast<const decltype(storage)*>(row);
          for (int64_t j = 0; j < n; j += L) {
            const int valid = static_cast<int>(std::min<int64_t>(L, n - j));
            const V g = strides.unit ? load(from + thread.j0 + j, valid) : load_one(from) - V{};
            store(d + j, loadu<V>(d + j) + g, valid);
          }
        });
      }
      for (int64_t j = 0; masked_ && !any && j < n; ++j) any = d[j] != A(0);
    }
    if (masked_) grad_flags(thread)[b] = any;
  }
}

// Where no gradient came to a row, none leaves it: what was saved there may be NaN, and 0 * NaN is not 0.
void drop_rows_without_grad(Thread& thread, int64_t t) {
  std::vector<int32_t>& valid = thread.active.valid;
  size_t kept = 0;
  for (int32_t b : valid) {
    bool found = false;
    for (int64_t p = 0; p < (thread.slice.by_units ? partition_.slices : 1); ++p)
      found = found || has_grad_[p * q_.B + b] != 0;
    if (writes_rows(thread)) note_alive(t, b, found);
    if (found) {
      valid[kept++] = b;
    } else {
      clear(thread, t, b);
    }
  }
  valid.resize(kept);
  number_rows(thread);
  if (q_.masks.lengths == nullptr) return;
  for (int64_t b = thread.slice.row0; b < thread.slice.row1; ++b) {
    if (q_.masks.valid(t, b)) continue;
    if (writes_rows(thread)) note_alive(t, b, false);
    clear(thread, t, b);
  }
}

void note_alive(int64_t t, int64_t b, bool alive) const {
  if (chunk_->alive != nullptr) chunk_->alive[(t - chunk_->t0) * q_.B + b] = alive;
}

// The gradient of the state before the step; where that was a reset's, it goes there and no further.
void after_backward_step(const Thread& thread) {
  const int64_t n = units_of(thread);
  for (size_t s = 0; s < states_[0].size(); ++s) {
    for (int32_t b : thread.active.reset) {
      A* const d = states_[0][s].row(b) + thread.j0;
      if (s < q_.d_resets.size() && q_.d_resets[s] != nullptr) {
        A* const sum = static_cast<A*>(q_.d_resets[s]) + b * q_.H + thread.j0;
        for (int64_t j = 0; j < n; ++j) sum[j] += d[j];
      }
      std::fill_n(d, n, A(0));
    }
  }
}
