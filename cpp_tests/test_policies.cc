// Policies as tables: what each one plans, without a model.
#include <gtest/gtest.h>

#include "cache/policy.h"

namespace bicache {
namespace {

constexpr RequestInfo kRequest{.layers = 6, .p = 10, .u = 3, .g = 4, .shift = 0};

StepInfo at_step(int64_t step, RequestInfo r = kRequest) {
  StepInfo s;
  s.request = r;
  s.step = step;
  s.block = {r.p + r.u, r.n()};
  s.block_step = step;
  s.wanted = RowSet::span(r.p + r.u, r.n());
  return s;
}

const RowSet kPrefix = RowSet::span(0, 10), kSuffix = RowSet::span(10, 17),
             kAll = RowSet::span(0, 17);

std::string error(const std::string& spec) {
  try {
    make_policy(spec);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "no error";
}

TEST(Policies, None) {
  const StepPlan plan = make_policy("none")->plan(at_step(3));
  for (int l = 0; l < 6; ++l) {
    EXPECT_EQ(plan.at(l).live, kAll);
    EXPECT_EQ(plan.at(l).fresh, kAll);
  }
  EXPECT_EQ(plan.logits, RowSet::span(13, 17));
  EXPECT_FALSE(plan.from_entry);
}

TEST(Policies, NaiveNeverRunsThePrefix) {
  for (const char* source : {"alone", "first_request"}) {
    const PolicyPtr policy = make_policy(std::string("naive:source=") + source);
    for (const int64_t step : {0, 1, 16}) {
      const StepPlan plan = policy->plan(at_step(step));
      for (int l = 0; l < 6; ++l) EXPECT_EQ(plan.at(l).fresh, kSuffix);
      EXPECT_FALSE(plan.from_entry);
    }
    EXPECT_EQ(policy->needs(kRequest).kv_layers, 6);
    EXPECT_TRUE(policy->needs(kRequest).joins.empty());
  }
}

TEST(Policies, BiCacheRowsFollowTheSpec) {
  for (int b = 0; b <= 6; ++b) {
    for (const bool strict : {false, true}) {
      for (const int64_t refresh : {1, 2, 5}) {
        const PolicyPtr policy = make_policy("bicache:depth=" + std::to_string(b) +
                                             ",refresh_steps=" + std::to_string(refresh) +
                                             ",splice=" + (strict ? "strict" : "official"));
        const int c = std::max(0, b - (strict ? 1 : 0));
        for (int64_t step = 0; step < 7; ++step) {
          const StepPlan plan = policy->plan(at_step(step));
          const bool fresh = step % refresh == 0;
          EXPECT_EQ(plan.from_entry, fresh && c < 6);
          for (int l = 0; l < 6; ++l) {
            EXPECT_EQ(plan.at(l).fresh, fresh && l >= c ? kAll : kSuffix)
                << "b=" << b << " layer " << l;
            EXPECT_EQ(plan.at(l).live, plan.at(l).fresh);
          }
          check_plan(plan, 6, 17, 10, 0);
        }
        const EntryNeeds needs = policy->needs(kRequest);
        EXPECT_EQ(needs.kv_layers, c);
        EXPECT_EQ(needs.joins, c > 0 && c < 6 ? std::vector<int>{c} : std::vector<int>{});
        const Kept kept = policy->kept(kRequest);
        ASSERT_EQ(kept.kv.size(), 1u);
        EXPECT_EQ(kept.kv[0].rows, kPrefix);
        EXPECT_EQ(kept.kv[0].first_layer, c);
        EXPECT_TRUE(kept.delta.empty());
      }
    }
  }
}

TEST(Policies, ARepeatedPassDoesNotRefreshAgain) {
  StepInfo s = at_step(0);
  s.repeat = 1;
  const StepPlan plan = make_policy("bicache:depth=2")->plan(s);
  EXPECT_FALSE(plan.from_entry);
  EXPECT_EQ(plan.at(5).fresh, kSuffix);
}

TEST(Policies, WithoutPrefixAllAreNone) {
  RequestInfo r = kRequest;
  r.u += r.p;
  r.p = 0;
  const StepPlan none = make_policy("none")->plan(at_step(0, r));
  for (const char* spec : {"naive", "naive:source=first_request", "bicache:depth=3",
                           "bicache:depth=6,splice=strict"}) {
    const PolicyPtr policy = make_policy(spec);
    EXPECT_TRUE(policy->needs(r).nothing()) << spec;
    for (int l = 0; l < 6; ++l) EXPECT_EQ(policy->plan(at_step(0, r)).at(l), none.at(l)) << spec;
  }
}

TEST(Policies, StringsRoundTrip) {
  for (const char* spec : {"none", "naive:source=alone", "naive:source=first_request",
                           "bicache:depth=5,refresh_steps=16,splice=official",
                           "bicache:depth=0:1/30:10/90:17,refresh_steps=1,splice=strict"}) {
    EXPECT_EQ(make_policy(spec)->spec(), spec);
  }
  EXPECT_EQ(make_policy("bicache:depth=5")->spec(),
            "bicache:depth=5,refresh_steps=16,splice=official");
  EXPECT_EQ(make_policy("bicache:splice=strict,depth=2+none")->spec(),
            "bicache:depth=2,refresh_steps=16,splice=strict");
  for (const PolicyRow& row : policy_table()) {
    if (*row.identity != '\0') {
      EXPECT_EQ(make_policy(row.identity)->spec().substr(0, strlen(row.name)), row.name);
    }
  }
}

TEST(Policies, ErrorsListWhatExists) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "expected one of none, naive, bicache, got \"\""},
      {"bicash:depth=1", "expected one of none, naive, bicache, got \"bicash\""},
      {"bicache", "expected a value for depth"},
      {"bicache:", "expected settings depth, refresh_steps, splice, got \"\""},
      {"bicache:dept=1", "expected settings depth, refresh_steps, splice, got \"dept\""},
      {"bicache:depth", "expected depth=value"},
      {"bicache:depth=", "expected a value for depth"},
      {"bicache:depth=x", "expected a number or a table"},
      {"bicache:depth=-1", "expected >= 0"},
      {"bicache:depth=1,depth=2", "twice"},
      {"bicache:depth=0:1/0:2", "twice"},
      {"bicache:depth=0:1/200:2", "expected ratios 0..100"},
      {"bicache:depth=0:1/", "expected ratio:depth"},
      {"bicache:depth=1,refresh_steps=0", "expected a number >= 1"},
      {"bicache:depth=1,refresh_steps=-3", "expected a number >= 1"},
      {"bicache:depth=1,refresh_steps=99999999999", "expected a number >= 1"},
      {"bicache:depth=1,splice=loose", "expected official or strict, got \"loose\""},
      {"naive:source=second", "expected alone or first_request, got \"second\""},
      {"none:depth=1", "expected settings none, got \"depth\""},
      {"bicache:depth=1+naive", "both speak for the shared prefix"},
      {"none+bicache:depth=1", "expected a policy for the shared prefix on the left"},
      {"bicache:depth=1+none+none", "at most two"},
  };
  for (const auto& [spec, fragment] : cases) {
    EXPECT_NE(error(spec).find(fragment), std::string::npos)
        << "\"" << spec << "\": " << error(spec);
  }
}

TEST(Policies, DepthMustFitTheModel) {
  EXPECT_NO_THROW(make_policy("bicache:depth=6")->check(kRequest));
  EXPECT_THROW(make_policy("bicache:depth=7")->check(kRequest), std::invalid_argument);
  EXPECT_THROW(make_policy("bicache:depth=0:1/99:7")->check(kRequest), std::invalid_argument);
}

TEST(Depth, TableLookup) {
  const auto depth = parse_depth("5:1/10:3/60:9");
  const auto at = [&](int64_t p, int64_t rest) { return depth->depth({12, p, rest, 0, 0}); };
  EXPECT_EQ(at(4, 96), 0);  // below the table: no reuse across requests
  EXPECT_EQ(at(5, 95), 1);
  EXPECT_EQ(at(59, 41), 3);
  EXPECT_EQ(at(60, 40), 9);
  EXPECT_EQ(at(100, 0), 9);
  EXPECT_EQ(depth->reachable(), (std::vector<int>{0, 1, 3, 9}));
  EXPECT_EQ((RequestInfo{12, 1, 0, 199, 0}).ratio(), 0);  // 0.5 rounds to even
  EXPECT_EQ((RequestInfo{12, 3, 0, 197, 0}).ratio(), 2);  // 1.5 rounds to even
}

TEST(Plan, RejectsWhatTheForwardPassCannotDo) {
  const RowSet all = RowSet::span(0, 6);
  const auto check = [&](const StepPlan& plan, int shift = 0) { check_plan(plan, 3, 6, 2, shift); };
  EXPECT_NO_THROW(check(StepPlan::uniform(all, all)));
  EXPECT_THROW(check({{}, {}, false}), std::invalid_argument);
  EXPECT_THROW(check({{{1, {all, all, {}}}}, {}, false}), std::invalid_argument);
  EXPECT_THROW(check({{{0, {all, all, {}}}, {3, {}}}, {}, false}), std::invalid_argument);
  EXPECT_THROW(check(StepPlan::uniform(RowSet::span(0, 7), {})), std::invalid_argument);
  EXPECT_THROW(check({{{0, {RowSet::span(0, 2), all, {}}}}, {}, false}), std::invalid_argument);
  // rows 2..5 are not shared prefix, so they cannot join in layer 1
  EXPECT_THROW(check({{{0, {}}, {1, {all, all, {}}}}, {}, false}), std::invalid_argument);
  EXPECT_NO_THROW(
      check({{{0, {RowSet::span(2, 6), RowSet::span(2, 6), {}}}, {1, {all, all, {}}}}, {}, false}));
  // logits of a row that is not live in the last layer, straight and shifted
  EXPECT_THROW(check(StepPlan::uniform(RowSet::span(3, 6), RowSet::span(2, 3))),
               std::invalid_argument);
  EXPECT_NO_THROW(check(StepPlan::uniform(RowSet::span(3, 6), RowSet::span(4, 6)), 1));
  EXPECT_THROW(check(StepPlan::uniform(RowSet::span(3, 6), RowSet::span(3, 6)), 1),
               std::invalid_argument);
  // select: outside live - fresh, overlapping, count
  const auto select = [&](std::vector<Select> s) {
    return StepPlan{{{0, {all, RowSet::span(0, 2), std::move(s)}}}, {}, false};
  };
  EXPECT_NO_THROW(check(select({{RowSet::span(2, 4), 1}, {RowSet::span(4, 6), 2}})));
  EXPECT_THROW(check(select({{RowSet::span(1, 4), 1}})), std::invalid_argument);
  EXPECT_THROW(check(select({{RowSet::span(2, 4), 1}, {RowSet::span(3, 6), 1}})),
               std::invalid_argument);
  EXPECT_THROW(check(select({{RowSet::span(2, 4), 3}})), std::invalid_argument);
  EXPECT_THROW(check(select({{RowSet::span(2, 4), -1}})), std::invalid_argument);
}

TEST(Plan, PredictedRows) {
  const LayerPlan plan{
      RowSet::span(0, 10), RowSet::span(0, 2), {{RowSet::span(2, 6), 1}, {RowSet::span(6, 10), 0}}};
  EXPECT_EQ(predicted_rows(plan), (RowCount{3, 7}));
}

}  // namespace
}  // namespace bicache
