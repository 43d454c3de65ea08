#include "kernels/gemm.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/parallel.h"
#include "kernels/blas.h"

namespace bicache {
namespace {

constexpr int64_t kInputBlock = 1024;  // of one panel: stays in L2 while the rows of a task pass
constexpr int64_t kFewRowsInputBlock = 512;  // of fewer rows: kernels prefetch the next block
constexpr int64_t kRowBlock = 96;            // rows of one task

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements [0, n) of a stored row, which need not be aligned.
void widen(const std::byte* source, DType stored, int64_t n, float* out) {
  if (stored == DType::f32) {
    std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    bf16 x;
    std::memcpy(&x, source + i * 2, sizeof x);
    out[i] = to_float(x);
  }
}

void narrow(float x, float& out) { out = x; }
void narrow(float x, bf16& out) { out = to_bf16(x); }

struct Source {
  const std::byte* data;
  DType stored;
  int64_t outputs, inputs;

  void read(int64_t output, int64_t input, int64_t n, float* out) const {
    widen(data + (output * inputs + input) * bicache::size_bytes(stored), stored, n, out);
  }
};

// One panel: [inputs, panel], columns from output `first`, zero where there are none.
template <class Kept>
void pack_panel(const Source& source, int64_t first, int64_t panel, Kept* out) {
  constexpr int64_t kStrip = 16;  // inputs at a time: a cache line of each of the panel's rows
  const int64_t cols = std::min(panel, source.outputs - first);
  for (int64_t k = 0; k < source.inputs; k += kStrip) {
    const int64_t n = std::min(kStrip, source.inputs - k);
    float strip[kStrip];
    for (int64_t j = 0; j < panel; ++j) {
      if (j < cols) source.read(first + j, k, n, strip);
      if (j >= cols) std::fill_n(strip, n, 0.0f);
      for (int64_t i = 0; i < n; ++i) narrow(strip[i], out[(k + i) * panel + j]);
    }
  }
}

// Rows [begin, begin + rows) of c, one panel of columns.
void multiply(const Kernels& kernels, View<const float> a, const Matrix& w, View<float> c,
              int64_t p) {
  const int64_t panel = kernels.panel, inputs = w.inputs(), first = p * panel;
  const int64_t cols = std::min(panel, w.outputs() - first);
  const int64_t block = a.rows < kRowBlock ? kFewRowsInputBlock : kInputBlock;
  for (int64_t k = 0; k < inputs; k += block) {
    const int64_t n = std::min(block, inputs - k);
    const int64_t offset = (p * inputs + k) * panel;
    if (w.dtype() == DType::f32) {
      kernels.gemm_f32(a.data + k, a.stride, reinterpret_cast<const float*>(w.data()) + offset, n,
                       c.data + first, c.stride, a.rows, cols, k > 0);
    } else {
      kernels.gemm_bf16(a.data + k, a.stride, reinterpret_cast<const bf16*>(w.data()) + offset, n,
                        c.data + first, c.stride, a.rows, cols, k > 0);
    }
  }
}

void charge(std::span<const Share> shares, Op op, int64_t rows, const Matrix& w) {
  int64_t total = 0, end = 0;
  for (const Share& share : shares) total += share.rows;
  internal_check(shares.empty() || total == rows, "[gemm] rows of the shares: expected ", rows,
                 ", got ", total);
  for (const Share& share : shares) {
    const int64_t begin = end;
    end += share.rows;
    if (share.work == nullptr) continue;
    share.work->rows_of(op) += share.rows;
    share.work->flops += 2 * share.rows * w.inputs() * w.outputs();
    // The bytes up to a row, rounded down: differences add up to the whole.
    share.work->bytes += w.size_bytes() * end / rows - w.size_bytes() * begin / rows;
  }
}

}  // namespace

int64_t Matrix::size_bytes(const Kernels& kernels, Backend backend, DType kept, int64_t outputs,
                           int64_t inputs) {
  const int64_t panel = backend == Backend::blas ? 1 : kernels.panel;
  const int64_t rows = checked_mul(ceil_div(outputs, panel), panel, "gemm");
  return checked_mul(checked_mul(rows, inputs, "gemm"), bicache::size_bytes(kept), "gemm");
}

Matrix::Matrix(const Kernels& kernels, Backend backend, const std::byte* source, DType stored,
               DType kept, int64_t outputs, int64_t inputs, int threads)
    : backend_(backend), dtype_(kept), outputs_(outputs), inputs_(inputs) {
  internal_check(outputs > 0 && inputs > 0, "[gemm] weight shape: expected positive, got [",
                 outputs, ", ", inputs, "]");
  internal_check(backend == Backend::packed || kept == DType::f32,
                 "[gemm] blas weights: expected f32, got ", name(kept));
  const Source from{source, stored, outputs, inputs};
  if (backend == Backend::blas) {
    data_ = Buffer<std::byte>(size_bytes(kernels, backend, kept, outputs, inputs));
    float* out = reinterpret_cast<float*>(data_.data());
    parallel_for(outputs, threads, [&](int64_t j) { from.read(j, 0, inputs, out + j * inputs); });
    return;
  }
  panel_ = kernels.panel;
  const int64_t panels = ceil_div(outputs, panel_), size = checked_mul(inputs, panel_, "gemm");
  data_ = Buffer<std::byte>(size_bytes(kernels, backend, kept, outputs, inputs));
  parallel_for(panels, threads, [&](int64_t p) {
    if (kept == DType::f32) {
      pack_panel(from, p * panel_, panel_, reinterpret_cast<float*>(data_.data()) + p * size);
    } else {
      pack_panel(from, p * panel_, panel_, reinterpret_cast<bf16*>(data_.data()) + p * size);
    }
  });
}

void gemm(const Kernels& kernels, View<const float> a, const Matrix& w, View<float> c, int threads,
          Op op, std::span<const Share> shares) {
  internal_check(a.cols == w.inputs() && c.cols == w.outputs() && a.rows == c.rows,
                 "[gemm] shapes: expected [R, ", w.inputs(), "] to [R, ", w.outputs(), "], got [",
                 a.rows, ", ", a.cols, "] to [", c.rows, ", ", c.cols, "]");
  internal_check(w.backend() == Backend::blas || w.panel() == kernels.panel,
                 "[gemm] panel of the weights: expected ", kernels.panel, ", got ", w.panel());
  if (a.rows == 0) return;
  charge(shares, op, a.rows, w);
  if (w.backend() == Backend::blas) {
    const auto* weights = reinterpret_cast<const float*>(w.data());
    return blas_gemm(a, {weights, w.outputs(), w.inputs()}, c, threads);
  }
  // A panel's row blocks are neighbours, so that it is read from memory once.
  const int64_t panels = ceil_div(w.outputs(), w.panel()), blocks = ceil_div(a.rows, kRowBlock);
  threads = worth_threads(threads, 2 * a.rows * w.inputs() * w.outputs());
  parallel_for(panels * blocks, threads, [&](int64_t task) {
    const int64_t begin = task % blocks * kRowBlock, end = std::min(begin + kRowBlock, a.rows);
    multiply(kernels, a.slice(begin, end), w, c.slice(begin, end), task / blocks);
  });
}

}  // namespace bicache
