// Products with weights that were packed once. Backend::packed keeps the promises of kernels.h;
// Backend::blas hands float32 to OpenBLAS, whose rows change with the number of rows and threads,
// and stands outside them.
#pragma once

#include <span>
#include <string>

#include "base/buffer.h"
#include "base/dtype.h"
#include "base/view.h"
#include "kernels/kernels.h"
#include "kernels/work.h"

namespace bicache {

enum class Backend : uint8_t { packed, blas };

// A weight matrix [outputs, inputs] as gemm() reads it; made for one kernel table.
class Matrix {
 public:
  Matrix() = default;
  // `source`: row-major [outputs, inputs] of type `stored`, not necessarily aligned. `kept`: the
  // type it is held in (Backend::blas: f32 only). Packs on `threads` threads.
  Matrix(const Kernels& kernels, Backend backend, const std::byte* source, DType stored, DType kept,
         int64_t outputs, int64_t inputs, int threads);

  Backend backend() const { return backend_; }
  DType dtype() const { return dtype_; }
  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  int64_t panel() const { return panel_; }  // Backend::packed: Kernels::panel; Backend::blas: 0
  int64_t size_bytes() const { return data_.size(); }  // as held, padding included
  // The same, of one that was not made.
  static int64_t size_bytes(const Kernels& kernels, Backend backend, DType kept, int64_t outputs,
                            int64_t inputs);
  // Backend::packed: [ceil(outputs / panel), inputs, panel], zero-padded. Backend::blas: as it
  // came.
  const std::byte* data() const { return data_.data(); }

 private:
  Backend backend_ = Backend::packed;
  DType dtype_ = DType::f32;
  int64_t outputs_ = 0, inputs_ = 0, panel_ = 0;
  Buffer<std::byte> data_;
};

// c = a * w^T: a [R, inputs], c [R, outputs], in float32, apart. `shares` split the R rows by
// request, in order, and are charged for `op`; an empty list charges nobody.
void gemm(const Kernels& kernels, View<const float> a, const Matrix& w, View<float> c, int threads,
          Op op, std::span<const Share> shares);

// OpenBLAS's own description of its build and kernels (openblas_get_config).
std::string blas_config();

}  // namespace bicache
