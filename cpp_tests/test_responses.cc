// What stands in a response already, what ends it, and requests of different lengths in one batch.
#include <array>
#include <cmath>

#include "requests.h"

namespace bicache {
namespace {

// Tokens at every third position, the rest to be filled.
Request partly_given(const TinyModel& t, const std::string& cache, int64_t g, unsigned seed) {
  Request r = request(t, cache, 9, 3, g, seed);
  r.response.assign(static_cast<size_t>(g), t.mask());
  for (size_t i = seed % 3; i < r.response.size(); i += 3)
    r.response[i] = 1 + static_cast<int32_t>(i);
  return r;
}

int64_t masks(const TinyModel& t, const Request& r) {
  return std::count(r.response.begin(), r.response.end(), t.mask());
}

TEST(Responses, WhatIsGivenStaysUnderEveryPolicyAndRule) {
  for (const bool shift : {false, true}) {
    TinyModel t;
    t.shift = shift;
    const auto model = t.load();
    unsigned seed = 0;
    for (const Request& like : crowd(t)) {
      Request r = partly_given(t, like.policy->spec(), 12, seed++);
      const GenerationOptions plain = r.options;
      r.options = like.options;
      r.options.gen_length = plain.gen_length, r.options.block_length = plain.block_length;
      r.options.suppress_tokens = {t.mask()};
      Generation g(engine(model), {r}, 4096);
      int64_t committed = 0;
      while (!g.done()) {
        for (const StepEvent& e : g.step()) {
          for (const Commit& c : e.commits) {
            ++committed;
            EXPECT_EQ(r.response[static_cast<size_t>(c.position - 12)], t.mask());
          }
        }
      }
      const Result got = g.results()[0];
      EXPECT_EQ(committed, masks(t, r)) << r.policy->spec() << " " << r.options.remasking;
      EXPECT_LE(got.stats.steps, masks(t, r));
      for (size_t i = 0; i < r.response.size(); ++i) {
        EXPECT_TRUE(r.response[i] == t.mask() || got.tokens[i] == r.response[i]);
        EXPECT_EQ(std::isnan(got.confidences[i]), r.response[i] != t.mask());
      }
    }
  }
}

// A token that was given is one that was committed: from any canvas of a request the rest follows,
// bit for bit.
TEST(Responses, ACanvasThatIsGivenGoesOn) {
  TinyModel t;
  const auto model = t.load();
  for (const std::string cache : {"none", "fast_dllm:refresh_steps=1"}) {
    Request r = request(t, cache, 9, 3, 8, 5);
    r.options.block_length = 8;
    const Result whole = generate(engine(model), {r})[0];
    Generation g(engine(model), {r}, 4096);
    for (int64_t done = 1; done < 8; ++done) {
      const std::vector<int32_t> canvas = g.step()[0].canvas;
      Request rest = r;
      rest.response.assign(canvas.end() - 8, canvas.end());
      const Result got = generate(engine(model), {rest})[0];
      EXPECT_EQ(got.stats.steps, 8 - done);
      EXPECT_EQ(got.tokens, whole.tokens) << done;
      for (size_t i = 0; i < 8; ++i) {
        EXPECT_TRUE(std::isnan(got.confidences[i]) || got.confidences[i] == whole.confidences[i]);
      }
    }
  }
}

TEST(Responses, WithNothingToFillNothingRuns) {
  TinyModel t;
  const auto e = engine(t.load());
  Request full = request(t, "bicache:depth=2", 9, 3, 4, 1);
  full.response = {1, 2, 3, 4};
  full.options.cfg_scale = 1;
  Request ended = request(t, "bicache:depth=2", 9, 3, 4, 1);
  ended.response = {1, 0, t.mask(), 2};
  ended.options.early_stop = true;
  const Request other = request(t, "none", 9, 3, 4, 2);
  const auto results = generate(e, {full, other, ended});
  EXPECT_EQ(results[0].tokens, full.response);
  EXPECT_EQ(results[0].finish_reason, "length");
  EXPECT_EQ(results[2].tokens, (std::vector<int32_t>{1, 0, 0, 2}));
  EXPECT_EQ(results[2].finish_reason, "eos");
  for (const Result& r : {results[0], results[2]}) {
    EXPECT_EQ(r.stats.passes, 0);
    EXPECT_TRUE(r.stats.entry_work.empty());
    for (const Work& w : r.stats.work) EXPECT_EQ(w.flops, 0);
    for (const float c : r.confidences) EXPECT_TRUE(std::isnan(c));
  }
  EXPECT_EQ(e->store().stats().entries, 0);
  expect_same(results[1], generate(e, {other})[0], "the other request");
}

// Guidance is towards all that was given: the unconditional canvas has none of it.
TEST(Responses, GuidanceIsTowardsTheGivenTokens) {
  TinyModel t;
  const auto e = engine(t.load());
  Request r = partly_given(t, "none", 4, 1);
  r.options.steps = 1;
  r.options.cfg_scale = 1.5;
  const Result got = generate(e, {r})[0];
  std::vector<int32_t> cond = r.prompt;
  cond.insert(cond.end(), r.response.begin(), r.response.end());
  const std::vector<int32_t> un(cond.size(), t.mask());
  std::vector<float> a(static_cast<size_t>(t.vocab)), b(a.size());
  for (int64_t i = 0; i < 4; ++i) {
    if (r.response[i] != t.mask()) continue;
    e->forward(cond, {12 + i}, a.data());
    e->forward(un, {12 + i}, b.data());
    for (size_t v = 0; v < a.size(); ++v) a[v] = b[v] + 2.5f * (a[v] - b[v]);
    EXPECT_EQ(got.tokens[i], std::max_element(a.begin(), a.end()) - a.begin()) << i;
  }
}

TEST(Responses, StopEndsARequestWithItsEndToken) {
  TinyModel t;
  const auto model = t.load();
  for (int64_t at = 0; at <= 8; ++at) {
    for (const bool ends : {false, true}) {
      Request r = request(t, "bicache:depth=2", 12, 4, 8, 1);
      r.options.end_tokens = ends ? std::vector<int64_t>{40, 0} : std::vector<int64_t>{};
      r.options.suppress_tokens = {40, 0};
      Generation g(engine(model), {r, request(t, "none", 12, 4, 8, 2)}, 4096);
      for (int64_t i = 0; i < at; ++i) g.step();
      g.stop(0);
      while (!g.done()) g.step();
      EXPECT_EQ(g.steps_done(), g.steps_total());
      const auto results = g.results();
      EXPECT_EQ(results[0].stats.steps, at);
      EXPECT_EQ(results[0].finish_reason, at < 8 ? "stop" : "length");
      for (size_t i = 0; i < 8; ++i) {
        EXPECT_TRUE(!std::isnan(results[0].confidences[i]) ||
                    results[0].tokens[i] == (ends ? 40 : t.mask()));
      }
      EXPECT_EQ(results[1].stats.steps, 8);
    }
  }
  Generation g(engine(model), {request(t, "none", 1, 1, 1, 1)}, 4096);
  EXPECT_THROW(g.stop(1), std::invalid_argument);
}

// end_tokens replaces what the model says.
TEST(Responses, EndTokensAreTheRequests) {
  TinyModel t;
  t.vocab = 7;
  const auto model = t.load();
  int early = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    Request r = request(t, "none", 0, 3, 16, seed);
    r.options.temperature = 2;
    r.options.seed = seed;
    r.options.suppress_tokens = {t.mask()};
    const auto run = [&](std::optional<std::vector<int64_t>> ends, bool stop) {
      r.options.end_tokens = std::move(ends);
      r.options.early_stop = stop;
      return generate(engine(model), {r})[0];
    };
    const Result whole = run({}, false);
    const auto has = [&](const Result& x, int32_t a) {
      return std::find(x.tokens.begin(), x.tokens.end(), a) != x.tokens.end();
    };
    EXPECT_EQ(whole.finish_reason, has(whole, 0) ? "eos" : "length");
    EXPECT_EQ(run({{}}, false).finish_reason, "length");
    const Result other = run({{3, 4}}, false);
    EXPECT_EQ(other.tokens, whole.tokens);
    EXPECT_EQ(other.finish_reason, has(whole, 3) || has(whole, 4) ? "eos" : "length");
    const Result stopped = run({{3, 4}}, true);
    EXPECT_EQ(stopped.finish_reason, other.finish_reason);
    for (size_t i = 0; i < 16; ++i) {
      EXPECT_TRUE(!std::isnan(stopped.confidences[i]) || stopped.tokens[i] == 3);
    }
    early += stopped.stats.steps < whole.stats.steps;
  }
  EXPECT_GT(early, 5);
}

TEST(Responses, WrongOnesAreRefused) {
  TinyModel t;
  const auto e = engine(t.load());
  using Change = void (*)(Request&);
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](Request& r) { r.response = {1, 2}; }, "response: expected 8 tokens (gen_length), got 2"},
      {[](Request& r) { r.response.assign(8, 1), r.response[3] = 53; },
       "response token 3: expected an id of 0..52, got 53"},
      {[](Request& r) { r.response.assign(8, -1); }, "response token 0"},
      {[](Request& r) { r.options.end_tokens = {{1, 53}}; },
       "end_tokens: expected ids of 0..52, got 53"},
      {[](Request& r) { r.options.end_tokens = {{-1}}; }, "end_tokens"},
      {[](Request& r) { r.options.end_tokens = {{52}}; },
       "end_tokens: expected ids other than the mask's, got 52"},
      {[](Request& r) { r.options.end_tokens.emplace(), r.options.early_stop = true; },
       "early_stop: expected a model with an end-of-text or end-of-turn token, or end_tokens"},
  };
  for (const auto& [change, fragment] : cases) {
    Request bad = request(t, "none", 12, 4, 8, 1);
    change(bad);
    try {
      Generation g(e, {bad}, 4096);
      ADD_FAILURE() << "expected an error: " << fragment;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(fragment), std::string::npos) << error.what();
    }
  }
}

// No row is there for another one's length: every pass runs the sum of its requests' rows.
TEST(Responses, ABatchOfDifferentLengthsHasNoPadding) {
  TinyModel t;
  const auto e = engine(t.load());
  const std::vector<std::array<int64_t, 2>> shapes = {{1, 3}, {17, 8}, {4, 1}, {30, 12}, {9, 5}};
  std::vector<Request> requests;
  for (const auto& [u, g] : shapes)
    requests.push_back(request(t, "none", 0, u, g, static_cast<unsigned>(u)));
  std::vector<Result> alone;
  for (const Request& r : requests) alone.push_back(generate(e, {r})[0]);
  std::vector<int64_t> rows;  // that entered each layer, pass by pass
  e->set_tap([&](int layer, const char* name, View<const float> values) {
    if (layer < t.layers && std::string(name) == "residual") rows.push_back(values.rows);
  });
  const auto together = generate(e, requests);
  e->set_tap({});
  std::vector<int64_t> want;
  for (int64_t step = 0; step < 12; ++step) {
    int64_t sum = 0;
    for (const auto& [u, g] : shapes) sum += step < g ? u + g : 0;
    want.insert(want.end(), static_cast<size_t>(t.layers), sum);
  }
  EXPECT_EQ(rows, want);
  for (size_t i = 0; i < requests.size(); ++i) {
    expect_same(together[i], alone[i], "request " + std::to_string(i));
    for (size_t l = 0; l < alone[i].stats.work.size(); ++l) {
      EXPECT_EQ(together[i].stats.work[l].flops, alone[i].stats.work[l].flops);
      EXPECT_EQ(together[i].stats.work[l].rows_of(Op::attention),
                alone[i].stats.work[l].rows_of(Op::attention));
    }
  }
}

}  // namespace
}  // namespace bicache
