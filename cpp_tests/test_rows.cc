// RowSet against std::set, on random sets.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "cache/rows.h"

namespace bicache {
namespace {

using Set = std::set<int64_t>;

Set random_set(std::mt19937& rng) {
  Set s;
  const int count = static_cast<int>(rng() % 12);
  for (int i = 0; i < count; ++i) s.insert(static_cast<int64_t>(rng() % 16));
  return s;
}

RowSet rows(const Set& s) { return RowSet::of({s.begin(), s.end()}); }
Set set(const RowSet& r) {
  const auto list = r.list();
  return {list.begin(), list.end()};
}

TEST(RowSet, EqualsStdSet) {
  std::mt19937 rng(1);
  for (int i = 0; i < 5000; ++i) {
    const Set a = random_set(rng), b = random_set(rng);
    Set both = a, without, common;
    both.insert(b.begin(), b.end());
    for (const int64_t x : a) (b.contains(x) ? common : without).insert(x);
    ASSERT_EQ(set(rows(a)), a);
    ASSERT_EQ(rows(a).size(), static_cast<int64_t>(a.size()));
    ASSERT_EQ(set(rows(a).unite(rows(b))), both);
    ASSERT_EQ(set(rows(a).minus(rows(b))), without);
    ASSERT_EQ(set(rows(a).intersect(rows(b))), common);
    ASSERT_EQ(rows(a).contains(rows(b)), without.size() + b.size() == a.size());
    ASSERT_EQ(rows(a) == rows(b), a == b);  // spans are canonical
    for (int64_t x = 0; x < 16; ++x) ASSERT_EQ(rows(a).contains(x), a.contains(x));
  }
}

TEST(RowSet, Spans) {
  EXPECT_TRUE(RowSet::span(3, 3).empty());
  EXPECT_TRUE(RowSet::span(4, 3).empty());
  EXPECT_EQ(RowSet::span(0, 3).unite(RowSet::span(3, 5)).spans().size(), 1u);
  EXPECT_EQ(RowSet::of({7, 1, 2, 2, 3}).str(), "1..3 7");
  EXPECT_EQ(RowSet().str(), "no rows");
}

}  // namespace
}  // namespace bicache
