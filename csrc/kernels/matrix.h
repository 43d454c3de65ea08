// Weights, packed once for one kernel table, and activations in the form their products read.
#pragma once

#include <span>
#include <string>

#include "base/buffer.h"
#include "base/dtype.h"
#include "base/stored.h"
#include "base/view.h"
#include "kernels/kernels.h"

namespace bicache {

enum class Backend : uint8_t { packed, blas };

// What stored weights are multiplied by before they are packed; null: by 1.
struct Factors {
  const float* outputs = nullptr;  // [outputs]
  const float* inputs = nullptr;   // [inputs]
};

// A weight matrix [outputs, inputs] as gemm() reads it; kernels/quantize.h says how int8 and int4
// come about.
class Matrix {
 public:
  Matrix() = default;
  // `source`: [outputs, inputs]. `kept`: the type it is held in (Backend::blas: f32 only). Packs on
  // `threads` threads, from a few rows in float32 at a time.
  Matrix(const Kernels& kernels, Backend backend, const StoredMatrix& source, DType kept,
         int threads, Factors factors = {});
  Matrix(const Kernels& kernels, Backend backend, const std::byte* source, DType stored, DType kept,
         int64_t outputs, int64_t inputs, int threads, Factors factors = {})
      : Matrix(kernels, backend, {source, stored, outputs, inputs}, kept, threads, factors) {}

  // Is added to every row of a product; [outputs].
  void set_bias(Buffer<float> bias);

  Backend backend() const { return backend_; }
  DType dtype() const { return dtype_; }
  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  int64_t panel() const { return panel_; }  // Backend::packed: Kernels::panel; Backend::blas: 0
  int64_t words() const { return words_; }  // of one panel
  // As held, padding and scales included.
  int64_t size_bytes() const {
    return data_.size() + groups_.size() + scale_.size_bytes() + correction_.size_bytes() +
           bias_.size_bytes();
  }
  // The same, of one that was not made and has no bias.
  static int64_t size_bytes(const Kernels& kernels, Backend backend, DType kept, int64_t outputs,
                            int64_t inputs);
  // Backend::packed: [panels, words, panel, inputs_per_word], zero-padded; int4: as nibbles, the
  // low ones those of a vector, the high ones those of the next. Backend::blas: as it came.
  const std::byte* data() const { return data_.data(); }
  int64_t panel_bytes() const { return panel_bytes_; }      // of data()
  const uint8_t* groups() const { return groups_.data(); }  // int4: [panels, groups, (m, z), panel]
  const float* scale() const { return scale_.data(); }      // int8, int4: [panels, panel]
  const int32_t* correction() const { return correction_.data(); }  // of the sums; likewise
  const float* bias() const { return bias_.data(); }                // null: none

 private:
  Backend backend_ = Backend::packed;
  DType dtype_ = DType::f32;
  int64_t outputs_ = 0, inputs_ = 0, panel_ = 0, words_ = 0, panel_bytes_ = 0;
  Buffer<std::byte> data_;
  Buffer<uint8_t> groups_;
  Buffer<float> scale_, bias_;
  Buffer<int32_t> correction_;
};

// The product that weights of this type take.
const Product& product_of(const Kernels& kernels, DType weights);

// Rows that meet weights: rounded, or quantised with a scale per row.
class Activations {
 public:
  // Room for `rows` rows of `inputs`; what was there is lost.
  void reserve(const Kernels& kernels, Backend backend, DType weights, int64_t rows,
               int64_t inputs);
  // Row `row` = x [inputs]. Threads may set different rows.
  void set(int64_t row, const float* x);
  // Columns [first, first + n) of it, from x [n]; not of quantised ones, whose scale needs them
  // all. `first` even; padding is written with the last ones.
  void set(int64_t row, int64_t first, int64_t n, const float* x);

  // Row `row` = row `from_row` of `from`, which has the same inputs for weights of the same type.
  void copy(int64_t row, const Activations& from, int64_t from_row);

  DType weights() const { return weights_; }
  int64_t rows() const { return rows_; }
  int64_t inputs() const { return inputs_; }
  int64_t stride() const { return stride_; }  // in words
  const int32_t* row(int64_t row) const { return data_.data() + row * stride_; }
  const float* scale(int64_t row) const { return scale_.data() + row; }  // of quantised ones

 private:
  const Kernels* kernels_ = nullptr;
  DType weights_ = DType::f32;
  Form form_ = Form::f32;
  int64_t rows_ = 0, inputs_ = 0, words_ = 0, stride_ = 0;
  Buffer<int32_t> data_;
  Buffer<float> scale_;
};

}  // namespace bicache
