// Which experts run which rows: the router of a mixture of experts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/view.h"

namespace bicache {

// A row of one expert, and what its output is multiplied by.
struct RoutedRow {
  int64_t row;
  float weight;
};

// For every row, softmax over all experts; the `per_row` most probable ones run it (ties: the lower
// expert), with their probabilities as weights, which are not made to add up to 1. A row's experts
// and weights follow from its logits alone. NaN among the logits: weights of NaN.
class Routing {
 public:
  // logits [rows, experts]; 1 <= per_row <= experts.
  Routing(View<const float> logits, int64_t per_row);

  // Ascending.
  std::span<const RoutedRow> rows_of(int64_t expert) const {
    return {rows_.data() + begin_[expert], rows_.data() + begin_[expert + 1]};
  }

 private:
  std::vector<RoutedRow> rows_;  // expert by expert
  std::vector<int64_t> begin_;   // [experts + 1], of each expert's
};

}  // namespace bicache
