#include "kernels/matrix.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "kernels/quantize.h"

namespace bicache {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a type is packed for a table.
struct Layout {
  int64_t panel, group, words;  // columns, inputs per word, words of a panel
  int64_t panel_bytes;
  int64_t chunk;  // see Product

  Layout(const Kernels& kernels, DType kept, int64_t inputs) : panel(kernels.panel) {
    const Product& product = product_of(kernels, kept);
    group = inputs_per_word(product.form);
    chunk = product.chunk;
    int64_t step = product.word_step;
    if (is_quantised(kept)) step = std::max(step, kInt4Group / group);
    words = ceil_div(ceil_div(inputs, group), step) * step;
    const int64_t bits = kept == DType::f32    ? 32
                         : kept == DType::bf16 ? 16
                         : kept == DType::int8 ? 8
                                               : 4;
    panel_bytes = checked_mul(checked_mul(words, panel * group, "gemm"), bits, "gemm") / 8;
  }
  int64_t at(int64_t column, int64_t input) const {
    const int64_t word = input / group;
    return (chunk > 0 ? tiled(column, word) : word * panel + column) * group + input % group;
  }
  int64_t groups() const { return words * group / kInt4Group; }

 private:
  int64_t tiled(int64_t column, int64_t word) const {
    constexpr int64_t kTile = 16, kStrip = 32;
    const int64_t block = word / kBlockWords * kBlockWords,
                  end = std::min(block + kBlockWords, words);
    const int64_t even = even_chunk(end - block, chunk), begin = word - (word - block) % even;
    const int64_t length = std::min(even, end - begin);
    const int64_t tile = (word - begin) / kTile * 2 + column % kStrip / kTile;
    return begin * panel + column / kStrip * length * kStrip +
           (tile * kTile + word % kTile) * kTile + column % kTile;
  }
};

struct Source {
  StoredMatrix stored;
  Factors factors;

  int64_t outputs() const { return stored.rows; }
  int64_t inputs() const { return stored.cols; }
  void read(int64_t output, int64_t input, int64_t n, float* out) const {
    stored.read(output, input, n, out);
    for (int64_t i = 0; i < n && factors.inputs != nullptr; ++i)
      out[i] *= factors.inputs[input + i];
    for (int64_t i = 0; i < n && factors.outputs != nullptr; ++i) out[i] *= factors.outputs[output];
  }
};

void narrow(float x, float& out) { out = x; }
void narrow(float x, bf16& out) { out = to_bf16(x); }

// One panel: columns from output `first`.
template <class Kept>
void pack_panel(const Source& source, const Layout& layout, int64_t first, Kept* out) {
  constexpr int64_t kStrip = 16, kMost = 256;
  // Inputs at a time: a cache line of each of the panel's rows, or whole blocks.
  const int64_t step = std::max(kStrip, source.stored.type.format().block);
  const int64_t cols = std::min(layout.panel, source.outputs() - first);
  internal_check(step <= kMost, "[gemm] block: expected at most ", kMost, " numbers, got ", step);
  std::memset(out, 0, static_cast<size_t>(layout.panel_bytes));
  for (int64_t k = 0; k < source.inputs(); k += step) {
    const int64_t n = std::min(step, source.inputs() - k);
    float strip[kMost];
    for (int64_t j = 0; j < cols; ++j) {
      source.read(first + j, k, n, strip);
      for (int64_t i = 0; i < n; ++i) narrow(strip[i], out[layout.at(j, k + i)]);
    }
  }
}

// The nibble of byte `at` of a panel of int8 values: those of a vector low, of the next one high.
void put_nibble(uint8_t q, int64_t at, int64_t vector_bytes, std::byte* out) {
  const int64_t vector = at / vector_bytes;
  std::byte& b = out[vector / 2 * vector_bytes + at % vector_bytes];
  b |= static_cast<std::byte>(vector % 2 == 0 ? q : q << 4);
}

// Packs the panel of columns from `first`: values into `out`, m and z into `groups`, scales.
class Quantizer {
 public:
  Quantizer(const Kernels& kernels, const Layout& layout, const Source& source, DType kept)
      : kernels_(kernels), layout_(layout), source_(source), kept_(kept) {}

  void panel(int64_t first, std::byte* out, uint8_t* groups, float* scale, int32_t* sum) const {
    const int64_t cols = std::min(layout_.panel, source_.outputs() - first);
    std::memset(out, 0, static_cast<size_t>(layout_.panel_bytes));
    const bool int4 = kept_ == DType::int4;
    QuantisedChannel c(layout_.words * layout_.group, int4);
    std::vector<float> w(static_cast<size_t>(source_.inputs()));
    for (int64_t j = 0; j < layout_.panel; ++j) {
      if (j < cols) {
        source_.read(first + j, 0, source_.inputs(), w.data());
        int4 ? quantize_int4(w.data(), source_.inputs(), c)
             : quantize_int8(w.data(), source_.inputs(), c);
      } else {
        c = QuantisedChannel(layout_.words * layout_.group, int4);
      }
      scale[j] = c.scale;
      sum[j] = c.sum;
      put(c, j, out, groups);
    }
  }

 private:
  void put(const QuantisedChannel& c, int64_t j, std::byte* out, uint8_t* groups) const {
    if (kept_ == DType::int8) {
      for (int64_t k = 0; k < source_.inputs(); ++k)
        out[layout_.at(j, k)] = static_cast<std::byte>(c.q[k]);
      return;
    }
    for (size_t k = 0; k < c.q.size(); ++k)
      put_nibble(c.q[k], layout_.at(j, static_cast<int64_t>(k)), kernels_.vector_bytes, out);
    for (int64_t g = 0; g < layout_.groups(); ++g) {
      groups[2 * g * layout_.panel + j] = c.m[g];
      groups[(2 * g + 1) * layout_.panel + j] = static_cast<uint8_t>(c.z[g]);
    }
  }

  const Kernels& kernels_;
  const Layout& layout_;
  const Source& source_;
  DType kept_;
};

}  // namespace

const Product& product_of(const Kernels& kernels, DType weights) {
  return weights == DType::f32 ? kernels.f32 : weights == DType::bf16 ? kernels.bf16 : kernels.int8;
}

int64_t Matrix::size_bytes(const Kernels& kernels, Backend backend, DType kept, int64_t outputs,
                           int64_t inputs) {
  if (backend == Backend::blas)
    return checked_mul(checked_mul(outputs, inputs, "gemm"), sizeof(float), "gemm");
  const Layout layout(kernels, kept, inputs);
  int64_t panel_bytes = layout.panel_bytes;
  if (kept == DType::int4) panel_bytes += layout.groups() * 2 * layout.panel;
  if (is_quantised(kept))
    panel_bytes += layout.panel * static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
  return checked_mul(ceil_div(outputs, layout.panel), panel_bytes, "gemm");
}

Matrix::Matrix(const Kernels& kernels, Backend backend, const StoredMatrix& source, DType kept,
               int threads, Factors factors)
    : backend_(backend), dtype_(kept), outputs_(source.rows), inputs_(source.cols) {
  const int64_t outputs = outputs_, inputs = inputs_;
  internal_check(outputs > 0 && inputs > 0, "[gemm] weight shape: expected positive, got [",
                 outputs, ", ", inputs, "]");
  internal_check(backend == Backend::packed || kept == DType::f32,
                 "[gemm] blas weights: expected f32, got ", name(kept));
  constexpr int64_t kMost = 65536;  // 255 * 127 * kMost still fits an int32
  require(!is_quantised(kept) || inputs <= kMost, "[gemm] ", name(kept),
          " weights: expected at most ", kMost, " inputs, got ", inputs);
  const int64_t bytes = size_bytes(kernels, backend, kept, outputs, inputs);
  const Source from{source, factors};
  if (backend == Backend::blas) {
    data_ = Buffer<std::byte>(bytes);
    float* out = reinterpret_cast<float*>(data_.data());
    parallel_for(outputs, threads, [&](int64_t j) { from.read(j, 0, inputs, out + j * inputs); });
    return;
  }
  const Layout layout(kernels, kept, inputs);
  const int64_t panels = ceil_div(outputs, layout.panel);
  panel_ = layout.panel;
  words_ = layout.words;
  panel_bytes_ = layout.panel_bytes;
  data_ = Buffer<std::byte>(panels * panel_bytes_);
  if (kept == DType::int4) groups_ = Buffer<uint8_t>(panels * layout.groups() * 2 * panel_);
  if (is_quantised(kept)) {
    scale_ = Buffer<float>(panels * panel_);
    correction_ = Buffer<int32_t>(panels * panel_);
  }
  const int32_t offset = product_of(kernels, kept).form == Form::u8_quads ? 128 : 0;
  const Quantizer quantizer(kernels, layout, from, kept);
  parallel_for(panels, threads, [&](int64_t p) {
    std::byte* out = data_.data() + p * panel_bytes_;
    if (kept == DType::f32) {
      pack_panel(from, layout, p * panel_, reinterpret_cast<float*>(out));
    } else if (kept == DType::bf16) {
      pack_panel(from, layout, p * panel_, reinterpret_cast<bf16*>(out));
    } else {
      int32_t* sums = correction_.data() + p * panel_;
      quantizer.panel(p * panel_, out, groups_.data() + p * layout.groups() * 2 * panel_,
                      scale_.data() + p * panel_, sums);
      for (int64_t j = 0; j < panel_; ++j) sums[j] *= offset;
    }
  });
}

void Matrix::set_bias(Buffer<float> bias) {
  internal_check(bias.size() == outputs_, "[gemm] bias: expected ", outputs_, " values, got ",
                 bias.size());
  bias_ = std::move(bias);
}

void Activations::reserve(const Kernels& kernels, Backend backend, DType weights, int64_t rows,
                          int64_t inputs) {
  const Product& product = product_of(kernels, weights);
  kernels_ = &kernels;
  weights_ = weights;
  rows_ = rows;
  inputs_ = inputs;
  form_ = product.form;
  words_ = backend == Backend::blas ? inputs : Layout(kernels, weights, inputs).words;
  // Rows an even number of cache lines apart would meet in fewer sets of the caches.
  constexpr int64_t kLine = 16;
  stride_ = product.row_step > 1 ? (words_ / kLine | 1) * kLine : words_;
  data_.reserve(checked_mul(checked_add(rows, product.row_step, "gemm"), stride_, "gemm"));
  if (is_quantised(weights)) scale_.reserve(rows);
}

void Activations::set(int64_t row, const float* x) {
  int32_t* out = data_.data() + row * stride_;
  const int64_t group = inputs_per_word(form_), pad = words_ * group - inputs_;
  if (form_ == Form::u8_quads) {
    auto* q = reinterpret_cast<uint8_t*>(out);
    scale_[row] = kernels_->quantize_u8(x, inputs_, q);
    std::memset(q + inputs_, 128, static_cast<size_t>(pad));
  } else if (form_ == Form::s16_pairs) {
    auto* q = reinterpret_cast<int16_t*>(out);
    scale_[row] = kernels_->quantize_s16(x, inputs_, q);
    std::memset(q + inputs_, 0, static_cast<size_t>(pad) * sizeof *q);
  } else {
    set(row, 0, inputs_, x);
  }
}

void Activations::set(int64_t row, int64_t first, int64_t n, const float* x) {
  internal_check(!is_quantised(weights_), "[gemm] activations: expected whole rows of ",
                 name(weights_), ", got a part");
  int32_t* out = data_.data() + row * stride_;
  const int64_t end = first + n, last = end == inputs_ ? words_ : 0;
  if (form_ == Form::bf16_pairs) {
    auto* halves = reinterpret_cast<uint16_t*>(out);
    kernels_->round_to_halves(x, n, halves + first);
    std::fill(halves + end, std::max(halves + end, halves + 2 * last), uint16_t{0});
    return;
  }
  auto* floats = reinterpret_cast<float*>(out);
  if (weights_ == DType::bf16) {
    kernels_->round_to_floats(x, n, floats + first);
  } else {
    std::memcpy(floats + first, x, static_cast<size_t>(n) * sizeof(float));
  }
  std::fill(floats + end, std::max(floats + end, floats + last), 0.0f);
}

void Activations::copy(int64_t row, const Activations& from, int64_t from_row) {
  internal_check(from.stride_ == stride_ && from.form_ == form_ && from.weights_ == weights_,
                 "[gemm] activations: expected rows of ", stride_, " words for ", name(weights_),
                 ", got ", from.stride_, " for ", name(from.weights_));
  std::memcpy(data_.data() + row * stride_, from.row(from_row),
              static_cast<size_t>(stride_) * sizeof(int32_t));
  if (is_quantised(weights_)) scale_[row] = *from.scale(from_row);
}

}  // namespace bicache
