// What an engine promises: identities, determinism, statistics that follow BiCache's cost model, a
// store that stays as it is.
#include "requests.h"

namespace bicache {
namespace {

TEST(Engine, IdentitySettingsEqualNone) {
  for (const Kernels* kernels : tables_under_test(kSanitized)) {
    for (const auto& [shift, kv] : {std::pair{false, DType::f32},
                                    {true, DType::f32},
                                    {false, DType::bf16},
                                    {true, DType::bf16}}) {
      TinyModel t;
      t.shift = shift;
      const auto model = t.load(*kernels, DType::f32, kv);
      const Result none = generate(engine(model), {request(t, "none", 15, 5, 8, 1)})[0];
      int tried = 0;
      for (const PolicyRow& row : policy_table()) {
        if (*row.identity == '\0') continue;
        expect_same(generate(engine(model), {request(t, row.identity, 15, 5, 8, 1)})[0], none,
                    row.identity);
        ++tried;
      }
      EXPECT_GE(tried, 2);
    }
  }
}

TEST(Engine, OfficialDepthIsStrictDepthPlusOne) {
  TinyModel t;
  const auto model = t.load();
  for (int b = 0; b < t.layers; ++b) {
    for (const char* refresh : {"1", "3", "16"}) {
      const auto spec = [&](int depth, const char* splice) {
        return "bicache:depth=" + std::to_string(depth) + ",refresh_steps=" + refresh +
               ",splice=" + splice;
      };
      const Result official =
          generate(engine(model), {request(t, spec(b, "official"), 15, 5, 8, 1)})[0];
      expect_same(generate(engine(model), {request(t, spec(b + 1, "strict"), 15, 5, 8, 1)})[0],
                  official, spec(b, "official"));
    }
  }
}

TEST(Engine, ATableMakesOneEntryForAllItsDepths) {
  TinyModel t;
  const auto e = engine(t.load());
  const std::string table = "bicache:depth=0:1/40:2/60:3";
  const auto first = generate(e, {request(t, table, 20, 4, 8, 1)})[0];    // 62 %
  const auto second = generate(e, {request(t, table, 20, 4, 20, 1)})[0];  // 45 %
  EXPECT_EQ(first.stats.depth, 3);
  EXPECT_EQ(second.stats.depth, 2);
  EXPECT_EQ(second.stats.prefix_hit, true);
  EXPECT_EQ(e->store().stats().entries, 1);
  expect_same(generate(engine(t.load()), {request(t, "bicache:depth=2", 20, 4, 20, 1)})[0], second,
              "fixed");
}

TEST(Engine, WithoutPrefixNothingIsReported) {
  TinyModel t;
  const Result r = generate(engine(t.load()), {request(t, "bicache:depth=2", 0, 9, 8, 1)})[0];
  EXPECT_EQ(r.stats.depth, -1);
  EXPECT_EQ(r.stats.refreshes, 0);
  EXPECT_EQ(r.stats.prefix_hit, std::nullopt);
}

// Rows per layer, summed over the passes: spec BiCache 3.8. s suffix rows always; n at a refresh in
// layers >= c.
TEST(Engine, RowsFollowTheCostModel) {
  TinyModel t;
  const auto model = t.load();
  const int64_t p = 21, u = 4, g = 8, n = p + u + g, s = u + g, steps = g;
  for (int b = 0; b <= t.layers; ++b) {
    for (const bool strict : {false, true}) {
      for (const int64_t refresh : {1, 3, 4, 100}) {
        const std::string spec = "bicache:depth=" + std::to_string(b) +
                                 ",refresh_steps=" + std::to_string(refresh) +
                                 ",splice=" + (strict ? "strict" : "official");
        const auto results =
            generate(engine(model), {request(t, spec, p, u, g, 1), request(t, spec, p, u, g, 2)});
        const int c = std::max(0, b - (strict ? 1 : 0));
        const int64_t refreshes = (steps + refresh - 1) / refresh;
        for (const Result& r : results) {
          EXPECT_EQ(r.stats.steps, steps);
          EXPECT_EQ(r.stats.refreshes, c < t.layers ? refreshes : 0);
          EXPECT_EQ(r.stats.depth, b);
          for (int l = 0; l < t.layers; ++l) {
            EXPECT_EQ(r.stats.work[l].rows_of(Op::attention),
                      steps * s + (l >= c ? refreshes * p : 0))
                << spec << " layer " << l;
          }
        }
        EXPECT_EQ(results[0].stats.prefix_hit, c > 0 ? std::optional(false) : std::nullopt) << spec;
        EXPECT_EQ(results[1].stats.prefix_hit, c > 0 ? std::optional(true) : std::nullopt) << spec;
        for (int l = 0; l < t.layers && c > 0;
             ++l) {  // making the entry: the prefix alone, up to the boundary
          EXPECT_EQ(results[0].stats.entry_work[l].rows_of(Op::attention), l < c ? p : 0) << spec;
        }
        EXPECT_TRUE(results[1].stats.entry_work.empty());
      }
    }
  }
  const auto none = generate(engine(model), {request(t, "none", p, u, g, 1)});
  for (int l = 0; l < t.layers; ++l)
    EXPECT_EQ(none[0].stats.work[l].rows_of(Op::attention), steps * n);
  const auto naive = generate(engine(model), {request(t, "naive", p, u, g, 1)});
  for (int l = 0; l < t.layers; ++l)
    EXPECT_EQ(naive[0].stats.work[l].rows_of(Op::attention), steps * s);
}

TEST(Engine, BatchThreadsAndOrderDoNotMatter) {
  for (const Kernels* kernels : tables_under_test(kSanitized)) {
    const TinyModel t = big_enough_for_threads();
    // K and V in bf16 with one table, which is the slowest.
    const bool first = kernels == tables_under_test(kSanitized).front();
    const auto model = t.load(*kernels, DType::f32, first ? DType::bf16 : DType::f32);
    const auto requests = crowd(t);
    // naive:source=first_request depends on who was first, by definition: give everybody the same
    // first one.
    std::vector<Result> alone;
    const auto one = engine(model);
    for (const Request& r : requests) alone.push_back(generate(one, {r})[0]);
    for (const int threads : thinned<int>({4, 2, 1})) {
      for (const int64_t batch_rows : thinned<int64_t>({100, 1, 100000})) {
        const auto together = generate(engine(model, threads), requests, batch_rows);
        for (size_t i = 0; i < requests.size(); ++i) {
          expect_same(together[i], alone[i],
                      std::string(kernels->isa) + " request " + std::to_string(i));
          for (int l = 0; l < t.layers; ++l)
            EXPECT_EQ(together[i].stats.work[l].flops, alone[i].stats.work[l].flops);
        }
      }
    }
  }
}

TEST(Engine, OrderDoesNotMatter) {
  for (const char* family : {"llada", "dream", "llada-moe"}) {
    TinyModel t;
    t.family = family;
    const auto model = t.load();
    auto requests = crowd(t);
    std::erase_if(requests, [](const Request& r) {  // who was first is what that one is about
      return r.policy->spec() == "naive:source=first_request";
    });
    const auto forwards = generate(engine(model), requests);
    std::reverse(requests.begin(), requests.end());
    const auto backwards = generate(engine(model), requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      expect_same(backwards[requests.size() - 1 - i], forwards[i], family + std::to_string(i));
    }
  }
}

// An entry outside the budget serves the requests that ride with the one that made it.
TEST(Engine, ABatchSharesAnEntryThatTheStoreRefuses) {
  TinyModel t;
  const auto e = engine(t.load(), 1, 0);
  const auto results = generate(
      e, {request(t, "bicache:depth=2", 18, 4, 8, 1), request(t, "bicache:depth=2", 18, 4, 8, 2)});
  EXPECT_EQ(results[0].stats.prefix_hit, false);
  EXPECT_EQ(results[1].stats.prefix_hit, true);
  EXPECT_EQ(e->store().stats().refused, 1);
  EXPECT_EQ(e->store().stats().size_bytes, 0);
}

TEST(Engine, StoreEntriesAreNotChangedByRequests) {
  TinyModel t;
  const auto model = t.load();
  const auto e = engine(model);
  const Request probe = request(t, "bicache:depth=2,refresh_steps=2", 18, 4, 8, 5);
  const Result before = generate(e, {probe})[0];
  generate(e, crowd(t));
  for (unsigned i = 0; i < 6; ++i)
    generate(e, {request(t, "bicache:depth=2,refresh_steps=1", 18, 3 + i, 8, i)});
  const Result after = generate(e, {probe})[0];
  EXPECT_EQ(after.stats.prefix_hit, true);
  expect_same(after, before, "after other requests");
}

TEST(Engine, WithoutBudgetNothingIsKeptAndNothingChanges) {
  TinyModel t;
  const auto model = t.load();
  const Request r = request(t, "bicache:depth=2", 18, 4, 8, 5);
  const auto e = engine(model, 1, 0);
  const Result first = generate(e, {r})[0], second = generate(e, {r})[0];
  EXPECT_EQ(second.stats.prefix_hit, false);
  EXPECT_EQ(e->store().stats().entries, 0);
  EXPECT_EQ(e->store().stats().refused, 2);
  expect_same(first, second, "again");
  expect_same(generate(engine(model), {r})[0], first, "with a budget");
}

}  // namespace
}  // namespace bicache
