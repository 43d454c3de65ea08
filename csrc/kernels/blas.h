// The one way to OpenBLAS; used by gemm.cc for Backend::blas.
#pragma once

#include "base/view.h"

namespace bicache {

// c = a * w^T, or c += a * w^T: a [R, inputs], w [outputs, inputs], c [R, outputs]; R, inputs,
// outputs >= 1.
void blas_gemm(View<const float> a, View<const float> w, View<float> c, bool add, int threads);

}  // namespace bicache
