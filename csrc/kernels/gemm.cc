#include "kernels/gemm.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/parallel.h"
#include "kernels/blas.h"
#include "kernels/quantize.h"

namespace bicache {
namespace {

constexpr int64_t kVectorWords = 512;      // of kBlockWords at a time, without tiles
constexpr int64_t kFewRowsInt4Words = 64;  // of int4 for few rows: their bytes stay in L1
constexpr int64_t kMostPanels = 8;         // of one task, whose sums stay in L2
constexpr int64_t kFewPanels = 16;         // matrices of fewer are cut over the inputs, too
constexpr int64_t kChunkWords = 1024;      // then
static_assert(kChunkWords % kBlockWords == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

void check(const Kernels& kernels, const Activations& a, int64_t first, int64_t rows,
           const Matrix& w) {
  internal_check(a.inputs() == w.inputs() && first + rows <= a.rows(),
                 "[gemm] activations: expected rows up to ", first + rows, " of ", w.inputs(),
                 " inputs, got ", a.rows(), " of ", a.inputs());
  const bool same =
      a.weights() == w.dtype() || (is_quantised(a.weights()) && is_quantised(w.dtype()));
  internal_check(w.backend() == Backend::blas || (w.panel() == kernels.panel && same),
                 "[gemm] weights: expected panels of ", kernels.panel, " and ", name(a.weights()),
                 ", got ", w.panel(), " and ", name(w.dtype()));
}

// The threads a product is worth: it computes, and reads weights, a byte in the time of about four
// operations.
int threads_for(const Matrix& w, const Product& product, int64_t flops, int threads) {
  return worth_threads(threads, flops / product.speed + 4 * w.size_bytes());
}

// Memory of one thread: sums [rows of a task, panel] of float, or int32 for int8.
struct Scratch {
  Buffer<float> sums, other;
  Buffer<int8_t> expanded;  // one block of int4

  Scratch(int64_t rows, int64_t panel) { reserve(rows, panel); }
  void reserve(int64_t rows, int64_t panel) {
    sums.reserve(rows * panel);
    other.reserve(rows * panel);
  }
};

Scratch& scratch(const Product& product, int64_t rows, int64_t panel) {
  rows = ceil_div(rows, product.row_step) * product.row_step;
  thread_local Scratch mine(rows, panel);
  mine.reserve(rows, panel);
  return mine;
}

// On tiles the rows of a task stay in the L2 cache while panels pass; if they fit with all their
// words, there may be more of them, and weights are read less often.
constexpr int64_t kMostRows = 512, kRowsBytes = int64_t{5} << 18;

bool whole_rows_fit(const Product& product, int64_t rows, int64_t words) {
  return product.chunk > 0 && rows * words * 4 <= kRowsBytes;
}

int64_t rows_of_task(const Product& product, int64_t rows, int64_t words) {
  const int64_t fit = kRowsBytes / 4 / words / product.row_step * product.row_step;
  if (product.chunk == 0 || fit < product.row_block) return product.row_block;
  const int64_t tasks = ceil_div(rows, std::min(fit, kMostRows));
  return ceil_div(ceil_div(rows, tasks), product.row_step) * product.row_step;
}

// Some rows of a product, panel by panel.
struct Rows {
  const Kernels& kernels;
  const Activations& a;
  const Matrix& w;
  int64_t first, rows;

  // out [rows, panel] = the sum over words [begin, end) of panel p, or is added to; with `finish`
  // it ends as that says, and out is scratch. `after` (may be null): where the next weights stand.
  void sum(int64_t p, int64_t begin, int64_t end, bool accumulate, const std::byte* after,
           Scratch& mine, float* out, const Finish* finish = nullptr) const {
    const Product& product = product_of(kernels, w.dtype());
    const int64_t word_bytes = w.panel_bytes() / w.words();
    const bool few_int4 = w.dtype() == DType::int4 && rows < product.row_block;
    const int64_t block = product.chunk > 0 ? kBlockWords
                          : few_int4        ? kFewRowsInt4Words
                                            : kVectorWords;
    for (int64_t k = begin; k < end; k += block) {
      const int64_t n = std::min(block, end - k);
      const std::byte* next = k + block < end ? at(p, k + block) : after;
      product.run({a.row(first) + k, a.stride(), weights(p, k, n, mine), n, out, w.panel(), rows,
                   finish == nullptr ? w.panel() : cols(p), accumulate || k > begin, next,
                   next == nullptr ? 0 : n * word_bytes, k + block < end ? nullptr : finish,
                   w.dtype() == DType::int4});
    }
  }

  const std::byte* at(int64_t p, int64_t word) const {
    return w.data() + p * w.panel_bytes() + word * (w.panel_bytes() / w.words());
  }

  int64_t cols(int64_t p) const { return std::min(w.panel(), w.outputs() - p * w.panel()); }

  // Of panel p, to `out`.
  Finish finish_of(int64_t p, float* out, int64_t stride, Write write, bool stream) const {
    const bool quantised = is_quantised(w.dtype());
    const int64_t column = p * w.panel();
    return {quantised ? w.correction() + column : nullptr,
            quantised ? w.scale() + column : nullptr,
            quantised ? a.scale(first) : nullptr,
            w.bias() == nullptr ? nullptr : w.bias() + column,
            out,
            stride,
            write == Write::add,
            stream && cols(p) == w.panel()};
  }

  // Panels [begin, end), to `c`. Rows that the L2 cache cannot hold pass in blocks of words, panel
  // by panel.
  void product(int64_t begin, int64_t end, const std::byte* after, Scratch& mine, View<float> c,
               Write write, bool stream) const {
    const Product& product = product_of(kernels, w.dtype());
    const bool whole = rows < product.row_block || whole_rows_fit(product, rows, w.words());
    const int64_t block = whole ? w.words() : kBlockWords;
    mine.sums.reserve((end - begin) * rows * w.panel());
    for (int64_t k = 0; k < w.words(); k += block) {
      const int64_t stop = std::min(k + block, w.words());
      for (int64_t p = begin; p < end; ++p) {
        const Finish finish = finish_of(p, c.data + p * w.panel(), c.stride, write, stream);
        const std::byte* next = p + 1 < end        ? at(p + 1, k)
                                : stop < w.words() ? at(begin, stop)
                                                   : after;
        sum(p, k, stop, k > 0, next, mine, mine.sums.data() + (p - begin) * rows * w.panel(),
            stop < w.words() ? nullptr : &finish);
      }
    }
  }

  // What the sums of panel p stand for, in their place.
  void finish(int64_t p, float* sums) const {
    const int64_t panel = w.panel(), cols = std::min(panel, w.outputs() - p * panel);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = sums + r * panel;
      if (is_quantised(w.dtype())) {
        kernels.dequantize(reinterpret_cast<const int32_t*>(row), w.correction() + p * panel,
                           w.scale() + p * panel, *a.scale(first + r), cols, row);
      }
      if (w.bias() != nullptr) kernels.add(row, w.bias() + p * panel, cols);
    }
  }

 private:
  // Words [k, k + n) of panel p.
  const void* weights(int64_t p, int64_t k, int64_t n, Scratch& mine) const {
    if (w.dtype() != DType::int4) return at(p, k);
    const Product& product = product_of(kernels, w.dtype());
    const int64_t panel = w.panel(), words = kInt4Group / inputs_per_word(product.form);
    mine.expanded.reserve(kBlockWords * panel * inputs_per_word(product.form));
    product.expand(reinterpret_cast<const uint8_t*>(at(p, k)),
                   w.groups() + (p * w.words() + k) / words * 2 * panel, n, mine.expanded.data());
    return mine.expanded.data();
  }
};

void put(const Kernels& kernels, const float* sums, int64_t n, Write write, float* c) {
  if (write == Write::add) {
    kernels.add(c, sums, n);
  } else {
    std::memcpy(c, sums, static_cast<size_t>(n) * sizeof(float));
  }
}

// Few panels and many inputs: sums over chunks of the inputs, which threads share, are added in
// order. The cut follows from the matrix alone.
void gemm_in_chunks(const Rows& all, View<float> c, Write write, int threads) {
  const Matrix& w = all.w;
  const Product& product = product_of(all.kernels, w.dtype());
  const int64_t panel = w.panel(), panels = ceil_div(w.outputs(), panel);
  const int64_t chunks = ceil_div(w.words(), kChunkWords);
  const int64_t blocks = ceil_div(all.rows, product.row_block);
  const int64_t padded = blocks * ceil_div(product.row_block, product.row_step) * product.row_step;
  thread_local Buffer<float> parts;  // [panels, chunks, padded rows, panel]
  parts.reserve(checked_mul(panels * chunks * panel, padded, "gemm"));
  float* const part = parts.data();
  const auto rows_of = [&](int64_t block) {
    const int64_t begin = block * product.row_block;
    return Rows{all.kernels, all.a, w, all.first + begin,
                std::min(product.row_block, all.rows - begin)};
  };
  const auto at = [&](int64_t p, int64_t chunk, int64_t block) {
    return part + ((p * chunks + chunk) * padded + block * (padded / blocks)) * panel;
  };
  parallel_for(panels * chunks * blocks, threads, [&](int64_t task) {
    const int64_t p = task / blocks / chunks, chunk = task / blocks % chunks, block = task % blocks;
    rows_of(block).sum(p, chunk * kChunkWords, std::min((chunk + 1) * kChunkWords, w.words()),
                       false, nullptr, scratch(product, product.row_block, panel),
                       at(p, chunk, block));
  });
  parallel_for(panels * blocks, threads, [&](int64_t task) {
    const int64_t p = task / blocks, block = task % blocks;
    const Rows rows = rows_of(block);
    float* sums = at(p, 0, block);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* more = at(p, chunk, block);
      for (int64_t i = 0; i < rows.rows * panel; ++i) {
        if (!is_quantised(w.dtype())) {
          sums[i] += more[i];
        } else {
          int32_t x, y;
          std::memcpy(&x, sums + i, sizeof x);
          std::memcpy(&y, more + i, sizeof y);
          x += y;
          std::memcpy(sums + i, &x, sizeof x);
        }
      }
    }
    rows.finish(p, sums);
    const int64_t cols = std::min(panel, w.outputs() - p * panel);
    for (int64_t r = 0; r < rows.rows; ++r)
      put(all.kernels, sums + r * panel, cols, write,
          c.row(rows.first - all.first + r) + p * panel);
  });
}

// task(rows, begin, first, end, after): rows from `begin` on times panels [first, end), and what
// the same thread reads next (or null), until all is done. Threads take neighbouring panels: what
// one fetches ahead is its own. A panel stays in the L2 cache while all rows pass; on tiles, a
// block of rows while panels do.
template <class Task>
void for_tasks(const Rows& all, int64_t flops, int threads, Task&& task) {
  const Product& product = product_of(all.kernels, all.w.dtype());
  const int64_t panels = ceil_div(all.w.outputs(), all.w.panel());
  const int64_t most =
      panels < 4 * threads ? product.row_block : rows_of_task(product, all.rows, all.w.words());
  const int64_t blocks = ceil_div(all.rows, most);
  threads = threads_for(all.w, product, flops, threads);
  const int64_t some = std::clamp<int64_t>(panels / (4 * threads), 1, kMostPanels);
  const int64_t groups = ceil_div(panels, some);
  const bool rows_inside = product.chunk == 0 && panels >= 4 * threads && blocks > 1;
  const auto run = [&](int64_t block, int64_t first, int64_t end, const std::byte* after) {
    const int64_t begin = block * most;
    task(Rows{all.kernels, all.a, all.w, all.first + begin, std::min(most, all.rows - begin)},
         begin, first, end, after);
  };
  parallel_for(rows_inside ? groups : groups * blocks, threads, [&](int64_t i) {
    const int64_t first = i % groups * some, end = std::min(first + some, panels);
    if (!rows_inside) return run(i / groups, first, end, nullptr);
    for (int64_t p = first; p < end; ++p) {
      for (int64_t block = 0; block < blocks; ++block)
        run(block, p, p + 1, block + 1 == blocks && p + 1 < end ? all.at(p + 1, 0) : nullptr);
    }
  });
}

// Results that no cache below the last would keep, and whose rows begin on cache lines.
bool is_large(View<float> c) {
  constexpr int64_t kBytes = int64_t{2} << 20, kLine = 64, kFloats = kLine / 4;
  return c.rows * c.cols * 4 >= kBytes && c.stride % kFloats == 0 &&
         reinterpret_cast<uintptr_t>(c.data) % kLine == 0;
}

// silu(gate) * up of one panel.
struct SiluMul {
  const Rows& gate;
  const Matrix& up;
  int64_t p;
  Scratch& mine;

  // To rows from `begin` on of `next`; of `floats`, if `next` wants whole rows.
  void run(const std::byte* after, Activations& next, int64_t begin, View<float> floats) const {
    const Rows others{gate.kernels, gate.a, up, gate.first, gate.rows};
    const int64_t panel = up.panel(), cols = gate.cols(p), column = p * panel;
    const bool whole_rows = is_quantised(next.weights());
    float *sums = mine.sums.data(), *ups = mine.other.data();
    float* gates = whole_rows ? floats.row(begin) + column : sums;
    const int64_t stride = whole_rows ? floats.stride : panel;
    const Finish of_gate = gate.finish_of(p, gates, stride, Write::set, false);
    const Finish of_up = others.finish_of(p, ups, panel, Write::set, false);
    gate.sum(p, 0, gate.w.words(), false, others.at(p, 0), mine, sums, &of_gate);
    others.sum(p, 0, up.words(), false, after, mine, ups, &of_up);
    for (int64_t r = 0; r < gate.rows; ++r) {
      gate.kernels.silu_mul(gates + r * stride, ups + r * panel, cols);
      if (!whole_rows) next.set(begin + r, column, cols, gates + r * stride);
    }
  }
};

View<const float> floats(const Activations& a, int64_t first, int64_t rows) {
  return {reinterpret_cast<const float*>(a.row(first)), rows, a.inputs(), a.stride()};
}

View<const float> blas_weights(const Matrix& w) {
  return {reinterpret_cast<const float*>(w.data()), w.outputs(), w.inputs()};
}

}  // namespace

void gemm(const Kernels& kernels, const Activations& a, int64_t first, const Matrix& w,
          View<float> c, Write write, int threads, Op op, std::span<const Share> shares) {
  internal_check(c.cols == w.outputs(), "[gemm] columns: expected ", w.outputs(), ", got ", c.cols);
  check(kernels, a, first, c.rows, w);
  if (c.rows == 0) return;
  charge(shares, op, c.rows, w);
  if (w.backend() == Backend::blas) {
    blas_gemm(floats(a, first, c.rows), blas_weights(w), c, write == Write::add, threads);
    for (int64_t r = 0; r < c.rows && w.bias() != nullptr; ++r)
      kernels.add(c.row(r), w.bias(), c.cols);
    return;
  }
  const Rows all{kernels, a, w, first, c.rows};
  const int64_t panel = w.panel(), flops = 2 * c.rows * w.inputs() * w.outputs();
  if (ceil_div(w.outputs(), panel) < kFewPanels && w.words() > kChunkWords)
    return gemm_in_chunks(all, c, write,
                          threads_for(w, product_of(kernels, w.dtype()), flops, threads));
  const bool stream = write == Write::set && is_large(c);
  for_tasks(all, flops, threads,
            [&](const Rows& rows, int64_t begin, int64_t first_panel, int64_t end,
                const std::byte* after) {
              rows.product(first_panel, end, after,
                           scratch(product_of(kernels, w.dtype()), rows.rows, panel),
                           c.slice(begin, begin + rows.rows), write, stream);
            });
}

void gemm(const Kernels& kernels, View<const float> a, const Matrix& w, View<float> c, int threads,
          Op op, std::span<const Share> shares) {
  internal_check(a.cols == w.inputs() && a.rows == c.rows, "[gemm] shapes: expected [R, ",
                 w.inputs(), "] to [R, ", w.outputs(), "], got [", a.rows, ", ", a.cols, "] to [",
                 c.rows, ", ", c.cols, "]");
  Activations converted;
  converted.reserve(kernels, w.backend(), w.dtype(), a.rows, a.cols);
  for (int64_t r = 0; r < a.rows; ++r) converted.set(r, a.row(r));
  gemm(kernels, converted, 0, w, c, Write::set, threads, op, shares);
}

void gemm_silu_mul(const Kernels& kernels, const Activations& a, const Matrix& gate,
                   const Matrix& up, int64_t rows, Activations& next, View<float> floats_of,
                   int threads, std::span<const Share> shares) {
  check(kernels, a, 0, rows, gate);
  check(kernels, a, 0, rows, up);
  internal_check(up.outputs() == gate.outputs() && next.inputs() == gate.outputs() &&
                     floats_of.cols == gate.outputs() && floats_of.rows >= rows &&
                     next.rows() >= rows,
                 "[gemm] silu_mul: expected [", rows, ", ", gate.outputs(), "], got [",
                 floats_of.rows, ", ", floats_of.cols, "]");
  if (rows == 0) return;
  charge(shares, Op::gate, rows, gate);
  charge(shares, Op::up, rows, up);
  const int64_t panel = gate.panel();
  if (gate.backend() == Backend::blas) {
    thread_local Buffer<float> ups;
    ups.reserve(checked_mul(rows, up.outputs(), "gemm"));
    const View<float> up_of(ups.data(), rows, up.outputs());
    const View<float> gate_of = floats_of.slice(0, rows);
    blas_gemm(floats(a, 0, rows), blas_weights(gate), gate_of, false, threads);
    blas_gemm(floats(a, 0, rows), blas_weights(up), up_of, false, threads);
    for (int64_t r = 0; r < rows; ++r)
      kernels.silu_mul(gate_of.row(r), up_of.row(r), gate.outputs());
  } else {
    const Rows all{kernels, a, gate, 0, rows};
    for_tasks(all, 4 * rows * gate.inputs() * gate.outputs(), threads,
              [&](const Rows& some, int64_t begin, int64_t first_panel, int64_t end,
                  const std::byte* after) {
                Scratch& mine = scratch(product_of(kernels, gate.dtype()), some.rows, panel);
                for (int64_t p = first_panel; p < end; ++p) {
                  const SiluMul part{some, up, p, mine};
                  part.run(p + 1 < end ? some.at(p + 1, 0) : after, next, begin, floats_of);
                }
              });
    if (!is_quantised(next.weights())) return;
  }
  parallel_for(rows, worth_threads(threads, 64 * rows * gate.outputs()),
               [&](int64_t r) { next.set(r, floats_of.row(r)); });
}

}  // namespace bicache
