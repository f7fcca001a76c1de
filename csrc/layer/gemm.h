// The GEMMs around a scan, over all steps and rows at once.

#pragma once

#include <memory>
#include <vector>

#include "tensors.h"

namespace rnnkit {

// Whether torch's GEMM is taken for M rows of K times a matrix like w, with N outputs.
bool torch_multiplies(const Tensor& w, int64_t M, int64_t N, int64_t K);

// Rows of a [M, K] times one matrix, M at a time, into rows of `out` [M, N].
class PackedGemm {
 public:
  // a w^T with w [N, K], packed where `pack`, or where `nn` a w with w [K, N]; rows: how many there
  // will be in all.
  PackedGemm(const Tensor& w, bool nn, int64_t rows, bool pack = true);
  void run(const Tensor& a, Tensor& out) const;
  // The package's own, or null where torch's is taken: a small product needs no tensors.
  const GemmKernel* own() const { return own_.get(); }

 private:
  const Tensor w_;
  const bool nn_;
  std::unique_ptr<GemmKernel> own_;
};

// The gradient of a weight: out [M, N] += sum over k of a[k, :M]^T row[k], with rows of N elements (null:
// zeros).
struct WeightGrad {
  const std::vector<const void*>& rows;
  Tensor out;
};

// Those of up to two weights, by one left operand a [K, ...], which is packed once for both; `sum`, where
// there is one, += the sum over k of a[k]. Outputs and `sum` are in the compute type; where not `add` they
// are written, whatever stands there.
void gemm_tn(const Tensor& a, const std::vector<WeightGrad>& grads, const OptionalTensor& sum, bool add);

}  // namespace rnnkit
