#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <map>
#include <random>
#include <thread>

#include "cache/discovery.h"
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
PrefixKey key(const Ids& ids, Source source = Source::alone, const char* salt = "") {
  return {ids, source, salt};
}
int64_t bytes(const Ids& ids, int kv_layers, int joins) {
  return static_cast<int64_t>(ids.size()) * (kv_layers * 2 * kKv * 4 + joins * kDim * 4 + 4);
}

TEST(PrefixStore, FindsExactIdsOnly) {
  PrefixStore store(1 << 20);
  const EntryNeeds needs{Source::alone, 2, {2}};
  store.insert(key(Ids{1, 2, 3}, Source::alone), entry({1, 2, 3}, needs));
  EXPECT_NE(store.find(key(Ids{1, 2, 3}), needs), nullptr);
  EXPECT_EQ(store.find(key(Ids{1, 2}), needs), nullptr);  // the head of a longer one saw the rest
  EXPECT_EQ(store.find(key(Ids{1, 2, 3, 4}), needs), nullptr);
  EXPECT_EQ(store.find(key(Ids{1, 2, 4}), needs), nullptr);
  EXPECT_EQ(store.find(key(Ids{1, 2, 3}, Source::first_request), {Source::first_request, 2, {2}}),
            nullptr);
  EXPECT_EQ(store.stats().hits, 1);
  EXPECT_EQ(store.stats().misses, 4);
  EXPECT_EQ(store.stats().size_bytes, bytes({1, 2, 3}, 2, 1));
}

TEST(PrefixStore, AnEntryServesWhatItHolds) {
  PrefixStore store(1 << 20);
  store.insert(key(Ids{1}, Source::alone), entry({1}, {Source::alone, 3, {3}}));
  EXPECT_NE(store.find(key(Ids{1}), {Source::alone, 2, {}}), nullptr);
  EXPECT_EQ(store.find(key(Ids{1}), {Source::alone, 2, {2}}), nullptr);
  EXPECT_EQ(store.find(key(Ids{1}), {Source::alone, 4, {}}), nullptr);
  const EntryNeeds wider = store.widened(key(Ids{1}), {Source::alone, 2, {2}});
  EXPECT_EQ(wider.kv_layers, 3);
  EXPECT_EQ(wider.joins, (std::vector<int>{2, 3}));
  store.insert(key(Ids{1}, Source::alone), entry({1}, wider));
  EXPECT_EQ(store.stats().entries, 1);  // in place of the narrower one
  EXPECT_EQ(store.stats().size_bytes, bytes({1}, 3, 2));
  EXPECT_NE(store.find(key(Ids{1}), {Source::alone, 2, {2}}), nullptr);
}

TEST(PrefixStore, EvictsTheLeastRecentlyUsedWithinItsBudget) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(2 * bytes({0}, 1, 0));
  for (const int32_t id : {1, 2}) store.insert(key(Ids{id}, Source::alone), entry({id}, needs));
  const auto held = store.find(key(Ids{1}), needs);  // 2 is now the oldest
  store.insert(key(Ids{3}, Source::alone), entry({3}, needs));
  EXPECT_EQ(store.find(key(Ids{2}), needs), nullptr);
  EXPECT_NE(store.find(key(Ids{1}), needs), nullptr);
  EXPECT_NE(store.find(key(Ids{3}), needs), nullptr);
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
  store.insert(key(Ids{1, 2}, Source::alone), entry({1, 2}, needs));
  EXPECT_EQ(store.stats().entries, 0);
  EXPECT_EQ(store.stats().refused, 1);
  EXPECT_THROW(PrefixStore(-1), std::invalid_argument);
}

TEST(PrefixStore, ARefusedEntryLeavesTheOlderOneAlone) {
  PrefixStore store(bytes({1}, 1, 0));
  const EntryNeeds narrow{Source::alone, 1, {}}, wide{Source::alone, 2, {}};
  store.insert(key(Ids{1}, Source::alone), entry({1}, narrow));
  store.insert(key(Ids{1}, Source::alone), entry({1}, wide));
  EXPECT_EQ(store.stats().refused, 1);
  EXPECT_NE(store.find(key(Ids{1}), narrow), nullptr);
}

TEST(PrefixStore, WhatARequestHoldsIsFoundUntilItEnds) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(0);
  auto held = std::shared_ptr<const PrefixEntry>(entry({1}, needs));
  store.insert(key(Ids{1}, Source::alone), held);
  EXPECT_EQ(store.find(key(Ids{1}), needs), held);
  EXPECT_EQ(store.stats().entries, 0);
  EXPECT_EQ(store.stats().size_bytes, 0);
  held = nullptr;
  EXPECT_EQ(store.find(key(Ids{1}), needs), nullptr);
}

TEST(PrefixStore, EqualHashesAreToldApartByIdsAndSalt) {
  PrefixStore store(1 << 20, 0);  // every hash is 0
  const EntryNeeds needs{Source::alone, 1, {}};
  const auto a = entry({1}, needs), b = entry({2}, needs), c = entry({1}, needs);
  store.insert(key(Ids{1}), a);
  store.insert(key(Ids{2}), b);
  store.insert(key(Ids{1}, Source::alone, "tenant"), c);
  EXPECT_EQ(store.stats().entries, 3);
  EXPECT_EQ(store.find(key(Ids{1}), needs), a);
  EXPECT_EQ(store.find(key(Ids{2}), needs), b);
  EXPECT_EQ(store.find(key(Ids{1}, Source::alone, "tenant"), needs), c);
  EXPECT_EQ(store.find(key(Ids{3}), needs), nullptr);
}

TEST(PrefixStore, SaltsNeverShare) {
  PrefixStore store(1 << 20);
  const EntryNeeds needs{Source::alone, 1, {}};
  store.insert(key(Ids{1, 2}, Source::alone, "a"), entry({1, 2}, needs));
  EXPECT_EQ(store.find(key(Ids{1, 2}), needs), nullptr);
  EXPECT_EQ(store.find(key(Ids{1, 2}, Source::alone, "b"), needs), nullptr);
  EXPECT_NE(store.find(key(Ids{1, 2}, Source::alone, "a"), needs), nullptr);
  EXPECT_EQ(store.longest(Ids{1, 2, 3}, "b", 3), 0);
  EXPECT_EQ(store.longest(Ids{1, 2, 3}, "a", 3), 2);
  EXPECT_TRUE(store.widened(key(Ids{1, 2}, Source::alone, "b"), {}).nothing());
}

TEST(PrefixStore, PinnedEntriesStay) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(2 * bytes({0}, 1, 0));
  store.insert(key(Ids{1}), entry({1}, needs));
  auto held = store.find(key(Ids{1}), needs);
  store.insert(key(Ids{2}), entry({2}, needs));
  store.insert(key(Ids{3}), entry({3}, needs));  // 2 goes, though 1 is older
  EXPECT_EQ(store.stats().pinned, 1);
  EXPECT_EQ(store.find(key(Ids{2}), needs), nullptr);
  EXPECT_EQ(store.find(key(Ids{1}), needs), held);
  const auto also = store.find(key(Ids{3}), needs);
  store.insert(key(Ids{4}), entry({4}, needs));  // nothing can go
  EXPECT_EQ(store.stats().refused, 1);
  EXPECT_EQ(store.stats().evictions, 1);
  EXPECT_EQ(store.stats().entries, 2);
  held = nullptr;
  store.insert(key(Ids{5}), entry({5}, needs));
  EXPECT_EQ(store.find(key(Ids{1}), needs), nullptr);
  EXPECT_EQ(store.stats().entries, 2);
}

TEST(PrefixStore, APinnedEntryIsReplacedByAWiderOne) {
  const EntryNeeds narrow{Source::alone, 1, {}}, wide{Source::alone, 2, {}};
  PrefixStore store(bytes({1}, 2, 0));
  store.insert(key(Ids{1}), entry({1}, narrow));
  const auto held = store.find(key(Ids{1}), narrow);
  EXPECT_FALSE(store.keeps(key(Ids{1}), wide));
  store.insert(key(Ids{1}), entry({1}, wide));
  EXPECT_TRUE(store.keeps(key(Ids{1}), wide));
  EXPECT_EQ(store.stats().refused, 0);
  EXPECT_EQ(store.stats().entries, 1);
  PrefixStore none(0);  // what is held only is not kept
  const auto refused = std::shared_ptr<const PrefixEntry>(entry({1}, narrow));
  none.insert(key(Ids{1}), refused);
  EXPECT_NE(none.find(key(Ids{1}), narrow), nullptr);
  EXPECT_FALSE(none.keeps(key(Ids{1}), narrow));
}

TEST(PrefixStore, LongestIsAWholeEntry) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(1 << 20);
  for (const Ids& ids : {Ids{1, 2}, Ids{1, 2, 3, 4}, Ids{1, 5}})
    store.insert(key(ids), entry(ids, needs));
  store.insert(key(Ids{1, 2, 3}, Source::first_request), entry({1, 2, 3}, needs));
  const Ids prompt = {1, 2, 3, 4, 9};
  EXPECT_EQ(store.longest(prompt, "", 5), 4);
  EXPECT_EQ(store.longest(prompt, "", 3), 2);  // not the head of the longer one
  EXPECT_EQ(store.longest(Ids{1, 2, 3}, "", 3), 2);
  EXPECT_EQ(store.longest(Ids{2}, "", 1), 0);
  EXPECT_EQ(store.longest(Ids{1}, "", 9), 0);  // shorter than what is asked for
}

TEST(PrefixEntry, HalfPrecisionRounds) {
  const EntryNeeds needs{Source::alone, 1, {1}};
  PrefixEntry half(1, kKv, kDim, needs, {DType::bf16, DType::bf16});
  EXPECT_EQ(2 * half.size_bytes(), PrefixEntry(1, kKv, kDim, needs).size_bytes());
  const float k[kKv] = {1, 1.00390625f, -3, 0}, v[kKv] = {0.1f, 2, 3, 4};
  half.put_kv(0, 0, k, v);
  float got[2 * kKv];
  half.get_kv(0, 0, got);
  EXPECT_EQ(got[1], 1.0f);  // 1 + 2^-8 rounds to even
  EXPECT_EQ(got[2], -3.0f);
  EXPECT_EQ(got[kKv], to_float(to_bf16(0.1f)));
}

// Every combination of types: what it takes, where its rows are, and what becomes of a value.
TEST(PrefixEntry, HoldsKAndVAndResidualsInTypesOfTheirOwn) {
  const EntryNeeds needs{Source::alone, 2, {1, 2, 3}};
  const std::vector<float> x = {0.1f, -3.3f, 1e-3f, 7}, y = {2.2f, 0, -0.7f, 1e9f};
  std::vector<float> h(kDim, 1.001f), got(2 * kKv), got_h(kDim);
  for (const DType kv : {DType::f32, DType::bf16}) {
    for (const DType residual : {DType::f32, DType::bf16}) {
      const EntryTypes types{kv, residual};
      PrefixEntry e(5, kKv, kDim, needs, types);
      EXPECT_EQ(e.types(), types);
      const int64_t want = 5 * (2 * 2 * kKv * size_bytes(kv) + 3 * kDim * size_bytes(residual));
      EXPECT_EQ(e.size_bytes(), want);
      EXPECT_EQ(PrefixEntry::size_bytes(5, kKv, kDim, needs, types), want);
      e.put_kv(1, 4, x.data(), y.data());
      e.put_h(3, 4, h.data());
      EXPECT_EQ(e.k(1, 4), static_cast<const std::byte*>(e.kv(1)) + 4 * 2 * kKv * size_bytes(kv));
      EXPECT_EQ(e.v(1, 4), static_cast<const std::byte*>(e.k(1, 4)) + kKv * size_bytes(kv));
      e.get_kv(1, 4, got.data());
      e.get_h(3, 4, got_h.data());
      for (int64_t i = 0; i < kKv; ++i) {
        EXPECT_EQ(got[i], kv == DType::f32 ? x[i] : to_float(to_bf16(x[i])));
        EXPECT_EQ(got[kKv + i], kv == DType::f32 ? y[i] : to_float(to_bf16(y[i])));
      }
      EXPECT_EQ(got_h[0], residual == DType::f32 ? h[0] : to_float(to_bf16(h[0])));
      // as a cache has them in bf16: once rounded, they stay
      const std::vector<bf16> k(kKv, to_bf16(0.1f)), v(kKv, to_bf16(-5.3f));
      e.put_kv(0, 2, k.data(), v.data(), DType::bf16);
      e.get_kv(0, 2, got.data());
      EXPECT_EQ(got[3], to_float(k[3]));
      EXPECT_EQ(got[kKv], to_float(v[0]));
    }
  }
}

TEST(PrefixEntry, TakesKAndVAsTheModelHasThem) {
  EXPECT_EQ(entry_types(DType::f32, DType::f32), (EntryTypes{DType::f32, DType::f32}));
  EXPECT_EQ(entry_types(DType::f32, DType::bf16), (EntryTypes{DType::bf16, DType::bf16}));
  EXPECT_EQ(entry_types(DType::bf16, DType::f32), (EntryTypes{DType::bf16, DType::f32}));
  EXPECT_EQ(entry_types(DType::bf16, DType::bf16), (EntryTypes{DType::bf16, DType::bf16}));
}

// 10,000 operations from four threads: the budget holds at every moment, and what a thread holds
// is found again.
TEST(PrefixStore, RandomOperationsFromFourThreads) {
  const EntryNeeds needs{Source::alone, 1, {}};
  const int64_t budget = 6 * bytes({0, 0}, 1, 0);
  PrefixStore store(budget);
  std::atomic<int> wrong = 0;
  const auto work = [&](unsigned seed) {
    std::mt19937 rng(seed);
    std::vector<std::pair<Ids, PrefixStore::Entry>> held;
    for (int i = 0; i < 2500; ++i) {
      const Ids ids(1 + rng() % 3, static_cast<int32_t>(rng() % 6));
      const char* salt = rng() % 2 == 0 ? "" : "other";
      switch (rng() % 6) {
        case 0:
        case 1:
          store.insert(key(ids, Source::alone, salt), entry(ids, needs));
          break;
        case 2:
          if (held.size() < 2 && *salt == '\0') {
            if (auto e = store.find(key(ids), needs)) held.emplace_back(ids, std::move(e));
          }
          break;
        case 3:
          if (!held.empty()) held.pop_back();
          break;
        case 4: {
          const auto s = store.stats();
          if (s.size_bytes > budget || s.size_bytes < 0 || s.entries > 12) ++wrong;
          int64_t sum = 0;
          for (const auto& item : store.items()) sum += item.size_bytes();
          if (sum > budget) ++wrong;
          break;
        }
        default:
          store.longest(ids, salt, 3);
      }
      for (const auto& [mine, e] : held) {  // nobody evicts or replaces it
        if (store.find(key(mine), needs) != e) ++wrong;
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) threads.emplace_back(work, t);
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  const auto s = store.stats();
  EXPECT_GT(s.evictions, 100);
  EXPECT_GT(s.hits, 100);
  int64_t sum = 0;
  for (const auto& item : store.items()) sum += item.size_bytes();
  EXPECT_EQ(s.size_bytes, sum);
}

TEST(Discovery, FindsWhatPromptsHaveInCommon) {
  PrefixStore store(1 << 20);
  Discovery discovery;
  const DiscoveryRule rule{3, 3};
  const auto prefix_of = [&](const Ids& ids, const char* salt = "") {
    return discovery.prefix_of(ids, salt, static_cast<int64_t>(ids.size()), rule, store);
  };
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 10}), 0);
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 11}), 0);  // the second of three
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 10}, "other"), 0);
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 12}), 4);
  EXPECT_EQ(prefix_of({1, 2, 13}), 0);  // shorter than min_tokens
  const EntryNeeds needs{Source::alone, 1, {}};
  store.insert(key(Ids{1, 2}), entry({1, 2}, needs));
  EXPECT_EQ(prefix_of({1, 2, 14}), 2);        // a whole stored entry, however short
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 15}), 2);  // four in common are not min_tokens longer
  EXPECT_EQ(prefix_of({7, 1, 2}), 0);
  for (int i = 0; i < 2; ++i) prefix_of({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 5, 7}), 5);
  EXPECT_EQ(discovery.prefix_of(Ids{1, 2, 3, 4, 5, 8}, "", 4, rule, store), 2);
  discovery.clear();
  EXPECT_EQ(prefix_of({1, 2, 3, 4, 5, 7}), 2);
}

TEST(Discovery, RemembersTheLastPromptsOnly) {
  PrefixStore store(1 << 20);
  Discovery discovery;
  const DiscoveryRule rule{3, 2};
  const auto prefix_of = [&](const Ids& ids) {
    return discovery.prefix_of(ids, "", static_cast<int64_t>(ids.size()), rule, store);
  };
  for (const int others : {255, 256}) {
    discovery.clear();
    prefix_of({1, 2, 3, 4});
    for (int i = 0; i < others; ++i) prefix_of({100 + i});
    EXPECT_EQ(prefix_of({1, 2, 3, 5}), others == 255 ? 3 : 0);
  }
  discovery.clear();
  prefix_of({1, 2, 3, 4});
  prefix_of(Ids((1 << 20) - 4, 9));  // a million tokens in all
  EXPECT_EQ(prefix_of({1, 2, 3, 5}), 3);
  discovery.clear();
  prefix_of({1, 2, 3, 4});
  prefix_of(Ids((1 << 20) - 3, 9));
  EXPECT_EQ(prefix_of({1, 2, 3, 5}), 0);
}

TEST(PrefixStore, ManyThreads) {
  const EntryNeeds needs{Source::alone, 1, {}};
  PrefixStore store(3 * bytes({0}, 1, 0));
  const auto work = [&](int t) {
    for (int i = 0; i < 500; ++i) {
      const Ids ids = {(t + i) % 5};
      if (!store.find(key(ids), needs)) store.insert(key(ids), entry(ids, needs));
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

class LayerCacheTest : public testing::TestWithParam<DType> {
 protected:
  const DType kv = GetParam();

  void put(void* at, float x) const { convert(&x, DType::f32, 1, at, kv); }
  float get(const void* at) const {
    float x;
    convert(at, kv, 1, &x, DType::f32);
    return x;
  }
};

INSTANTIATE_TEST_SUITE_P(, LayerCacheTest, testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST_P(LayerCacheTest, KeepsWhatItWasAskedTo) {
  // 2 layers, 3 rows; row 0 keeps K/V in layer 1 only, row 2 in both; row 1 nowhere
  const Kept kept{{{RowSet::span(0, 1), 1}, {RowSet::span(2, 3), 0}},
                  {{RowSet::span(2, 3), 1}},
                  {{RowSet::span(1, 3), 1}}};
  LayerCache cache(2, 3, kKv, kDim, kept, kv);
  EXPECT_EQ(cache.kv_dtype(), kv);
  for (int layer = 0; layer < 2; ++layer) {
    cache.begin_layer(layer);
    for (int64_t row = 0; row < 3; ++row) {
      put(cache.k(layer, row), static_cast<float>(10 * layer + row));
      put(cache.v(layer, row), static_cast<float>(100 + 10 * layer + row));
      cache.recomputed(layer, row);
      cache.wrote(layer, row);
    }
    const void *k[3], *v[3];
    cache.key_rows(layer, nullptr, 0, k, v);
    for (int64_t row = 0; row < 3; ++row) {
      EXPECT_EQ(get(k[row]), static_cast<float>(10 * layer + row));
      EXPECT_EQ(get(v[row]), static_cast<float>(100 + 10 * layer + row));
    }
  }
  for (int layer = 0; layer < 2; ++layer) cache.begin_layer(layer);
  EXPECT_FALSE(cache.own(0, 0));
  EXPECT_TRUE(cache.own(1, 0));
  EXPECT_FALSE(cache.own(0, 1));
  EXPECT_FALSE(cache.own(1, 1));
  EXPECT_TRUE(cache.own(0, 2));
  EXPECT_EQ(get(cache.k(0, 2)), 2.0f);
  EXPECT_EQ(cache.delta(0, 2), nullptr);
  EXPECT_NE(cache.delta(1, 2), nullptr);
  EXPECT_EQ(cache.delta(1, 1), nullptr);
  put(cache.v(1, 2), 7);
  EXPECT_EQ(get(cache.recomputed_v(1, 2)), 112.0f);
  EXPECT_EQ(get(cache.recomputed_v(1, 1)), 111.0f);
  EXPECT_EQ(cache.recomputed_v(0, 2), nullptr);
  const void *k[3], *v[3];
  EXPECT_THROW(cache.key_rows(0, nullptr, 0, k, v), std::invalid_argument);
  cache.forget_prefix(1);
  EXPECT_FALSE(cache.own(1, 0));
  EXPECT_TRUE(cache.own(1, 2));
}

TEST_P(LayerCacheTest, TakesTheBytesOfItsTypes) {
  const Kept kept{{{RowSet::span(0, 2), 1}, {RowSet::span(2, 5), 3}},
                  {{RowSet::span(4, 5), 0}},
                  {{RowSet::span(1, 4), 2}}};
  const LayerCache cache(4, 6, kKv, kDim, kept, kv);
  const int64_t kept_kv = 2 * 3 + 3, scratch = 6, deltas = 4, values = 3 * 2;
  EXPECT_EQ(cache.size_bytes(),
            (2 * (kept_kv + scratch) + values) * kKv * size_bytes(kv) + deltas * kDim * 4 + 4 * 6);
  EXPECT_EQ(LayerCache::size_bytes(4, 6, kKv, kDim, kept, kv), cache.size_bytes());
}

// Rows do not overlap, and what nobody wrote is no number.
TEST_P(LayerCacheTest, GivesEveryRowRoomOfItsOwn) {
  LayerCache cache(3, 5, kKv, kDim, Kept::everything(5), kv);
  std::map<const std::byte*, int64_t> all;  // address -> bytes
  const auto add = [&](const void* at, int64_t size) {
    EXPECT_TRUE(all.emplace(static_cast<const std::byte*>(at), size).second);
  };
  for (int layer = 0; layer < 3; ++layer) {
    for (int64_t row = 0; row < 5; ++row) {
      EXPECT_TRUE(std::isnan(cache.delta(layer, row)[kDim - 1]));
      EXPECT_TRUE(std::isnan(get(cache.recomputed_v(layer, row))));
      add(cache.k(layer, row), kKv * size_bytes(kv));
      add(cache.v(layer, row), kKv * size_bytes(kv));
      add(cache.recomputed_v(layer, row), kKv * size_bytes(kv));
      add(cache.delta(layer, row), kDim * 4);
    }
  }
  for (auto it = all.begin(); std::next(it) != all.end(); ++it)
    EXPECT_LE(it->first + it->second, std::next(it)->first);
}

TEST_P(LayerCacheTest, LendsFromThePrefixEntry) {
  const PrefixEntry lent(2, kKv, kDim, {Source::alone, 1, {}}, {kv, DType::f32});
  LayerCache cache(2, 3, kKv, kDim, {{{RowSet::span(2, 3), 0}}, {}}, kv);
  cache.wrote(0, 2);
  const void *k[3], *v[3];
  EXPECT_TRUE(cache.borrows(0, 2));
  cache.key_rows(0, lent.kv(0), lent.rows(), k, v);
  EXPECT_EQ(k[1], lent.k(0, 1));
  EXPECT_EQ(v[0], lent.v(0, 0));
  EXPECT_EQ(k[2], cache.k(0, 2));
  EXPECT_EQ(v[2], cache.v(0, 2));
  cache.wrote(1, 2);
  EXPECT_THROW(cache.key_rows(1, nullptr, 0, k, v), std::invalid_argument);
  cache.wrote(0, 0);
  cache.wrote(0, 1);
  EXPECT_FALSE(cache.borrows(0, 2));
}

}  // namespace
}  // namespace bicache
