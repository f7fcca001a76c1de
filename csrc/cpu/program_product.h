// The products of a program: its weights packed, its operand and its results. Included inside of
// TypedProgramScan.

class Product {
 public:
  Product(const ProgramProduct& product, const ProgramProblem& q)
      : p_(product),
        H_(q.H),
        head_(q.H / q.heads),
        heads_(q.heads),
        width_(ceil_div(q.H, L) * L),
        rows_(q.B) {
    const int64_t size = p_.blocks * q.H * head_;
    const A* w = static_cast<const A*>(q.weights[p_.weight]);
    if (q.dtype == Dtype::bf16 || q.dtype == Dtype::f16) {
      widened_ = AlignedBuffer<A>(ceil_div(size, L) * L);  // written by whole vectors
      with_row(q.dtype, w, [&](auto s) {
        load_row(static_cast<const decltype(s)*>(q.weights[p_.weight]), size, widened_.data);
      });
      w = widened_.data;
    }
    const bool pack = p_.transposed ? q.T * q.B > few_rows : q.T > 1;
    for (int64_t h = 0; h < heads_; ++h) {
      if (!p_.transposed) {
        for (int64_t k = 0; k < p_.blocks; k += max_gates) {
          weights_.emplace_back();
          weights_.back().gemm_nt(w + (k * H_ + h * head_) * head_, H_,
                                  static_cast<int>(std::min<int64_t>(max_gates, p_.blocks - k)), head_, head_,
                                  q.B, pack, q.workers);
        }
      } else if (heads_ == 1) {
        weights_.emplace_back();
        weights_.back().gemm_nn(w, H_, H_, p_.blocks * H_, q.B, pack, q.workers);
      } else {
        for (int64_t k = 0; k < p_.blocks; ++k) {
          weights_.emplace_back();
          weights_.back().gemm_nn(w + (k * H_ + h * head_) * head_, head_, head_, head_, q.B, pack,
                                  q.workers);
        }
      }
    }
    if (p_.into < 0) results_ = PaddedMatrix<A>((p_.transposed ? 1 : p_.blocks) * q.B, H_);
    if (p_.state < 0 && p_.memory < 0) operand_ = PaddedMatrix<A>(q.B, p_.transposed ? p_.blocks * H_ : H_);
    if (p_.bias >= 0) {
      bias_ = PaddedMatrix<A>(p_.blocks, H_);
      bias_.fill(q.biases[p_.bias], p_.blocks, H_);
    }
  }

  A* result(int64_t block, int64_t position) const { return results_.row(block * rows_ + position); }
  A* operand(int64_t block, int64_t b) const { return operand_.row(b) + (p_.transposed ? block * H_ : 0); }
  int64_t operand_stride() const { return operand_.stride; }
  // Whether a row of units has whole vectors of its own; else those of the next block follow it.
  bool operand_padded() const { return !p_.transposed || p_.blocks == 1; }

  // The results of the slice's rows and units at step t.
  void multiply(TypedProgramScan& scan, const Thread& thread, int64_t t) const {
    const A* a = operand_.stride == 0 ? nullptr : operand_.row(0);
    int64_t lda = operand_.stride;
    if (p_.state >= 0) {
      a = scan.states_[thread.now][p_.state].row(0), lda = width_;
    } else if (p_.memory >= 0) {
      const Spot from = scan.memory_at(p_.memory, t, 0);
      a = static_cast<const A*>(from.first), lda = from.row;
    }
    const std::vector<int32_t>& rows = thread.active.valid;
    size_t n = 0;
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t j0 = h * head_;
      const auto group = [&](int64_t block, const A* from, bool add) {
        const GemmWeights<A>& w = weights_[n++];
        switch (w.gates) {
          case 1:
            return run<1>(scan, thread, t, w, rows, from, lda, j0, block, add);
          case 2:
            return run<2>(scan, thread, t, w, rows, from, lda, j0, block, add);
          case 3:
            return run<3>(scan, thread, t, w, rows, from, lda, j0, block, add);
          default:
            return run<4>(scan, thread, t, w, rows, from, lda, j0, block, add);
        }
      };
      if (!p_.transposed) {
        for (int64_t k = 0; k < p_.blocks; k += max_gates) group(k, a + j0, false);
      } else if (heads_ == 1) {
        group(0, a, false);
      } else {
        for (int64_t k = 0; k < p_.blocks; ++k) group(0, a + k * H_ + j0, k > 0);
      }
    }
  }

 private:
  static constexpr int64_t max_gates = 4;

  template <int gates>
  void run(TypedProgramScan& scan, const Thread& thread, int64_t t, const GemmWeights<A>& w,
           const std::vector<int32_t>& rows, const A* a, int64_t lda, int64_t j0, int64_t block,
           bool add) const {
    int first, last;
    thread.slice.vectors(w.units, L, &first, &last);
    const bool accumulates = add || p_.accumulates;
    gemm_panels<gates>(
        w, first / w.panel_width(), static_cast<int>(ceil_div(last, w.panel_width())), rows.data(),
        static_cast<int>(rows.size()), a, lda,
        [&](int32_t b, int u, const A* z, const A*) {
          const int64_t j = j0 + static_cast<int64_t>(u) * L;
          const int n = static_cast<int>(std::min<int64_t>(L, w.units - static_cast<int64_t>(u) * L));
          for (int g = 0; g < gates; ++g) {
            V v = loadu<V>(z + g * L);
            if (p_.adds >= 0 && p_.added >> (block + g) & 1) {
              const Spot more = scan.memory_at(p_.adds + block + g, t, b);
              v += load(static_cast<const A*>(more.first) + j, n);
            }
            if (p_.bias >= 0) v += load(bias_.row(block + g) + j, n);
            A* const to = p_.into >= 0 ? scan.states_[0][p_.into].row(b) + j
                                       : result(block + g, thread.slice.row0 + scan.position_[b]) + j;
            if (accumulates) v += load(to, n);
            store(to, v, n);
          }
        },
        [](int32_t, int, int) {});
  }

  const ProgramProduct p_;
  const int64_t H_, head_, heads_, width_, rows_;
  std::vector<GemmWeights<A>> weights_;  // for each head and up to four blocks
  AlignedBuffer<A> widened_;             // the weight, where it is stored in a half type
  PaddedMatrix<A> results_, operand_, bias_;
};
