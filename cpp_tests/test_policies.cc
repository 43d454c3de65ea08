// Policies as tables: what each one plans, without a model.
#include <gtest/gtest.h>

#include <cmath>

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

// As the engine asks: first what changes at this step, then the plan.
StepPlan planned(const PolicyPtr& policy, StepInfo s) {
  settle(*policy, s);
  return policy->plan(s);
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
  const StepPlan plan = planned(make_policy("none"), at_step(3));
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
      const StepPlan plan = planned(policy, at_step(step));
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
          const StepPlan plan = planned(policy, at_step(step));
          const bool fresh = step % refresh == 0;
          EXPECT_EQ(plan.from_entry, fresh);
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
  const StepPlan plan = planned(make_policy("bicache:depth=2"), s);
  EXPECT_FALSE(plan.from_entry);
  EXPECT_EQ(plan.at(5).fresh, kSuffix);
}

TEST(Policies, WithoutPrefixAllAreNone) {
  RequestInfo r = kRequest;
  r.u += r.p;
  r.p = 0;
  const StepPlan none = planned(make_policy("none"), at_step(0, r));
  for (const char* spec : {"naive", "naive:source=first_request", "bicache:depth=3",
                           "bicache:depth=6,splice=strict"}) {
    const PolicyPtr policy = make_policy(spec);
    EXPECT_TRUE(policy->needs(r).nothing()) << spec;
    for (int l = 0; l < 6; ++l) EXPECT_EQ(planned(policy, at_step(0, r)).at(l), none.at(l)) << spec;
  }
}

TEST(Policies, StringsRoundTrip) {
  for (const char* spec : {"none", "naive:source=alone", "naive:source=first_request",
                           "bicache:depth=5,refresh_steps=16,splice=official",
                           "bicache:depth=0:1/30:10/90:17,refresh_steps=1,splice=strict",
                           "bicache:depth=agreement:48:5/86:0,refresh_steps=16,splice=official",
                           "bicache:depth=probe:0.97,refresh_steps=4,splice=strict,probe_rows=3",
                           "bicache:depth=0,refresh_steps=2,splice=official,refresh=drift:0.05",
                           "bicache:depth=probe:0.99999999,refresh_steps=4,splice=official",
                           "bicache:depth=1,refresh_steps=2,splice=official,refresh=block,"
                           "source=first_request,ratio=prompt",
                           "fast_dllm:mode=prefix", "fast_dllm:mode=dual,refresh_steps=3",
                           "fast_dllm:mode=dual,block_start=fill",
                           "dllm_cache:prompt_interval_steps=50,gen_interval_steps=7,"
                           "transfer_ratio=0.25",
                           "dllm_cache:prompt_interval_steps=2,gen_interval_steps=1,"
                           "transfer_ratio=0,drift=since_recompute",
                           "dllm_cache:prompt_interval_steps=50,gen_interval_steps=7,"
                           "transfer_ratio=0.25,new_tokens=recompute",
                           "bicache:depth=2,refresh_steps=4,splice=strict+fast_dllm:mode=dual"}) {
    EXPECT_EQ(make_policy(spec)->spec(), spec);
  }
  EXPECT_EQ(make_policy("bicache:depth=5")->spec(),
            "bicache:depth=5,refresh_steps=16,splice=official");
  EXPECT_EQ(make_policy("bicache:depth=1,refresh=drift:0.050")->spec(),
            "bicache:depth=1,refresh_steps=16,splice=official,refresh=drift:0.05");
  EXPECT_EQ(make_policy("bicache:depth=table:0:1/30:10")->spec(),
            "bicache:depth=0:1/30:10,refresh_steps=16,splice=official");
  EXPECT_EQ(make_policy("bicache:splice=strict,depth=2+none")->spec(),
            "bicache:depth=2,refresh_steps=16,splice=strict");
  EXPECT_EQ(make_policy("none+bicache:depth=2")->spec(), make_policy("bicache:depth=2")->spec());
  EXPECT_EQ(make_policy("dllm_cache+bicache:depth=2")->spec(),
            make_policy("bicache:depth=2+dllm_cache")->spec());
  for (const PolicyRow& row : policy_table()) {
    if (*row.identity != '\0') {
      EXPECT_EQ(make_policy(row.identity)->spec().substr(0, strlen(row.name)), row.name);
    }
  }
}

TEST(Policies, ErrorsListWhatExists) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "expected one of none, naive, bicache, fast_dllm, dllm_cache, got \"\""},
      {"bicash:depth=1", "dllm_cache, got \"bicash\""},
      {"bicache", "expected a value for depth"},
      {"bicache:",
       "expected settings depth, refresh_steps, splice, refresh, source, ratio, probe_rows, got "
       "\"\""},
      {"bicache:dept=1", "probe_rows, got \"dept\""},
      {"bicache:depth", "expected depth=value"},
      {"bicache:depth=", "expected a value for depth"},
      {"bicache:depth=x", "expected a number, a table such as"},
      {"bicache:depth=-1", "expected >= 0"},
      {"bicache:depth=1,depth=2", "twice"},
      {"bicache:depth=0:1/0:2", "twice"},
      {"bicache:depth=0:1/200:2", "expected ratios 0..100"},
      {"bicache:depth=0:1/", "expected ratio:depth"},
      {"bicache:depth=1,refresh_steps=0", "expected an integer 1..999999999"},
      {"bicache:depth=1,refresh_steps=-3", "expected an integer 1..999999999"},
      {"bicache:depth=1,refresh_steps=99999999999", "expected an integer 1..999999999"},
      {"bicache:depth=1,splice=loose", "expected official or strict, got \"loose\""},
      {"bicache:depth=1,refresh=often", "expected steps, block or drift:LIMIT"},
      {"bicache:depth=1,refresh=drift", "expected steps, block or drift:LIMIT"},
      {"bicache:depth=1,refresh=drift:", "expected steps, block or drift:LIMIT"},
      {"bicache:depth=1,refresh=drift:-0.1", "expected steps, block or drift:LIMIT"},
      {"bicache:depth=1,refresh=drift:nan", "expected steps, block or drift:LIMIT"},
      {"bicache:depth=1,source=second", "expected alone or first_request, got \"second\""},
      {"bicache:depth=1,ratio=all", "expected request or prompt, got \"all\""},
      {"bicache:depth=1,probe_rows=0", "expected an integer 1..999999999"},
      {"bicache:depth=probe", "expected probe:TAU"},
      {"bicache:depth=probe:x", "expected probe:TAU"},
      {"bicache:depth=probe:1.5", "expected a similarity -1..1"},
      {"bicache:depth=probe:inf", "expected a similarity -1..1"},
      {"bicache:depth=agreement:", "expected ratio:depth"},
      {"bicache:depth=agreement:5", "expected ratio:depth"},
      {"bicache:depth=table:0:1/0:2", "twice"},
      {"bicache:depth=hook", "expected a function, which a cache string cannot carry"},
      {"bicache:depth=hook:1", "expected a function"},
      {"naive:source=second", "expected alone or first_request, got \"second\""},
      {"none:depth=1", "expected settings none, got \"depth\""},
      {"bicache:depth=1+naive", "both speak for the prefix"},
      {"dllm_cache+fast_dllm", "25 and fast_dllm:mode=prefix, which both speak for all"},
      {"none+none", "both speak for all"},
      {"fast_dllm:mode=triple", "expected prefix or dual, got \"triple\""},
      {"fast_dllm:refresh_steps=0",
       "fast_dllm refresh_steps: expected none or an integer 1..999999999"},
      {"fast_dllm:block_start=skip", "expected commit or fill"},
      {"dllm_cache:prompt_interval_steps=0", "expected an integer 1..999999999"},
      {"dllm_cache:gen_interval_steps=x", "expected an integer 1..999999999"},
      {"dllm_cache:transfer_ratio=1.01", "expected a number 0..1, got \"1.01\""},
      {"dllm_cache:transfer_ratio=-0.1", "expected a number 0..1"},
      {"dllm_cache:transfer_ratio=nan", "expected a number 0..1"},
      {"dllm_cache:transfer_ratio=.25x", "expected a number 0..1"},
      {"dllm_cache:drift=slow", "expected last_step or since_recompute"},
      {"dllm_cache:new_tokens=all", "expected compete or recompute"},
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
  const auto at = [&](int64_t p, int64_t rest) { return *depth->constant({12, p, rest, 0, 0}); };
  EXPECT_EQ(at(4, 96), 0);  // below the table: no reuse across requests
  EXPECT_EQ(at(5, 95), 1);
  EXPECT_EQ(at(59, 41), 3);
  EXPECT_EQ(at(60, 40), 9);
  EXPECT_EQ(at(100, 0), 9);
  EXPECT_EQ(depth->reachable(12), (std::vector<int>{0, 1, 3, 9}));
  EXPECT_EQ((RequestInfo{12, 1, 0, 199, 0}).ratio(), 0);  // 0.5 rounds to even
  EXPECT_EQ((RequestInfo{12, 3, 0, 197, 0}).ratio(), 2);  // 1.5 rounds to even
  // the published profiler's ratio leaves the response out
  const RequestInfo r{12, 60, 15, 25, 0};
  EXPECT_EQ(r.ratio(), 60);
  EXPECT_EQ(r.ratio(RatioOf::prompt), 80);
  EXPECT_EQ(parse_depth("61:4")->constant(r), 0);
  EXPECT_EQ(parse_depth("61:4", RatioOf::prompt)->constant(r), 4);
}

TEST(Depth, EachSaysWhy) {
  StepInfo s = at_step(0);  // ratio 59
  EXPECT_EQ(parse_depth("5")->choose(s).why, "fixed");
  EXPECT_EQ(parse_depth("0:1/30:10")->choose(s).why, "table: ratio 59 reads the entry at 30");
  EXPECT_EQ(parse_depth("60:1")->choose(s).why, "table: ratio 59 is below the first, 60");
  EXPECT_EQ(parse_depth("agreement:50:2")->choose(s).why,
            "agreement: ratio 59 reads the entry at 50");
  EXPECT_EQ(parse_depth("probe:0.9")->choose(s).why, "probe: nothing was measured yet");
}

TEST(Depth, ProbeTakesTheLeadingRunAboveTau) {
  const auto depth = parse_depth("probe:0.9");
  EXPECT_TRUE(depth->observes());
  EXPECT_FALSE(depth->constant(kRequest).has_value());
  EXPECT_EQ(depth->reachable(2), (std::vector<int>{0, 1, 2}));
  StepInfo s = at_step(4);
  EXPECT_EQ(depth->choose(s).depth, 0);
  const double nan = std::nan("");
  s.to_entry = {{1, 1, nan}, {0.95, 0.9, 1}, {0.9, 0.9, 1}, {1, 1, 1}};  // 0.9 itself is not above
  EXPECT_EQ(depth->choose(s).depth, 2);
  EXPECT_EQ(depth->choose(s).why, "probe: similarity 0.9 in layer 2");
  s.to_entry[2].v = 0.91;
  EXPECT_EQ(depth->choose(s).depth, 4);
  s.to_entry[1].residual = 0.9;  // what the splice at depth 1 would restore
  EXPECT_EQ(depth->choose(s).depth, 0);
  EXPECT_EQ(depth->choose(s).why, "probe: similarity 0.9 of the state entering layer 1");
  // strict restores one layer earlier: at depth 1 from the embeddings, at depth 2 entering layer 1
  EXPECT_EQ(parse_depth("probe:0.9", RatioOf::request, {}, true)->choose(s).depth, 1);
  s.to_entry[1].residual = 1;
  EXPECT_EQ(parse_depth("probe:0.9", RatioOf::request, {}, true)->choose(s).depth, 4);
  s.to_entry[3].residual = nan;
  EXPECT_EQ(depth->choose(s).depth, 2);
  s.to_entry[0] = {};  // NaN: not measured
  EXPECT_EQ(depth->choose(s).depth, 0);
}

TEST(Depth, AHookIsAskedAtEveryRefresh) {
  std::vector<int64_t> asked;
  const auto hook = hook_depth(
      [&](const StepInfo& s) {
        asked.push_back(s.step);
        return static_cast<int>(s.step);
      },
      {}, false);
  const PolicyPtr policy = make_policy("bicache:depth=hook,refresh_steps=2", hook);
  EXPECT_EQ(policy->spec(), "bicache:depth=hook,refresh_steps=2,splice=official");
  EXPECT_EQ(policy->needs(kRequest).kv_layers, 6);
  EXPECT_EQ(policy->needs(kRequest).joins, (std::vector<int>{1, 2, 3, 4, 5}));
  EXPECT_EQ(policy->kept(kRequest).kv[0].first_layer, 0);
  StepInfo s = at_step(0);
  for (int64_t step = 0; step < 5; ++step) {
    s.step = step;
    settle(*policy, s);
    const StepPlan plan = policy->plan(s);
    EXPECT_EQ(s.depth, step - step % 2);
    EXPECT_EQ(plan.from_entry, step % 2 == 0);
    for (int l = 0; l < 6; ++l)
      EXPECT_EQ(plan.at(l).fresh, step % 2 == 0 && l >= s.depth ? kAll : kSuffix);
    EXPECT_TRUE(plan.observe.rows.empty());
  }
  EXPECT_EQ(asked, (std::vector<int64_t>{0, 2, 4}));
  s.step = 8;  // not a depth of this model
  EXPECT_THROW(settle(*policy, s), std::invalid_argument);
  EXPECT_EQ(policy->prefix_needs(kRequest).joins, policy->needs(kRequest).joins);
  const PolicyPtr table = make_policy("bicache:depth=0:5/1:0+none");
  EXPECT_TRUE(table->needs(kRequest).nothing());          // depth 0 at its ratio,
  EXPECT_EQ(table->prefix_needs(kRequest).kv_layers, 5);  // but others may come
  // only what it declares
  const auto some = hook_depth([](const StepInfo&) { return 3; }, std::vector<int>{3, 1}, true);
  const PolicyPtr narrow = make_policy("bicache:depth=hook", some);
  EXPECT_EQ(narrow->needs(kRequest).joins, (std::vector<int>{1, 3}));
  EXPECT_EQ(narrow->kept(kRequest).kv[0].first_layer, 1);
  s = at_step(0);
  settle(*narrow, s);
  const StepPlan plan = narrow->plan(s);
  EXPECT_EQ(plan.observe.rows.size(), 8);  // of 10
  EXPECT_EQ(plan.observe.first, 0);
  EXPECT_EQ(plan.observe.end, 3);
  EXPECT_TRUE(plan.observe.to_entry);
  EXPECT_THROW(hook_depth({}, std::vector<int>{}, false), std::invalid_argument);
  EXPECT_THROW(hook_depth({}, std::vector<int>{-1}, false), std::invalid_argument);
}

TEST(Policies, RefreshByBlock) {
  const PolicyPtr policy = make_policy("bicache:depth=2,refresh=block");
  for (const int64_t step : {0, 3, 16}) {
    for (const int64_t block_step : {0, 1}) {
      if (step == 0 && block_step == 1) continue;
      StepInfo s = at_step(step);
      s.block_step = block_step;
      EXPECT_EQ(planned(policy, s).from_entry, block_step == 0) << step;
    }
  }
}

TEST(Policies, RefreshByDriftOfTheLayersThatARefreshRecomputes) {
  const PolicyPtr policy = make_policy("bicache:depth=2,refresh=drift:0.1,refresh_steps=5");
  StepInfo s = at_step(0);
  EXPECT_TRUE(settle(*policy, s).has_value());
  EXPECT_TRUE(policy->plan(s).observe.rows.empty());
  s.step = 1;
  EXPECT_FALSE(settle(*policy, s).has_value());
  const StepPlan plan = policy->plan(s);
  EXPECT_FALSE(plan.from_entry);
  EXPECT_EQ(plan.observe.rows.size(), 8);
  EXPECT_EQ(plan.observe.first, 2);  // from where the refresh began
  EXPECT_EQ(plan.observe.end, 6);
  EXPECT_FALSE(plan.observe.to_entry);
  s.step = 2;
  s.to_own.assign(6, {1, 1, 1});
  s.to_own[1] = {0, 0, 0};  // lent by the entry: a refresh would not change it
  s.to_own[4] = {0.95, 0.86, 1};
  EXPECT_FALSE(settle(*policy, s).has_value());
  s.to_own[4].v = 0.84;
  EXPECT_TRUE(settle(*policy, s).has_value());
  EXPECT_TRUE(s.to_own.empty());  // measured anew
  EXPECT_EQ(s.refreshed_step, 2);
  s.step = 6;
  EXPECT_FALSE(settle(*policy, s).has_value());
  s.step = 7;  // at the latest after refresh_steps
  EXPECT_TRUE(settle(*policy, s).has_value());
}

TEST(Policies, ObservedRowsAreSpreadEvenly) {
  const auto rows = [](int64_t p, int count) {
    RequestInfo r = kRequest;
    r.p = p;
    StepInfo s = at_step(0, r);
    return planned(make_policy("bicache:depth=probe:0.9,probe_rows=" + std::to_string(count)), s)
        .observe.rows.list();
  };
  EXPECT_EQ(rows(10, 1), (std::vector<int64_t>{5}));
  EXPECT_EQ(rows(10, 2), (std::vector<int64_t>{2, 7}));
  EXPECT_EQ(rows(3, 9), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_TRUE(rows(0, 9).empty());
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
  // observed rows: of the prefix, in layers there are
  StepPlan observed = StepPlan::uniform(all, all);
  observed.observe = {RowSet::span(0, 2), 1, 3};
  EXPECT_NO_THROW(check(observed));
  observed.observe.end = 4;
  EXPECT_THROW(check(observed), std::invalid_argument);
  observed.observe = {RowSet::span(0, 2), 2, 1};
  EXPECT_THROW(check(observed), std::invalid_argument);
  observed.observe = {RowSet::span(1, 3), 0, 1};
  EXPECT_THROW(check(observed), std::invalid_argument);
}

TEST(Plan, PredictedRows) {
  const LayerPlan layer{
      RowSet::span(0, 10), RowSet::span(0, 2), {{RowSet::span(2, 6), 1}, {RowSet::span(6, 10), 0}}};
  StepPlan plan{{{0, layer}}, {}, false};
  EXPECT_EQ(predicted_rows(plan, 1), (RowCount{3, 7}));
  plan.observe = {RowSet::span(0, 2), 0, 1};
  EXPECT_EQ(predicted_rows(plan, 0), (RowCount{5, 7}));
  EXPECT_EQ(predicted_rows(plan, 1), (RowCount{3, 7}));
}

}  // namespace
}  // namespace bicache
