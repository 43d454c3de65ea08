// What a pass costs, from its plan alone: the same counts as gemm() and attention() make.
#pragma once

#include <vector>

#include "cache/plan.h"
#include "kernels/gemm.h"
#include "kernels/work.h"
#include "model/config.h"

namespace bicache {

// A model that was not loaded.
struct ModelShape {
  ModelConfig config;
  DType dtype = DType::f32;     // of the weights
  DType kv_dtype = DType::f32;  // of K and V
  Backend backend = Backend::packed;
  const Kernels* kernels = &bicache::kernels();

  int64_t weight_bytes() const;  // Weights::size_bytes()
};

// [L + 1], the last: the output head. Of a pass over `requests` requests of `n` rows each with this
// plan. In a batch, rows and FLOPs stay each request's own; the bytes of the weights, read once,
// are split by rows. Experts: which of them rows choose is not known, so their bytes are the most
// that so many rows can read; rows and FLOPs are exact.
std::vector<Work> predicted_work(const ModelShape& shape, const StepPlan& plan, int64_t n,
                                 int64_t requests = 1);

}  // namespace bicache
