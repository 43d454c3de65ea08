#include "model/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace bicache {

Routing::Routing(View<const float> logits, int64_t per_row) {
  const int64_t experts = logits.cols;
  internal_check(1 <= per_row && per_row <= experts, "[routing] experts of a row: expected 1..",
                 experts, ", got ", per_row);
  struct Pick {
    int64_t expert;
    RoutedRow routed;
  };
  std::vector<Pick> picks;
  picks.reserve(static_cast<size_t>(logits.rows * per_row));
  begin_.assign(static_cast<size_t>(experts) + 1, 0);
  std::vector<int64_t> order(static_cast<size_t>(experts));
  for (int64_t r = 0; r < logits.rows; ++r) {
    const float* x = logits.row(r);
    const auto rank = [&](int64_t e) {
      return std::isnan(x[e]) ? -std::numeric_limits<float>::infinity() : x[e];
    };
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + per_row, order.end(),
        [&](int64_t a, int64_t b) { return rank(a) > rank(b) || (rank(a) == rank(b) && a < b); });
    double sum = 0;
    const double most = rank(order[0]);
    for (int64_t e = 0; e < experts; ++e) sum += std::exp(static_cast<double>(x[e]) - most);
    for (int64_t i = 0; i < per_row; ++i) {
      const int64_t e = order[static_cast<size_t>(i)];
      const double weight = std::exp(static_cast<double>(x[e]) - most) / sum;
      picks.push_back({e, {r, static_cast<float>(weight)}});
      ++begin_[static_cast<size_t>(e) + 1];
    }
  }
  std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
  rows_.resize(picks.size());
  std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
  for (const Pick& pick : picks) rows_[static_cast<size_t>(next[pick.expert]++)] = pick.routed;
}

}  // namespace bicache
