// What ends a response.
#include <cmath>

#include "requests.h"

namespace bicache {
namespace {

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

}  // namespace
}  // namespace bicache
