#include "model/balance.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "base/parallel.h"

namespace bicache {
namespace {

// f(i, row) for every row.
template <class F>
void for_rows(const StoredMatrix& m, int threads, F&& f) {
  constexpr int64_t kRows = 64;
  parallel_for((m.rows + kRows - 1) / kRows, threads, [&](int64_t t) {
    std::vector<float> row(static_cast<size_t>(m.cols));
    for (int64_t i = t * kRows; i < std::min(m.rows, (t + 1) * kRows); ++i) {
      m.row(i, row.data());
      f(i, row);
    }
  });
}

// most[j] = the larger of it and max |m[:, j]|, with the rows divided by `divisors` (empty: 1).
void column_maxima(const StoredMatrix& m, const std::vector<float>& divisors, int threads,
                   std::vector<float>& most) {
  constexpr int64_t kRows = 256;
  std::mutex mutex;
  parallel_for((m.rows + kRows - 1) / kRows, threads, [&](int64_t t) {
    std::vector<float> row(static_cast<size_t>(m.cols)), here(row.size());
    for (int64_t i = t * kRows; i < std::min(m.rows, (t + 1) * kRows); ++i) {
      m.row(i, row.data());
      const float scale = divisors.empty() ? 1 : 1 / divisors[static_cast<size_t>(i)];
      for (size_t j = 0; j < row.size(); ++j) here[j] = std::max(here[j], std::abs(row[j]) * scale);
    }
    const std::lock_guard lock(mutex);
    for (size_t j = 0; j < here.size(); ++j) most[j] = std::max(most[j], here[j]);
  });
}

// The norm of each row, its elements times g (empty: 1).
std::vector<double> row_norms(const StoredMatrix& m, const std::vector<float>& g, int threads) {
  std::vector<double> norms(static_cast<size_t>(m.rows));
  for_rows(m, threads, [&](int64_t i, const std::vector<float>& row) {
    double sum = 0;
    for (size_t j = 0; j < row.size(); ++j) {
      const double x = g.empty() ? row[j] : static_cast<double>(row[j]) * g[j];
      sum += x * x;
    }
    norms[static_cast<size_t>(i)] = std::sqrt(sum);
  });
  return norms;
}

// Of each column. The rows are cut, and the sums added, in an order that threads do not change.
std::vector<double> mean_squares(const StoredMatrix& m, int threads) {
  constexpr int64_t kParts = 64;
  const int64_t rows = (m.rows + kParts - 1) / kParts;
  std::vector<double> sums(static_cast<size_t>(kParts * m.cols));
  parallel_for(kParts, threads, [&](int64_t part) {
    std::vector<float> row(static_cast<size_t>(m.cols));
    double* sum = sums.data() + part * m.cols;
    for (int64_t i = part * rows; i < std::min(m.rows, (part + 1) * rows); ++i) {
      m.row(i, row.data());
      for (size_t j = 0; j < row.size(); ++j) sum[j] += static_cast<double>(row[j]) * row[j];
    }
  });
  std::vector<double> means(static_cast<size_t>(m.cols));
  for (size_t i = 0; i < sums.size(); ++i)
    means[i % means.size()] += sums[i] / static_cast<double>(m.rows);
  return means;
}

// Activations of magnitude a that meet columns of magnitude c: factors for the channels whose a / c
// is more than twice the median's. Channels that carry nothing count for neither.
std::vector<float> factors(const std::vector<double>& a, const std::vector<float>& c) {
  constexpr double kMost = 0x1p16;  // weights and norms stay far from the ends of float
  std::vector<double> t(a.size()), live;
  for (size_t j = 0; j < a.size(); ++j) {
    if (a[j] > 0 && c[j] > 0) live.push_back(t[j] = std::sqrt(a[j] / static_cast<double>(c[j])));
  }
  std::vector<float> s(a.size(), 1);
  if (live.empty()) return s;
  const auto middle = live.begin() + static_cast<std::ptrdiff_t>(live.size() / 2);
  std::nth_element(live.begin(), middle, live.end());
  for (size_t j = 0; j < t.size(); ++j)
    s[j] = static_cast<float>(
        std::exp2(std::nearbyint(std::log2(std::clamp(t[j] / *middle, 1.0, kMost)))));
  return s;
}

// What a matrix adds to the mean squares of the residual, for inputs of equal size, where `share`
// of the rows pass it.
void grow(std::vector<double>& r2, const StoredMatrix& m, double share, int threads) {
  const std::vector<double> norms = row_norms(m, {}, threads);
  for (size_t j = 0; j < r2.size(); ++j) r2[j] += share * (norms[j] * norms[j]);
}

// A norm with weight g over a residual whose channels have mean squares r2, before columns of
// magnitude c.
std::vector<float> site(const std::vector<float>& g, const std::vector<double>& r2,
                        const std::vector<float>& c) {
  std::vector<double> a(g.size());
  for (size_t j = 0; j < g.size(); ++j) a[j] = std::abs(g[j]) * std::sqrt(r2[j]);
  return factors(a, c);
}

LayerBalance balance_layer(const StoredLayer& w, std::vector<double>& r2, int threads) {
  LayerBalance b;
  std::vector<float> columns(r2.size());
  for (const StoredMatrix* m : {&w.q, &w.k, &w.v}) column_maxima(*m, {}, threads, columns);
  b.attention = site(w.attention_norm, r2, columns);
  grow(r2, w.attention_out, 1, threads);

  columns.assign(r2.size(), 0);
  for (const StoredFfn& f : w.ffn) {
    const auto ups = row_norms(f.up, w.ffn_norm, threads);
    auto inner = row_norms(f.gate, w.ffn_norm, threads);
    for (size_t i = 0; i < inner.size(); ++i) inner[i] *= ups[i];
    std::vector<float> most(inner.size());
    column_maxima(f.down, {}, threads, most);
    b.inner.push_back(factors(inner, most));
    column_maxima(f.gate, {}, threads, columns);
    column_maxima(f.up, b.inner.back(), threads, columns);
  }
  b.ffn = site(w.ffn_norm, r2, columns);
  for (const StoredFfn& f : w.ffn) grow(r2, f.down, 1 / static_cast<double>(w.ffn.size()), threads);
  return b;
}

}  // namespace

Balance balance(const StoredMatrix& embedding, const std::vector<StoredLayer>& layers,
                const std::vector<float>& final_norm, const StoredMatrix& head, int threads) {
  std::vector<double> r2 = mean_squares(embedding, threads);
  Balance all;
  for (const StoredLayer& w : layers) all.layers.push_back(balance_layer(w, r2, threads));
  std::vector<float> columns(r2.size());
  column_maxima(head, {}, threads, columns);
  all.final = site(final_norm, r2, columns);
  return all;
}

}  // namespace bicache
