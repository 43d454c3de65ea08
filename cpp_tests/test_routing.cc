// Which experts run which rows, against a naive twin in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "model/routing.h"
#include "support.h"

namespace bicache {
namespace {

View<const float> view(const std::vector<float>& logits, int64_t experts) {
  return {logits.data(), static_cast<int64_t>(logits.size()) / experts, experts};
}

struct Naive {
  std::vector<int64_t> experts;
  std::vector<double> weights;
};

// Takes the best of what is left, time after time.
Naive naive(const float* logits, int64_t experts, int64_t per_row) {
  double sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += std::exp(static_cast<double>(logits[e]));
  std::vector<bool> taken(static_cast<size_t>(experts));
  Naive out;
  for (int64_t i = 0; i < per_row; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    }
    taken[best] = true;
    out.experts.push_back(best);
    out.weights.push_back(std::exp(static_cast<double>(logits[best])) / sum);
  }
  return out;
}

TEST(Routing, EqualsTheNaiveTwin) {
  for (const auto& [experts, per_row] : {std::pair{64, 8}, {8, 2}, {5, 5}, {7, 1}, {1, 1}}) {
    constexpr int64_t kRows = 37;
    const auto logits = random_floats(kRows * experts, 5, 4);
    const Routing routing(view(logits, experts), per_row);
    int64_t all = 0;
    for (int64_t e = 0; e < experts; ++e) {
      int64_t before = -1;
      for (const RoutedRow& r : routing.rows_of(e)) {
        EXPECT_LT(before, r.row);
        before = r.row;
        const Naive want = naive(logits.data() + r.row * experts, experts, per_row);
        const auto at = std::find(want.experts.begin(), want.experts.end(), e);
        ASSERT_NE(at, want.experts.end()) << "row " << r.row << " expert " << e;
        EXPECT_NEAR(r.weight, want.weights[at - want.experts.begin()], 1e-7);
        ++all;
      }
    }
    EXPECT_EQ(all, kRows * per_row);
  }
}

TEST(Routing, TiesGoToTheLowerExperts) {
  const std::vector<float> logits = {0, 3, 3, 3, 1, 1, 1, 1};
  const Routing routing(view(logits, 4), 2);
  const auto rows = [&](int64_t e) {
    std::vector<int64_t> found;
    for (const RoutedRow& r : routing.rows_of(e)) found.push_back(r.row);
    return found;
  };
  EXPECT_EQ(rows(0), std::vector<int64_t>{1});
  EXPECT_EQ(rows(1), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(rows(2), std::vector<int64_t>{0});
  EXPECT_TRUE(rows(3).empty());
  EXPECT_EQ(routing.rows_of(0)[0].weight, 0.25f);
}

TEST(Routing, ARowDependsOnItselfAlone) {
  constexpr int64_t kExperts = 16, kRows = 9;
  const auto logits = random_floats(kRows * kExperts, 6, 3);
  const Routing together(view(logits, kExperts), 4);
  for (int64_t row = 0; row < kRows; ++row) {
    const std::vector<float> mine(logits.begin() + row * kExperts,
                                  logits.begin() + (row + 1) * kExperts);
    const Routing alone(view(mine, kExperts), 4);
    for (int64_t e = 0; e < kExperts; ++e) {
      const auto all = together.rows_of(e);
      const auto at =
          std::find_if(all.begin(), all.end(), [&](const RoutedRow& r) { return r.row == row; });
      ASSERT_EQ(at != all.end(), !alone.rows_of(e).empty());
      if (at != all.end()) {
        EXPECT_TRUE(same_bits(&at->weight, &alone.rows_of(e)[0].weight, 1));
      }
    }
  }
}

TEST(Routing, LargeLogitsDoNotOverflowAndNaNShows) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const std::vector<float> large = {3e38f, -3e38f, 2e38f};
  EXPECT_EQ(Routing(view(large, 3), 1).rows_of(0)[0].weight, 1);
  for (const std::vector<float>& bad :
       {std::vector<float>{nan, 1, 2}, {nan, nan, nan}, {inf, inf, 0}, {-inf, -inf, -inf}}) {
    const Routing routing(view(bad, 3), 2);
    int64_t rows = 0;
    for (int64_t e = 0; e < 3; ++e) {
      for (const RoutedRow& r : routing.rows_of(e)) {
        ++rows;
        EXPECT_TRUE(std::isnan(r.weight));
      }
    }
    EXPECT_EQ(rows, 2);
  }
}

TEST(Routing, NoRows) {
  const Routing routing(View<const float>(nullptr, 0, 3), 2);
  for (int64_t e = 0; e < 3; ++e) EXPECT_TRUE(routing.rows_of(e).empty());
}

}  // namespace
}  // namespace bicache
