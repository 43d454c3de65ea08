// Generation: determinism, statistics against the formulas of BiCache's cost model, admission,
// cancellation, bad requests.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>

#include "tiny_model.h"

namespace bicache {
namespace {

Request request(const TinyModel& t, const std::string& cache, int64_t p, int64_t u, int64_t g,
                unsigned seed) {
  Request r;
  r.prompt = t.ids(p + u, 77);  // the same prefix for everybody
  const auto own = t.ids(u, seed);
  std::copy(own.begin(), own.end(), r.prompt.begin() + p);
  r.prefix = p;
  r.options.gen_length = g;
  r.options.block_length = g % 4 == 0 ? 4 : g;
  r.policy = make_policy(cache);
  return r;
}

std::vector<Result> generate(const std::shared_ptr<Engine>& engine, std::vector<Request> requests,
                             int64_t batch_rows = 4096) {
  Generation g(engine, std::move(requests), batch_rows);
  while (!g.done()) g.step();
  EXPECT_EQ(g.steps_done(), g.steps_total());
  return g.results();
}

std::shared_ptr<Engine> engine(const std::shared_ptr<const Model>& model, int threads = 1,
                               int64_t budget = 1 << 24) {
  return std::make_shared<Engine>(model, threads, budget);
}

void expect_same(const Result& a, const Result& b, const std::string& what) {
  EXPECT_EQ(a.tokens, b.tokens) << what;
  ASSERT_EQ(a.confidences.size(), b.confidences.size());
  EXPECT_EQ(
      std::memcmp(a.confidences.data(), b.confidences.data(), a.confidences.size() * sizeof(float)),
      0)
      << what;
}

TEST(Engine, IdentitySettingsEqualNone) {
  for (const Kernels* kernels : available_kernels()) {
    for (const bool shift : {false, true}) {
      TinyModel t;
      t.shift = shift;
      const auto model = t.load(*kernels);
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

std::vector<Request> crowd(const TinyModel& t) {
  std::vector<Request> requests;
  const std::vector<std::string> specs = {"none",
                                          "bicache:depth=2,refresh_steps=3",
                                          "naive",
                                          "bicache:depth=3,splice=strict",
                                          "bicache:depth=0:1/50:3,refresh_steps=2",
                                          "naive:source=first_request"};
  for (unsigned i = 0; i < 24; ++i) {
    requests.push_back(
        request(t, specs[i % specs.size()], 9 + 5 * (i % 4), 1 + i % 7, 1 + i % 9, i));
    requests.back().options.temperature = i % 3 == 0 ? 0.8 : 0.0;
    requests.back().options.remasking = i % 5 == 0 ? "random" : "low_confidence";
    requests.back().options.seed = i;
  }
  return requests;
}

TEST(Engine, BatchThreadsAndOrderDoNotMatter) {
  for (const Kernels* kernels : available_kernels()) {
    const TinyModel t = big_enough_for_threads();
    const auto model = t.load(*kernels);
    const auto requests = crowd(t);
    // naive:source=first_request depends on who was first, by definition: give everybody the same
    // first one.
    std::vector<Result> alone;
    const auto one = engine(model);
    for (const Request& r : requests) alone.push_back(generate(one, {r})[0]);
    for (const int threads : {1, 2, 4}) {
      for (const int64_t batch_rows : {1, 100, 100000}) {
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
  TinyModel t;
  const auto model = t.load();
  auto requests = crowd(t);
  std::erase_if(requests, [](const Request& r) {  // who was first is what that one is about
    return r.policy->spec() == "naive:source=first_request";
  });
  const auto forwards = generate(engine(model), requests);
  std::reverse(requests.begin(), requests.end());
  const auto backwards = generate(engine(model), requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    expect_same(backwards[requests.size() - 1 - i], forwards[i], std::to_string(i));
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

TEST(Engine, AShiftedModelKeepsTheLastPromptRowOutOfThePrefix) {
  TinyModel t;
  t.shift = true;
  const auto model = t.load();
  const int64_t p = 12, g = 4;
  // no prompt of its own: the prefix gives up its last row
  const Result r = generate(engine(model), {request(t, "naive", p, 0, g, 1)})[0];
  EXPECT_EQ(r.stats.work[0].rows_of(Op::attention), g * (g + 1));
  const Result own = generate(engine(model), {request(t, "naive", p, 3, g, 1)})[0];
  EXPECT_EQ(own.stats.work[0].rows_of(Op::attention), g * (g + 3));
}

TEST(Engine, UndecidedPositionsAreMasks) {
  TinyModel t;
  const auto model = t.load();
  for (const Result& r : generate(engine(model), crowd(t))) {
    for (size_t i = 0; i < r.tokens.size(); ++i) {
      EXPECT_TRUE(!std::isnan(r.confidences[i]) || r.tokens[i] == t.mask()) << i;
    }
    EXPECT_TRUE(r.finish_reason == "length" || r.finish_reason == "eos");
    EXPECT_EQ(r.finish_reason == "eos",
              std::find(r.tokens.begin(), r.tokens.end(), 0) != r.tokens.end());
  }
}

TEST(Engine, MaskIdsInThePromptStay) {
  TinyModel t;
  const auto model = t.load();
  Request r = request(t, "none", 6, 3, 4, 1);
  r.prompt[2] = r.prompt[7] = t.mask();
  Generation g(engine(model), {r}, 4096);
  std::vector<StepEvent> last;
  while (!g.done()) {
    auto events = g.step();
    for (const StepEvent& e : events) {
      for (const Commit& c : e.commits) EXPECT_GE(c.position, 9);
    }
    if (!events.empty()) last = std::move(events);
  }
  ASSERT_EQ(last.size(), 1u);
  EXPECT_TRUE(std::equal(r.prompt.begin(), r.prompt.end(), last[0].canvas.begin()));
}

TEST(Engine, CancelEndsARequestAtEveryStep) {
  TinyModel t;
  const auto model = t.load();
  for (int64_t at = 0; at <= 8; ++at) {
    Generation g(engine(model),
                 {request(t, "bicache:depth=2", 12, 4, 8, 1), request(t, "none", 12, 4, 8, 2)},
                 4096);
    for (int64_t i = 0; i < at; ++i) g.step();
    g.cancel(0);
    while (!g.done()) g.step();
    const auto results = g.results();
    EXPECT_EQ(results[0].stats.steps, at);
    EXPECT_EQ(results[0].finish_reason == "cancelled", at < 8);
    EXPECT_EQ(results[1].stats.steps, 8);
    expect_same(results[1], generate(engine(model), {request(t, "none", 12, 4, 8, 2)})[0],
                "the other request");
  }
  Generation g(engine(model), {request(t, "none", 1, 1, 1, 1)}, 4096);
  EXPECT_THROW(g.cancel(1), std::invalid_argument);
  EXPECT_THROW(g.results(), std::logic_error);
}

TEST(Engine, ACancelledRequestInTheQueueCostsNothing) {
  TinyModel t;
  const auto e = engine(t.load());
  Generation g(e, {request(t, "none", 12, 4, 8, 1), request(t, "bicache:depth=2", 12, 4, 8, 2)}, 1);
  g.step();
  g.cancel(1);
  while (!g.done()) g.step();
  const auto results = g.results();
  EXPECT_EQ(results[1].finish_reason, "cancelled");
  EXPECT_EQ(results[1].tokens, std::vector<int32_t>(8, t.mask()));
  EXPECT_TRUE(results[1].stats.entry_work.empty());
  EXPECT_EQ(e->store().stats().entries, 0);
}

// A policy given as a function, as users of the seam will write them.
class Custom : public Policy {
 public:
  using Plan = StepPlan (*)(const StepInfo&);
  Custom(Plan plan, bool keep) : plan_(plan), keep_(keep) {}
  std::string spec() const override { return "custom"; }
  Kept kept(const RequestInfo& r) const override {
    return keep_ ? Kept::everything(r.n()) : Kept{};
  }
  StepPlan plan(const StepInfo& s) const override { return plan_(s); }

 private:
  Plan plan_;
  bool keep_;
};

Result run_custom(const TinyModel& t, Custom::Plan plan, bool keep) {
  Request r = request(t, "none", 0, 9, 8, 1);
  r.policy = std::make_shared<Custom>(plan, keep);
  return generate(engine(t.load()), {r})[0];
}

TEST(Engine, PassesWithoutLogitsRepeatTheStep) {
  TinyModel t;
  const Result r = run_custom(
      t,
      [](const StepInfo& s) {
        return StepPlan::uniform(RowSet::span(0, s.request.n()),
                                 s.repeat < 2 ? RowSet() : s.wanted);
      },
      false);
  EXPECT_EQ(r.stats.steps, 8);
  EXPECT_EQ(r.stats.passes, 24);
  expect_same(r, generate(engine(t.load()), {request(t, "none", 0, 9, 8, 1)})[0], "none");
}

TEST(Engine, PlansThatCannotWorkAreRefused) {
  TinyModel t;
  const auto never = [](const StepInfo& s) {
    return StepPlan::uniform(RowSet::span(0, s.request.n()), {});
  };
  EXPECT_THROW(run_custom(t, never, false), std::invalid_argument);
  const auto prompt = [](const StepInfo& s) {
    return StepPlan::uniform(RowSet::span(0, s.request.n()), RowSet::span(0, 1));
  };
  EXPECT_THROW(run_custom(t, prompt, false), std::invalid_argument);
}

// Deltas that nobody computed are NaN: an error that names the request, and the generation is over.
TEST(Engine, NanLogitsEndTheGeneration) {
  TinyModel t;
  Request r = request(t, "none", 0, 9, 8, 1);
  r.policy = std::make_shared<Custom>(
      [](const StepInfo& s) {
        return StepPlan{{{0, {RowSet::span(0, s.request.n()), {}, {}}}}, s.wanted, false};
      },
      true);
  Generation g(engine(t.load()), {request(t, "none", 0, 9, 8, 1), r}, 4096);
  try {
    g.step();
    ADD_FAILURE() << "expected an error";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("NaN (request 1)"), std::string::npos) << e.what();
  }
  EXPECT_THROW(g.step(), std::runtime_error);
}

TEST(Engine, ATapCannotUseItsOwnEngine) {
  TinyModel t;
  const auto e = engine(t.load());
  int calls = 0;
  e->set_tap([&](int, const char*, View<const float>) {
    ++calls;
    EXPECT_THROW(e->forward({1, 2}, {0}), std::runtime_error);
  });
  e->forward({1, 2, 3}, {0});
  EXPECT_GT(calls, 1);
  e->set_tap({});
  EXPECT_EQ(e->forward({1, 2}, {0}).size(), static_cast<size_t>(t.vocab));
}

TEST(Engine, TwoThreadsOnOneEngine) {
  const TinyModel t = big_enough_for_threads();
  const auto e = engine(t.load(), 2);
  const auto requests = crowd(t);
  const auto want = generate(e, requests);
  std::vector<Result> a, b;
  std::thread one([&] { a = generate(e, requests); }), two([&] { b = generate(e, requests); });
  one.join();
  two.join();
  for (size_t i = 0; i < requests.size(); ++i) {
    expect_same(a[i], want[i], "first thread");
    expect_same(b[i], want[i], "second thread");
  }
}

TEST(Engine, ForwardGivesPositionsInTheOrderAskedFor) {
  TinyModel t;
  const auto e = engine(t.load());
  const auto ids = t.ids(10, 1);
  const auto some = e->forward(ids, {7, 2, 7});
  std::vector<int64_t> all_rows(10);
  for (int64_t i = 0; i < 10; ++i) all_rows[i] = i;
  const auto all = e->forward(ids, all_rows);
  const auto row = [&](const std::vector<float>& x, int64_t i) {
    return std::vector<float>(x.begin() + i * t.vocab, x.begin() + (i + 1) * t.vocab);
  };
  EXPECT_EQ(row(some, 0), row(all, 7));
  EXPECT_EQ(row(some, 1), row(all, 2));
  EXPECT_EQ(row(some, 2), row(all, 7));
  EXPECT_TRUE(e->forward(ids, {}).empty());
  EXPECT_THROW(e->forward(ids, {10}), std::invalid_argument);
  EXPECT_THROW(e->forward({}, {}), std::invalid_argument);
  EXPECT_THROW(e->forward({static_cast<int32_t>(t.vocab)}, {0}), std::invalid_argument);
  EXPECT_THROW(e->forward(std::vector<int32_t>(129, 1), {0}), std::invalid_argument);
}

TEST(Engine, BadRequestsAreRefusedBeforeAnythingRuns) {
  TinyModel t;
  const auto e = engine(t.load());
  using Change = void (*)(Request&);
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](Request& r) { r.prompt.clear(), r.prefix = 0; }, "prompt: expected at least one token"},
      {[](Request& r) { r.prefix = 17; }, "prefix: expected 0..16"},
      {[](Request& r) { r.prefix = -1; }, "prefix: expected 0..16"},
      {[](Request& r) { r.prompt[3] = -1; }, "prompt token 3: expected an id of 0..52, got -1"},
      {[](Request& r) { r.prompt[3] = 53; }, "prompt token 3"},
      {[](Request& r) { r.options.gen_length = 0; }, "gen_length: expected 1..2^31-1, got 0"},
      {[](Request& r) { r.options.gen_length = -8; }, "gen_length"},
      {[](Request& r) { r.options.gen_length = int64_t{1} << 40; }, "gen_length"},
      {[](Request& r) { r.options.gen_length = 113, r.options.block_length = {}; },
       "expected at most 128 tokens"},
      {[](Request& r) { r.options.block_length = 3; },
       "block_length: expected a divisor of gen_length (8), got 3"},
      {[](Request& r) { r.options.block_length = 0; }, "block_length"},
      {[](Request& r) { r.options.block_length = -4; }, "block_length"},
      {[](Request& r) { r.options.steps = 0; },
       "steps: expected a positive multiple of the number of blocks (8 / 4 = 2), got 0"},
      {[](Request& r) { r.options.steps = 5; }, "steps"},
      {[](Request& r) { r.options.steps = -2; }, "steps"},
      {[](Request& r) { r.options.temperature = std::nan(""); },
       "temperature: expected a finite number >= 0, got nan"},
      {[](Request& r) { r.options.temperature = -0.5; }, "temperature"},
      {[](Request& r) { r.options.temperature = INFINITY; }, "temperature"},
      {[](Request& r) { r.options.remasking = "high"; },
       "remasking: expected low_confidence or random, got \"high\""},
      {[](Request& r) { r.options.seed = -1; }, "seed"},
      {[](Request& r) { r.policy = make_policy("bicache:depth=9"); }, "depth: expected 0..4"},
  };
  for (const auto& [change, fragment] : cases) {
    Request bad = request(t, "none", 12, 4, 8, 1);
    change(bad);
    for (const bool second : {false, true}) {
      std::vector<Request> requests = {bad};
      if (second) requests.insert(requests.begin(), request(t, "none", 12, 4, 8, 1));
      try {
        Generation g(e, requests, 4096);
        ADD_FAILURE() << "expected an error: " << fragment;
      } catch (const std::invalid_argument& error) {
        EXPECT_NE(std::string(error.what()).find(fragment), std::string::npos) << error.what();
        EXPECT_EQ(std::string(error.what()).find("(request 1)") != std::string::npos, second)
            << error.what();
      }
    }
  }
  EXPECT_EQ(e->store().stats().entries, 0);
  EXPECT_THROW(Generation(e, {request(t, "none", 1, 1, 1, 1)}, 0), std::invalid_argument);
  EXPECT_THROW(Engine(t.load(), 0, 0), std::invalid_argument);
}

TEST(Engine, NothingToDo) {
  TinyModel t;
  Generation g(engine(t.load()), {}, 4096);
  EXPECT_TRUE(g.done());
  EXPECT_TRUE(g.step().empty());
  EXPECT_TRUE(g.results().empty());
}

// The quota of LLaDA's get_num_transfer_tokens, by hand.
TEST(Sampler, Quota) {
  GenerationOptions o;
  o.gen_length = 12;
  o.steps = 5;
  o.block_length = 12;
  o.resolve();
  const Sampler s(ModelConfig{}, o);
  std::vector<int64_t> counts;
  for (int64_t i = 0; i < 5; ++i) counts.push_back(s.quota(12, i));
  EXPECT_EQ(counts, (std::vector<int64_t>{3, 3, 2, 2, 2}));
}

TEST(Sampler, TiesGoToTheLowerPositionAndNanIsRefused) {
  ModelConfig c;
  c.vocab = 4;
  GenerationOptions o;
  o.gen_length = 3;
  o.resolve();
  const Sampler s(c, o);
  std::vector<float> logits = {0, 1, 1, 0, 0, 1, 1, 0, 0, 5, 0, 0};
  auto commits = s.sample(kernels(), {logits.data(), 3, 4}, {10, 11, 12}, 0, 2, 1);
  ASSERT_EQ(commits.size(), 2u);
  EXPECT_EQ(commits[0].position, 12);
  EXPECT_EQ(commits[1].position, 10);  // 10 and 11 tie
  EXPECT_EQ(commits[1].token, 1);      // tokens 1 and 2 tie
  std::vector<float> banned(4, -INFINITY);
  EXPECT_EQ(s.sample(kernels(), {banned.data(), 1, 4}, {5}, 0, 1, 1)[0].confidence, 0.0f);
  std::vector<float> nan = {0, NAN, 0, 0};
  EXPECT_THROW(s.sample(kernels(), {nan.data(), 1, 4}, {5}, 3, 1, 1), std::runtime_error);
}

}  // namespace
}  // namespace bicache
