// One generation: its steps, its end, cancellation, plans and requests that are refused, taps, the
// sampler.
#include <cmath>
#include <thread>

#include "requests.h"

namespace bicache {
namespace {

std::vector<float> forward(Engine& engine, std::vector<int32_t> tokens,
                           const std::vector<int64_t>& positions) {
  std::vector<float> logits(positions.size() * static_cast<size_t>(engine.model().config().vocab));
  engine.forward(std::move(tokens), positions, logits.data());
  return logits;
}

TEST(Generation, AShiftedModelKeepsTheLastPromptRowOutOfThePrefix) {
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

TEST(Generation, UndecidedPositionsAreMasks) {
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

TEST(Generation, MaskIdsInThePromptStay) {
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

TEST(Generation, CancelEndsARequestAtEveryStep) {
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

TEST(Generation, ACancelledRequestInTheQueueCostsNothing) {
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

TEST(Generation, PassesWithoutLogitsRepeatTheStep) {
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

TEST(Generation, PlansThatCannotWorkAreRefused) {
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
TEST(Generation, NanLogitsEndTheGeneration) {
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

TEST(Generation, ATapCannotUseItsOwnEngine) {
  TinyModel t;
  const auto e = engine(t.load());
  int calls = 0;
  e->set_tap([&](int, const char*, View<const float>) {
    ++calls;
    EXPECT_THROW(forward(*e, {1, 2}, {0}), std::runtime_error);
  });
  forward(*e, {1, 2, 3}, {0});
  EXPECT_GT(calls, 1);
  e->set_tap({});
  EXPECT_EQ(forward(*e, {1, 2}, {0}).size(), static_cast<size_t>(t.vocab));
}

TEST(Generation, TwoThreadsOnOneEngine) {
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

TEST(Generation, ForwardGivesPositionsInTheOrderAskedFor) {
  TinyModel t;
  const auto e = engine(t.load());
  const auto ids = t.ids(10, 1);
  const auto some = forward(*e, ids, {7, 2, 7});
  std::vector<int64_t> all_rows(10);
  for (int64_t i = 0; i < 10; ++i) all_rows[i] = i;
  const auto all = forward(*e, ids, all_rows);
  const auto row = [&](const std::vector<float>& x, int64_t i) {
    return std::vector<float>(x.begin() + i * t.vocab, x.begin() + (i + 1) * t.vocab);
  };
  EXPECT_EQ(row(some, 0), row(all, 7));
  EXPECT_EQ(row(some, 1), row(all, 2));
  EXPECT_EQ(row(some, 2), row(all, 7));
  EXPECT_TRUE(forward(*e, ids, {}).empty());
  EXPECT_THROW(forward(*e, ids, {10}), std::invalid_argument);
  EXPECT_THROW(forward(*e, {}, {}), std::invalid_argument);
  EXPECT_THROW(forward(*e, {static_cast<int32_t>(t.vocab)}, {0}), std::invalid_argument);
  EXPECT_THROW(forward(*e, std::vector<int32_t>(129, 1), {0}), std::invalid_argument);
}

TEST(Generation, BadRequestsAreRefusedBeforeAnythingRuns) {
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
       "remasking: expected one of low_confidence|random|origin|maskgit_plus|topk_margin|entropy, "
       "got \"high\""},
      {[](Request& r) { r.options.seed = -1; }, "seed"},
      {[](Request& r) { r.options.remasking = "origin|entropy"; }, "remasking: expected one of"},
      {[](Request& r) { r.options.threshold = 1.5; }, "threshold: expected 0..1, got 1.5"},
      {[](Request& r) { r.options.threshold = .9, r.options.factor = 1; },
       "factor: expected without threshold"},
      {[](Request& r) { r.options.factor = -1; }, "factor: expected a finite number >= 0, got -1"},
      {[](Request& r) { r.options.threshold = .9, r.options.remasking = "random"; },
       "threshold: expected with remasking low_confidence, maskgit_plus or topk_margin"},
      {[](Request& r) { r.options.factor = 1, r.options.remasking = "entropy"; },
       "factor: expected"},
      {[](Request& r) {
         r.options.threshold = .9, r.options.remasking = "maskgit_plus", r.options.alg_temp = 1;
       },
       "without alg_temp, got maskgit_plus with alg_temp"},
      {[](Request& r) { r.options.alg_temp = 1; },
       "alg_temp: expected with remasking maskgit_plus, topk_margin or entropy, got "
       "low_confidence"},
      {[](Request& r) { r.options.top_p = 0; }, "top_p: expected above 0 and up to 1, got 0"},
      {[](Request& r) { r.options.top_p = NAN; }, "top_p"},
      {[](Request& r) { r.options.top_k = 0; }, "top_k: expected >= 1, got 0"},
      {[](Request& r) { r.options.cfg_scale = -1; }, "cfg_scale: expected a finite number >= 0"},
      {[](Request& r) { r.options.suppress_tokens = {1, 53}; },
       "suppress_tokens: expected ids of 0..52, got 53"},
      {[](Request& r) {
         for (int64_t v = 0; v < 53; ++v) r.options.suppress_tokens.push_back(v);
       },
       "suppress_tokens: expected some ids left, got all 53"},
      {[](Request& r) {
         for (int64_t v = 1; v < 53; ++v) r.options.suppress_tokens.push_back(v);
         r.options.logits_eos_inf = true;
       },
       "suppress_tokens: expected some ids left, got all 53 with logits_eos_inf"},
      {[](Request& r) { r.options.confidence_eos_eot_inf = true, r.options.remasking = "entropy"; },
       "confidence_eos_eot_inf: expected with remasking low_confidence or random, got entropy"},
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

// An end token with no mask before it ends the request; the text is the same.
TEST(Generation, EarlyStopGivesTheSameText) {
  TinyModel t;
  t.vocab = 7;  // end-of-text comes soon
  const auto model = t.load();
  int stopped = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    Request r = request(t, "bicache:depth=1+fast_dllm", 9, 3, 16, seed);
    r.options.temperature = 2;
    r.options.seed = seed;
    const Result whole = generate(engine(model), {r})[0];
    r.options.early_stop = true;
    const Result early = generate(engine(model), {r})[0];
    const auto end = std::find(whole.tokens.begin(), whole.tokens.end(), 0) - whole.tokens.begin();
    EXPECT_TRUE(std::equal(whole.tokens.begin(), whole.tokens.begin() + std::min<int64_t>(end, 16),
                           early.tokens.begin()));
    EXPECT_EQ(early.finish_reason, whole.finish_reason);
    EXPECT_LE(early.stats.steps, whole.stats.steps);
    if (early.stats.steps == whole.stats.steps) continue;
    ++stopped;
    for (int64_t i = end; i < 16; ++i) {
      EXPECT_TRUE(!std::isnan(early.confidences[i]) || early.tokens[i] == 0);
    }
  }
  EXPECT_GT(stopped, 5);
}

// The unconditional branch is a request of its own whose prompt is masked; at scale s the logits
// are un + (s + 1) (cond - un), step by step, with and without caches.
TEST(Generation, GuidanceCombinesTwoRequests) {
  TinyModel t;
  const auto model = t.load();
  for (const std::string spec : {"none", "bicache:depth=2,refresh_steps=2+dllm_cache"}) {
    Request r = request(t, spec, 9, 3, 4, 1);
    r.options.block_length = 4;
    r.options.steps = 1;  // one pass: what is read is what is committed
    r.options.cfg_scale = 1.5;
    const Result got = generate(engine(model), {r})[0];
    std::vector<int32_t> cond = r.prompt;
    cond.resize(16, t.mask());
    const std::vector<int32_t> un(16, t.mask());
    const auto e = engine(model);
    const auto a = forward(*e, cond, {12, 13, 14, 15}), b = forward(*e, un, {12, 13, 14, 15});
    if (spec != "none") continue;  // BiCache's first pass is not the full one
    for (int64_t i = 0; i < 4; ++i) {
      int best = 0;
      const auto logit = [&](int64_t v) {
        const float x = a[i * t.vocab + v], y = b[i * t.vocab + v];
        return y + 2.5f * (x - y);
      };
      for (int v = 1; v < t.vocab; ++v) best = logit(v) > logit(best) ? v : best;
      EXPECT_EQ(got.tokens[i], best) << i;
    }
    r.options.cfg_scale = 0;
    const Result plain = generate(engine(model), {r})[0];
    EXPECT_NE(plain.tokens, got.tokens);
    EXPECT_EQ(2 * plain.stats.work[0].flops, got.stats.work[0].flops);
    EXPECT_EQ(2 * plain.stats.cache_bytes, got.stats.cache_bytes);
  }
}

// un + (s + 1) (cond - un) in float32, as published: s + 1 is rounded once. A scale beyond float32
// makes no NaN.
TEST(Generation, GuidanceRoundsItsFactorOnce) {
  TinyModel t;
  const auto e = engine(t.load());
  Request r = request(t, "none", 0, 3, 1, 1);
  std::vector<int32_t> cond = r.prompt;
  cond.push_back(t.mask());
  const auto a = forward(*e, cond, {3}), b = forward(*e, std::vector<int32_t>(4, t.mask()), {3});
  const auto confidence = [&](float factor) {
    std::vector<float> x(a.size());
    for (size_t v = 0; v < x.size(); ++v) x[v] = b[v] + factor * (a[v] - b[v]);
    return static_cast<float>(1 / kernels().row_stats(x.data(), t.vocab).sum_exp);
  };
  int differ = 0;
  for (const double scale : {0.18, 0.32, 0.43, 0.57, 0.67, 0.82}) {
    r.options.cfg_scale = scale;
    const float want = confidence(static_cast<float>(scale + 1));
    EXPECT_EQ(generate(e, {r})[0].confidences[0], want) << scale;
    differ += want != confidence(static_cast<float>(scale) + 1);
  }
  EXPECT_GT(differ, 0);
  r.options.cfg_scale = 1e300;
  EXPECT_NO_THROW(generate(e, {r}));
}

TEST(Generation, NothingToDo) {
  TinyModel t;
  Generation g(engine(t.load()), {}, 4096);
  EXPECT_TRUE(g.done());
  EXPECT_TRUE(g.step().empty());
  EXPECT_TRUE(g.results().empty());
}

// End of turn ends a text as end of text does.
TEST(Generation, AnEndOfTurnTokenIsAnEnd) {
  TinyModel t;
  t.vocab = 7;
  t.eot = 3;
  const auto model = t.load();
  int turns = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    Request r = request(t, "none", 0, 3, 8, seed);
    r.options.temperature = 2;
    r.options.seed = seed;
    r.options.suppress_tokens = {0};
    for (const bool early : {false, true}) {
      r.options.early_stop = early;
      const Result got = generate(engine(model), {r})[0];
      const bool ended = std::find(got.tokens.begin(), got.tokens.end(), 3) != got.tokens.end();
      EXPECT_EQ(got.finish_reason, ended ? "eos" : "length") << seed << " " << early;
      turns += ended;
    }
  }
  EXPECT_GT(turns, 0);
}

}  // namespace
}  // namespace bicache
