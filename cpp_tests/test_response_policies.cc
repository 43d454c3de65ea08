// Policies that speak for the rows outside the shared prefix (or for all rows), and their
// compositions with one for the prefix: what they plan, without a model.
#include <gtest/gtest.h>

#include <cmath>

#include "cache/policy.h"

namespace bicache {
namespace {

constexpr int kLayers = 6;

StepInfo at(int64_t step, int64_t block_step, RowSpan block, RequestInfo r) {
  StepInfo s;
  s.request = r;
  s.step = step;
  s.block = block;
  s.block_step = block_step;
  s.wanted = RowSet::span(block.begin, block.end);
  return s;
}

StepPlan planned(const std::string& spec, StepInfo s) {
  const PolicyPtr policy = make_policy(spec);
  policy->check(s.request);
  settle(*policy, s);
  StepPlan plan = policy->plan(s);
  const RequestInfo& r = s.request;
  check_plan(plan, kLayers, r.n(), r.p, r.shift);
  return plan;
}

// p = 10 shared, u = 3, g = 8 in two blocks of 4: rows 13..20.
RequestInfo request(int shift) { return {kLayers, 10, 3, 8, shift}; }

TEST(FastDllm, RunsAllRowsAtABlocksStartAndThenTheBlock) {
  for (const int shift : {0, 1}) {
    for (const std::string mode : {"prefix", "dual"}) {
      for (const RowSpan block : {RowSpan{13, 17}, RowSpan{17, 21}}) {
        for (int64_t step = 0; step < 4; ++step) {
          const StepPlan plan =
              planned("fast_dllm:mode=" + mode, at(5 + step, step, block, request(shift)));
          const RowSet want =
              step == 0 ? RowSet::span(0, 21)
                        : RowSet::span(block.begin - shift, mode == "dual" ? block.end : 21);
          for (int l = 0; l < kLayers; ++l)
            EXPECT_EQ(plan.at(l), (LayerPlan{want, want, {}})) << mode << " step " << step;
          EXPECT_EQ(plan.logits, RowSet::span(block.begin, block.end));
        }
      }
    }
  }
}

TEST(FastDllm, RefreshesWithinABlock) {
  for (int64_t step = 0; step < 7; ++step) {
    const StepPlan plan =
        planned("fast_dllm:mode=dual,refresh_steps=3", at(9, step, {13, 17}, request(0)));
    EXPECT_EQ(plan.at(0).fresh, step % 3 == 0 ? RowSet::span(0, 21) : RowSet::span(13, 17));
  }
}

TEST(FastDllm, AFillingPassPredictsNothingAndIsFollowedByTheBlock) {
  StepInfo s = at(4, 0, {17, 21}, request(0));
  const StepPlan fill = planned("fast_dllm:mode=dual,block_start=fill", s);
  EXPECT_EQ(fill.at(0).fresh, RowSet::span(0, 21));
  EXPECT_TRUE(fill.logits.empty());
  s.repeat = 1;
  const StepPlan block = planned("fast_dllm:mode=dual,block_start=fill", s);
  EXPECT_EQ(block.at(0).fresh, RowSet::span(17, 21));
  EXPECT_EQ(block.logits, RowSet::span(17, 21));
}

TEST(FastDllm, KeepsAllKeysUnlessEveryPassMakesThem) {
  const Kept kept = make_policy("fast_dllm")->kept(request(0));
  ASSERT_EQ(kept.kv.size(), 1u);
  EXPECT_EQ(kept.kv[0].rows, RowSet::span(0, 21));
  EXPECT_TRUE(kept.delta.empty() && kept.value.empty());
  EXPECT_TRUE(make_policy("fast_dllm:refresh_steps=1")->kept(request(0)).kv.empty());
  EXPECT_FALSE(
      make_policy("fast_dllm:refresh_steps=1,block_start=fill")->kept(request(0)).kv.empty());
}

// Spec A.2 and A.3: step s (from 0) refreshes the prompt where s mod kp = 0 and the response where
// s mod kr = 0; layer 0's response always; otherwise floor(rho g) of its rows are chosen.
TEST(DllmCache, RowsFollowTheSpec) {
  for (const int shift : {0, 1}) {
    const RequestInfo r = request(shift);
    const RowSet prompt = RowSet::span(0, 13 - shift), response = RowSet::span(13 - shift, 21);
    for (const int64_t kp : {1, 3, 50}) {
      for (const int64_t kr : {1, 2, 7}) {
        for (const double rho : {0.0, 0.1, 0.25, 0.3, 1.0}) {
          const std::string spec = "dllm_cache:prompt_interval_steps=" + std::to_string(kp) +
                                   ",gen_interval_steps=" + std::to_string(kr) +
                                   ",transfer_ratio=" + std::to_string(rho);
          for (int64_t step = 0; step < 8; ++step) {
            const StepPlan plan = planned(spec, at(step, step % 4, {13, 17}, r));
            const RowSet now = step % kp == 0 ? prompt : RowSet();
            for (int l = 0; l < kLayers; ++l) {
              const LayerPlan& lp = plan.at(l);
              EXPECT_EQ(lp.live, now.unite(response));
              const bool all = l == 0 || step % kr == 0;
              EXPECT_EQ(lp.fresh, all ? now.unite(response) : now) << spec << " step " << step;
              ASSERT_EQ(lp.select.size(), !all && rho > 0 ? 1u : 0u);
              if (lp.select.empty()) continue;
              EXPECT_EQ(lp.select[0].rows, response);
              const auto g = static_cast<double>(response.size());
              EXPECT_EQ(lp.select[0].count, static_cast<int64_t>(std::floor(g * rho)));
              EXPECT_EQ(lp.select[0].since, Since::last_pass);
            }
            EXPECT_FALSE(plan.from_entry);
          }
        }
      }
    }
  }
}

TEST(DllmCache, KeepsWhatOutlivesAPass) {
  const RequestInfo r = request(1);
  const RowSet prompt = RowSet::span(0, 12), response = RowSet::span(12, 21);
  const auto kept = [&](const std::string& settings) {
    return make_policy("dllm_cache:" + settings)->kept(r);
  };
  const Kept usual = kept("transfer_ratio=0.25");
  ASSERT_EQ(usual.kv.size(), 2u);
  EXPECT_EQ(usual.kv[0].rows, prompt);
  EXPECT_EQ(usual.kv[0].first_layer, 0);
  EXPECT_EQ(usual.kv[1].rows, response);
  EXPECT_EQ(usual.kv[1].first_layer, 1);
  ASSERT_EQ(usual.delta.size(), 1u);
  EXPECT_EQ(usual.delta[0].rows, response);
  EXPECT_EQ(usual.delta[0].first_layer, 1);
  EXPECT_TRUE(usual.value.empty());
  EXPECT_EQ(kept("drift=since_recompute").value.size(), 1u);
  EXPECT_TRUE(kept("drift=since_recompute,transfer_ratio=0").value.empty());
  EXPECT_EQ(kept("gen_interval_steps=1").kv.size(), 1u);
  EXPECT_TRUE(kept("gen_interval_steps=1").delta.empty());
  EXPECT_EQ(kept("prompt_interval_steps=1").kv.size(), 1u);
  EXPECT_TRUE(kept("prompt_interval_steps=1,gen_interval_steps=1").kv.empty());
}

TEST(DllmCache, DriftSaysSinceWhen) {
  const StepPlan plan = planned("dllm_cache:drift=since_recompute", at(1, 1, {13, 17}, request(0)));
  EXPECT_EQ(plan.at(3).select[0].since, Since::recompute);
}

// Ours: rows of new tokens are recomputed besides the share, which is then taken from the others.
TEST(DllmCache, NewTokensMayBeRecomputedInAnyCase) {
  StepInfo s = at(1, 1, {13, 17}, request(0));
  s.committed = RowSet::of({13, 15, 16});
  for (const double rho : {0.0, 0.25, 0.9}) {
    const StepPlan plan =
        planned("dllm_cache:new_tokens=recompute,transfer_ratio=" + std::to_string(rho), s);
    EXPECT_EQ(plan.at(0).fresh, RowSet::span(13, 21));
    EXPECT_EQ(plan.at(3).fresh, s.committed);
    EXPECT_EQ(plan.at(3).live, RowSet::span(13, 21));
    ASSERT_EQ(plan.at(3).select.size(), rho > 0 ? 1u : 0u);
    if (rho == 0) continue;
    EXPECT_EQ(plan.at(3).select[0].rows, RowSet::span(13, 21).minus(s.committed));
    EXPECT_EQ(plan.at(3).select[0].count, rho == 0.25 ? 2 : 5);  // of 8 rows, 5 are left
  }
  const StepPlan published = planned("dllm_cache", s);
  EXPECT_TRUE(published.at(3).fresh.empty());
}

TEST(DllmCache, OneLayerIsLayerZero) {
  RequestInfo r = request(0);
  r.layers = 1;
  StepInfo s = at(1, 1, {13, 17}, r);
  const StepPlan plan = make_policy("dllm_cache")->plan(s);
  ASSERT_EQ(plan.layers.size(), 1u);
  EXPECT_EQ(plan.at(0).fresh, RowSet::span(13, 21));
  check_plan(plan, 1, 21, 10, 0);
}

// The union, layer by layer: the prefix policy alone decides about the prefix rows, whatever the
// other one would do with them, and the other way round.
TEST(Composition, EachSideSpeaksForItsRows) {
  const RowSet prefix = RowSet::span(0, 10), others = RowSet::span(10, 21);
  for (const std::string a : {"bicache:depth=2,refresh_steps=3", "bicache:depth=0", "naive"}) {
    for (const std::string b :
         {"none", "fast_dllm:mode=dual", "fast_dllm:mode=prefix,refresh_steps=2",
          "fast_dllm:block_start=fill", "dllm_cache:prompt_interval_steps=4,gen_interval_steps=2",
          "dllm_cache:drift=since_recompute"}) {
      for (const int shift : {0, 1}) {
        for (int64_t step = 0; step < 8; ++step) {
          const StepInfo s = at(step, step % 4, {17, 21}, request(shift));
          const StepPlan both = planned(a + "+" + b, s), swapped = planned(b + "+" + a, s),
                         one = planned(a, s), other = planned(b, s);
          for (int l = 0; l < kLayers; ++l) {
            EXPECT_EQ(both.at(l), swapped.at(l));
            EXPECT_EQ(both.at(l).live.intersect(prefix), one.at(l).live.intersect(prefix));
            EXPECT_EQ(both.at(l).fresh.intersect(prefix), one.at(l).fresh.intersect(prefix));
            EXPECT_EQ(both.at(l).live.intersect(others), other.at(l).live.intersect(others));
            EXPECT_EQ(both.at(l).fresh.intersect(others), other.at(l).fresh.intersect(others));
            EXPECT_EQ(both.at(l).select, other.at(l).select);
          }
          EXPECT_EQ(both.logits, other.logits);
          EXPECT_EQ(both.from_entry, one.from_entry);
        }
      }
    }
  }
}

// bicache+dllm_cache: kp never recomputes the shared prefix, and the prefix is kept above b only.
TEST(Composition, KeptIsTheUnionOfBoth) {
  const Kept kept =
      make_policy("dllm_cache:drift=since_recompute+bicache:depth=2")->kept(request(0));
  std::vector<std::pair<RowSet, int>> parts;
  for (const Kept::Part& part : kept.kv) parts.emplace_back(part.rows, part.first_layer);
  EXPECT_EQ(parts,
            (std::vector<std::pair<RowSet, int>>{
                {RowSet::span(0, 10), 2}, {RowSet::span(10, 13), 0}, {RowSet::span(13, 21), 1}}));
  ASSERT_EQ(kept.delta.size(), 1u);
  EXPECT_EQ(kept.delta[0].rows, RowSet::span(13, 21));
  ASSERT_EQ(kept.value.size(), 1u);
  EXPECT_EQ(kept.value[0].rows, RowSet::span(13, 21));
}

}  // namespace
}  // namespace bicache
