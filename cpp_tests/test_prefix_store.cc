#include <gtest/gtest.h>

#include <thread>

#include "cache/layer_cache.h"
#include "cache/prefix_store.h"

namespace bicache {
namespace {

constexpr int64_t kKv = 4, kDim = 8;
using Ids = std::vector<int32_t>;
using Source = EntryNeeds::Source;

std::shared_ptr<PrefixEntry> entry(const Ids& ids, const EntryNeeds& needs) {
  return std::make_shared<PrefixEntry>(static_cast<int64_t>(ids.size()), kKv, kDim, needs);
}
int64_t bytes(const Ids& ids, int kv_layers, int joins) {
  return static_cast<int64_t>(ids.size()) * (kv_layers * 2 * kKv * 4 + joins * kDim * 4 + 4);
}

TEST(PrefixStore, FindsExactIdsOnly) {
  PrefixStore store(1 << 20);
  const EntryNeeds needs{Source::alone, 2, {2}};
  store.insert(Ids{1, 2, 3}, Source::alone, entry({1, 2, 3}, needs));
  EXPECT_NE(store.find(Ids{1, 2, 3}, needs), nullptr);
  EXPECT_EQ(store.find(Ids{1, 2}, needs), nullptr);  // the head of a longer one saw the rest
  EXPECT_EQ(store.find(Ids{1, 2, 3, 4}, needs), nullptr);
  EXPECT_EQ(store.find(Ids{1, 2, 4}, needs), nullptr);
  EXPECT_EQ(store.find(Ids{1, 2, 3}, {Source::first_request, 2, {2}}), nullptr);
  EXPECT_EQ(store.stats().hits, 1);
  EXPECT_EQ(store.stats().misses, 4);
  EXPECT_EQ(store.stats().size_bytes, bytes({1, 2, 3}, 2, 1));
}

TEST(PrefixStore, AnEntryServesWhatItHolds) {
  PrefixStore store(1 << 20);
  store.insert(Ids{1}, Source::alone, entry({1}, {Source::alone, 3, {3}}));
  EXPECT_NE(store.find(Ids{1}, {Source::alone, 2, {}}), nullptr);
  EXPECT_EQ(store.find(Ids{1}, {Source::alone, 2, {2}}), nullptr);
  EXPECT_EQ(store.find(Ids{1}, {Source::alone, 4, {}}), nullptr);
  const EntryNeeds wider = store.widened(Ids{1}, {Source::alone, 2, {2}});
  EXPECT_EQ(wider.kv_layers, 3);
  EXPECT_EQ(wider.joins, (std::vector<int>{2, 3}));
  store.insert(Ids{1}, Source::alone, entry({1}, wider));
  EXPECT_EQ(store.stats().entries, 1);  // in place of the narrower one
  EXPECT_EQ(store.stats().size_bytes, bytes({1}, 3, 2));
  EXPECT_NE(store.find(Ids{1}, {Source::alone, 2, {2}}), nullptr);
}

TEST(PrefixStore, EvictsTheLeastRecentlyUsedWithinItsBudget) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(2 * bytes({0}, 1, 0));
  for (const int32_t id : {1, 2}) store.insert(Ids{id}, Source::alone, entry({id}, needs));
  const auto held = store.find(Ids{1}, needs);  // 2 is now the oldest
  store.insert(Ids{3}, Source::alone, entry({3}, needs));
  EXPECT_EQ(store.find(Ids{2}, needs), nullptr);
  EXPECT_NE(store.find(Ids{1}, needs), nullptr);
  EXPECT_NE(store.find(Ids{3}, needs), nullptr);
  EXPECT_EQ(store.stats().evictions, 1);
  EXPECT_LE(store.stats().size_bytes, store.stats().budget_bytes);
  store.clear();
  EXPECT_EQ(store.stats().entries, 0);
  EXPECT_EQ(store.stats().size_bytes, 0);
  EXPECT_EQ(store.stats().hits, 0);
  EXPECT_EQ(held->rows(), 1);  // a request that holds it keeps it alive
}

TEST(PrefixStore, RefusesWhatIsLargerThanTheBudget) {
  PrefixStore store(10);
  const EntryNeeds needs{Source::alone, 1, {}};
  store.insert(Ids{1, 2}, Source::alone, entry({1, 2}, needs));
  EXPECT_EQ(store.stats().entries, 0);
  EXPECT_EQ(store.stats().refused, 1);
  EXPECT_THROW(PrefixStore(-1), std::invalid_argument);
}

TEST(PrefixStore, ARefusedEntryLeavesTheOlderOneAlone) {
  PrefixStore store(bytes({1}, 1, 0));
  const EntryNeeds narrow{Source::alone, 1, {}}, wide{Source::alone, 2, {}};
  store.insert(Ids{1}, Source::alone, entry({1}, narrow));
  store.insert(Ids{1}, Source::alone, entry({1}, wide));
  EXPECT_EQ(store.stats().refused, 1);
  EXPECT_NE(store.find(Ids{1}, narrow), nullptr);
}

TEST(PrefixStore, WhatARequestHoldsIsFoundUntilItEnds) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(0);
  auto held = std::shared_ptr<const PrefixEntry>(entry({1}, needs));
  store.insert(Ids{1}, Source::alone, held);
  EXPECT_EQ(store.find(Ids{1}, needs), held);
  EXPECT_EQ(store.stats().entries, 0);
  EXPECT_EQ(store.stats().size_bytes, 0);
  held = nullptr;
  EXPECT_EQ(store.find(Ids{1}, needs), nullptr);
}

TEST(PrefixStore, ManyThreads) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(3 * bytes({0}, 1, 0));
  const auto work = [&](int t) {
    for (int i = 0; i < 500; ++i) {
      const Ids ids = {(t + i) % 5};
      if (!store.find(ids, needs)) store.insert(ids, Source::alone, entry(ids, needs));
    }
  };
  std::thread a(work, 0), b(work, 2);
  a.join();
  b.join();
  const auto s = store.stats();
  EXPECT_LE(s.size_bytes, s.budget_bytes);
  EXPECT_EQ(s.hits + s.misses, 1000);
  EXPECT_EQ(s.size_bytes, s.entries * bytes({0}, 1, 0));
}

TEST(LayerCache, KeepsWhatItWasAskedTo) {
  // 2 layers, 3 rows; row 0 keeps K/V in layer 1 only, row 2 in both; row 1 nowhere
  LayerCache cache(2, 3, kKv, kDim,
                   {{{RowSet::span(0, 1), 1}, {RowSet::span(2, 3), 0}}, {{RowSet::span(2, 3), 1}}});
  for (int layer = 0; layer < 2; ++layer) {
    cache.begin_layer(layer);
    for (int64_t row = 0; row < 3; ++row) {
      cache.k(layer, row)[0] = static_cast<float>(10 * layer + row);
      cache.v(layer, row)[0] = static_cast<float>(100 + 10 * layer + row);
      cache.wrote(layer, row);
    }
    const float *k[3], *v[3];
    cache.key_rows(layer, nullptr, k, v);
    for (int64_t row = 0; row < 3; ++row) {
      EXPECT_EQ(*k[row], static_cast<float>(10 * layer + row));
      EXPECT_EQ(*v[row], static_cast<float>(100 + 10 * layer + row));
    }
  }
  for (int layer = 0; layer < 2; ++layer) cache.begin_layer(layer);
  EXPECT_FALSE(cache.own(0, 0));
  EXPECT_TRUE(cache.own(1, 0));
  EXPECT_FALSE(cache.own(0, 1));
  EXPECT_FALSE(cache.own(1, 1));
  EXPECT_TRUE(cache.own(0, 2));
  EXPECT_EQ(cache.k(0, 2)[0], 2.0f);
  EXPECT_EQ(cache.delta(0, 2), nullptr);
  EXPECT_NE(cache.delta(1, 2), nullptr);
  EXPECT_EQ(cache.delta(1, 1), nullptr);
  const float *k[3], *v[3];
  EXPECT_THROW(cache.key_rows(0, nullptr, k, v), std::invalid_argument);
  cache.forget_prefix(1);
  EXPECT_FALSE(cache.own(1, 0));
  EXPECT_TRUE(cache.own(1, 2));
}

TEST(LayerCache, LendsFromThePrefixEntry) {
  const PrefixEntry lent(2, kKv, kDim, {Source::alone, 1, {}});
  LayerCache cache(2, 3, kKv, kDim, {{{RowSet::span(2, 3), 0}}, {}});
  cache.wrote(0, 2);
  const float *k[3], *v[3];
  cache.key_rows(0, &lent, k, v);
  EXPECT_EQ(k[1], lent.k(0, 1));
  EXPECT_EQ(v[0], lent.v(0, 0));
  EXPECT_EQ(k[2], cache.k(0, 2));
  cache.wrote(1, 2);
  EXPECT_THROW(cache.key_rows(1, &lent, k, v), std::invalid_argument);  // the entry holds one layer
}

}  // namespace
}  // namespace bicache
