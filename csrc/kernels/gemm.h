// Products of activations with packed weights. Backend::packed keeps the promises of kernels.h;
// Backend::blas hands float32 to OpenBLAS, whose rows change with the number of rows and threads,
// and stands outside them.
#pragma once

#include <span>
#include <string>

#include "base/view.h"
#include "kernels/matrix.h"
#include "kernels/work.h"

namespace bicache {

// What happens to the sums of a product before they are written.
enum class Write : uint8_t { set, add };  // c = a w^T, or c += a w^T

// Rows [first, first + c.rows) of `a` times w^T: c [R, outputs] in float32. `shares` split the R
// rows by request, in order, and are charged for `op`; an empty list charges nobody.
void gemm(const Kernels& kernels, const Activations& a, int64_t first, const Matrix& w,
          View<float> c, Write write, int threads, Op op, std::span<const Share> shares);

// The same from floats [R, inputs], converted on the way.
void gemm(const Kernels& kernels, View<const float> a, const Matrix& w, View<float> c, int threads,
          Op op, std::span<const Share> shares);

// silu(a gate^T) * (a up^T), the rows of `next` from 0 on; `floats` [R, outputs] is scratch. The
// shares are charged for Op::gate and Op::up.
void gemm_silu_mul(const Kernels& kernels, const Activations& a, const Matrix& gate,
                   const Matrix& up, int64_t rows, Activations& next, View<float> floats,
                   int threads, std::span<const Share> shares);

// OpenBLAS's own description of its build and kernels (openblas_get_config).
std::string blas_config();

}  // namespace bicache
