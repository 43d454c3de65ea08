// The decoding rules on logits made by hand.
#include <cmath>
#include <map>

#include "engine/choices.h"
#include "engine/sampler.h"
#include "requests.h"

namespace bicache {
namespace {

GenerationOptions options(int64_t g, const char* remasking = "low_confidence") {
  GenerationOptions o;
  o.gen_length = g;
  o.remasking = remasking;
  return o;
}

// Logits of positions whose best token is 1, with these probabilities among three tokens.
std::vector<float> with_confidences(const std::vector<double>& confidences) {
  std::vector<float> logits;
  for (const double c : confidences) {
    for (const double p : {(1 - c) / 2, c, (1 - c) / 2})
      logits.push_back(static_cast<float>(std::log(std::max(p, 1e-30))));
  }
  return logits;
}

std::vector<int64_t> committed(GenerationOptions o, const std::vector<double>& confidences,
                               int64_t count) {
  ModelConfig c;
  c.vocab = 3;
  o.resolve();
  auto logits = with_confidences(confidences);
  std::vector<int64_t> positions;
  for (size_t i = 0; i < confidences.size(); ++i) positions.push_back(static_cast<int64_t>(i));
  std::vector<int64_t> chosen;
  const View<float> view(logits.data(), static_cast<int64_t>(positions.size()), 3);
  for (const Commit& x : Sampler(c, o).sample(kernels(), view, positions, {}, count, 1))
    chosen.push_back(x.position);
  return chosen;
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
  for (int64_t i = 0; i < 5; ++i) counts.push_back(s.quota({i, i, 12}, 12));
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
  auto commits = s.sample(kernels(), {logits.data(), 3, 4}, {10, 11, 12}, {}, 2, 1);
  ASSERT_EQ(commits.size(), 2u);
  EXPECT_EQ(commits[0].position, 12);
  EXPECT_EQ(commits[1].position, 10);  // 10 and 11 tie
  EXPECT_EQ(commits[1].token, 1);      // tokens 1 and 2 tie
  std::vector<float> banned(4, -INFINITY);
  EXPECT_EQ(s.sample(kernels(), {banned.data(), 1, 4}, {5}, {}, 1, 1)[0].confidence, 0.0f);
  std::vector<float> nan = {0, NAN, 0, 0};
  EXPECT_THROW(s.sample(kernels(), {nan.data(), 1, 4}, {5}, {3, 0, 0}, 1, 1), std::runtime_error);
}

// Fast-dLLM (spec B.2): every confidence that reaches the threshold, at least what the schedule
// asks for.
TEST(Sampler, Threshold) {
  GenerationOptions o = options(5);
  o.threshold = 0.8;
  const std::vector<double> c = {0.5, 0.95, 0.81, 0.79, 0.9};
  EXPECT_EQ(committed(o, c, 1), (std::vector<int64_t>{1, 4, 2}));
  EXPECT_EQ(committed(o, c, 4), (std::vector<int64_t>{1, 4, 2, 3}));
  o.threshold = 0.99;
  EXPECT_EQ(committed(o, c, 1), (std::vector<int64_t>{1}));
  o.threshold = 0.0;
  EXPECT_EQ(committed(o, c, 1).size(), 5u);
}

// Spec B.3: the n-th needs 1 - f / (n + 1); the first always passes; if the scan comes to the last
// one, that passes, too.
TEST(Sampler, Factor) {
  GenerationOptions o = options(5);
  o.factor = 1;  // 1/2, 2/3, 3/4, 4/5, 5/6
  EXPECT_EQ(committed(o, {0.4, 0.35, 0.36, 0.37, 0.38}, 1), (std::vector<int64_t>{0}));
  EXPECT_EQ(committed(o, {0.9, 0.7, 0.74, 0.5, 0.6}, 1), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(committed(o, {0.9, 0.7, 0.74, 0.5, 0.6}, 3), (std::vector<int64_t>{0, 2, 1}));
  EXPECT_EQ(committed(o, {0.9, 0.9, 0.9, 0.9, 0.4}, 1).size(), 5u);  // the last one is let through
  EXPECT_EQ(committed(o, {0.9, 0.9, 0.9, 0.7, 0.4}, 1).size(), 3u);
  EXPECT_EQ(committed(o, {0.4}, 1).size(), 1u);
  EXPECT_EQ(committed(o, {0.4, 0.4}, 1).size(), 2u);
}

// Spec D.2: int(masks (1 - s / t)) on timesteps from 1 to 1e-3, all that are left at the last step.
TEST(Sampler, DreamsSchedule) {
  for (const int64_t steps : {1, 4, 7, 64}) {
    GenerationOptions o = options(64, "maskgit_plus");
    o.steps = steps;
    o.resolve();
    EXPECT_EQ(o.block_length, 64);
    const Sampler s(ModelConfig{}, o);
    int64_t left = 64;
    for (int64_t i = 0; i < steps; ++i) {
      const double t = 1 - (1 - 1e-3) * static_cast<double>(i) / static_cast<double>(steps);
      const double next = 1 - (1 - 1e-3) * static_cast<double>(i + 1) / static_cast<double>(steps);
      const int64_t n = s.quota({i, i, 64}, left);
      const double share = static_cast<double>(left) * (1 - next / t);
      if (i == steps - 1) {
        EXPECT_EQ(n, left);
      } else if (std::abs(share - std::round(share)) > 1e-3) {
        EXPECT_EQ(n, static_cast<int64_t>(share)) << steps << " " << i;
      }
      left -= n;
    }
    EXPECT_EQ(left, 0);
  }
}

// torch.linspace in float32, each timestep rounded once: a count may hang on the last bit.
TEST(Sampler, DreamsTimestepsAreRoundedOnce) {
  const double first = 1, last = 1e-3f;
  int differ = 0;
  for (int64_t steps = 2; steps < 300; ++steps) {
    GenerationOptions o = options(128, "maskgit_plus");
    o.steps = steps;
    o.resolve();
    const Sampler s(ModelConfig{}, o);
    const float d = (1e-3f - 1.0f) / static_cast<float>(steps);
    const auto t = [&](int64_t i) {
      const auto end = static_cast<double>(steps - i);
      return static_cast<float>(i < (steps + 1) / 2 ? first + double{d} * static_cast<double>(i)
                                                    : last - double{d} * end);
    };
    const auto twice = [&](int64_t i) {
      volatile float step = d * static_cast<float>(i < (steps + 1) / 2 ? i : steps - i);
      return i < (steps + 1) / 2 ? 1.0f + step : 1e-3f - step;
    };
    for (int64_t i = 0; i < steps - 1; ++i) {
      const auto want = static_cast<int64_t>(128.0f * (1.0f - t(i + 1) / t(i)));
      EXPECT_EQ(s.quota({i, i, 128}, 128), want) << steps << " " << i;
      differ += want != static_cast<int64_t>(128.0f * (1.0f - twice(i + 1) / twice(i)));
    }
  }
  EXPECT_GT(differ, 0);
}

TEST(Sampler, OriginDrawsPositionsWithTheirShare) {
  GenerationOptions o = options(1000, "origin");
  o.steps = 10;
  o.resolve();
  const Sampler s(ModelConfig{}, o);
  std::vector<int64_t> masked(1000);
  for (int64_t i = 0; i < 1000; ++i) masked[i] = i;
  const auto first = s.drawn({0, 0, 1000}, masked);
  EXPECT_NEAR(static_cast<double>(first.size()), 99.9, 4 * std::sqrt(90.0));
  EXPECT_NE(s.drawn({1, 0, 1000}, masked), first);  // other steps, other draws
  EXPECT_EQ(s.drawn({9, 9, 1000}, masked).size(), 1000u);
}

// Dream's confidences of softmax(x / T) over the kept tokens, by hand.
TEST(Sampler, DreamsConfidences) {
  const std::vector<float> x = {0, 2, 1, -1};
  const auto confidence = [&](const char* rule, auto change) {
    GenerationOptions o = options(4, rule);
    change(o);
    o.resolve();
    return choose_token(o, x.data(), 4, kernels().row_stats(x.data(), 4), {7, 1, 2}).confidence;
  };
  const auto plain = [](GenerationOptions&) {};
  const double sum = std::exp(0.) + std::exp(2.) + std::exp(1.) + std::exp(-1.);
  EXPECT_NEAR(confidence("maskgit_plus", plain), std::exp(2.) / sum, 1e-6);
  EXPECT_NEAR(confidence("topk_margin", plain), (std::exp(2.) - std::exp(1.)) / sum, 1e-12);
  double entropy = 0;
  for (const double l : x) entropy += std::exp(l) / sum * std::log(std::exp(l) / sum + 1e-10);
  EXPECT_NEAR(confidence("entropy", plain), entropy, 1e-12);
  const double two = std::exp(2.) + std::exp(1.);
  const auto top_2 = [](GenerationOptions& o) { o.top_k = 2; };
  const auto top_p = [](GenerationOptions& o) { o.top_p = 0.7; };  // the first alone has .64
  EXPECT_NEAR(confidence("maskgit_plus", top_2), std::exp(2.) / two, 1e-12);
  EXPECT_NEAR(confidence("maskgit_plus", top_p), std::exp(2.) / two, 1e-12);
  EXPECT_NEAR(confidence("topk_margin", [](GenerationOptions& o) { o.top_k = 1; }), 1, 1e-12);
}

// Only what top_p and top_k keep is ever drawn, and that in proportion to softmax(x / T).
TEST(Sampler, DrawsFromTheKeptTokens) {
  std::vector<float> x(200, -3);
  x[150] = 2, x[3] = 1.5, x[90] = 1, x[40] = 1;
  const RowStats stats = kernels().row_stats(x.data(), 200);
  const auto counts = [&](auto change) {
    GenerationOptions o = options(4);
    o.temperature = 0.7;
    change(o);
    o.resolve();
    std::map<int32_t, int> n;
    for (int64_t i = 0; i < 4000; ++i) ++n[choose_token(o, x.data(), 200, stats, {1, i, 5}).token];
    return n;
  };
  const auto k2 = counts([](GenerationOptions& o) { o.top_k = 2; });
  ASSERT_EQ(k2.size(), 2u);
  const double share = 1 / (1 + std::exp(-0.5 / 0.7));
  EXPECT_NEAR(k2.at(150), 4000 * share, 4 * std::sqrt(4000 * share * (1 - share)));
  EXPECT_EQ(counts([](GenerationOptions& o) { o.top_k = 3; }).size(), 4u);  // two tie for the third
  EXPECT_EQ(counts([](GenerationOptions& o) { o.top_p = 1e-9; }).size(), 1u);
  EXPECT_EQ(counts([](GenerationOptions& o) { o.top_p = 0.75; }).size(), 3u);
  EXPECT_GT(counts([](GenerationOptions&) {}).size(), 20u);
}

// At a temperature that no product with the noise survives, too.
TEST(Sampler, NoTemperatureDrawsATokenThatIsBanned) {
  const std::vector<float> x = {-INFINITY, -INFINITY, 1, -INFINITY, 2};
  const RowStats stats = kernels().row_stats(x.data(), 5);
  for (const double temperature : {5e-324, 1.0, 1e300, 1.7e308}) {
    for (const char* rule : {"low_confidence", "entropy"}) {
      GenerationOptions o = options(4, rule);
      o.temperature = temperature;
      o.resolve();
      std::map<int32_t, int> n;
      for (int64_t i = 0; i < 200; ++i) ++n[choose_token(o, x.data(), 5, stats, {1, i, 5}).token];
      EXPECT_EQ(n[2] + n[4], 200) << rule << " " << temperature;
      const int least = temperature > 1 ? 60 : 0;
      EXPECT_GE(std::min(n[2], n[4]), least) << rule << " " << temperature;
      EXPECT_TRUE(temperature >= 1 || n[4] == 200) << rule;
    }
  }
}

// However little randomness the order is given: the most confident first.
TEST(Sampler, ATinyAlgTempKeepsTheOrder) {
  GenerationOptions o = options(4, "maskgit_plus");
  for (const double alg_temp : {0.0, 5e-324, 1e-310, 1e-100, 1e-9}) {
    o.alg_temp = alg_temp;
    EXPECT_EQ(committed(o, {0.5, 0.7, 0.9, 0.6}, 3), (std::vector<int64_t>{2, 1, 3})) << alg_temp;
  }
}

TEST(Sampler, SuppressedTokensAreNeverChosen) {
  ModelConfig c;
  c.vocab = 4;
  GenerationOptions o = options(1);
  o.suppress_tokens = {1, 2};
  o.resolve();
  std::vector<float> logits = {0, 9, 8, 1};
  const auto commits = Sampler(c, o).sample(kernels(), {logits.data(), 1, 4}, {5}, {}, 1, 1);
  EXPECT_EQ(commits[0].token, 3);
  EXPECT_NEAR(commits[0].confidence, std::exp(1.) / (1 + std::exp(1.)), 1e-6);
}

// The most probable id has no token; probabilities are of those that have one.
TEST(Sampler, IdsWithoutATokenAreNotSampled) {
  ModelConfig c;
  c.vocab = 4;
  const std::vector<float> logits = {0, 1, 2, 9};
  for (const char* rule : {"low_confidence", "maskgit_plus", "entropy", "topk_margin"}) {
    for (const double temperature : {0.0, 3.0}) {
      GenerationOptions o;
      o.remasking = rule;
      o.temperature = temperature;
      o.resolve();
      c.known_ids = 3;
      auto x = logits;
      const Commit known =
          Sampler(c, o).sample(kernels(), {x.data(), 1, 4}, {5}, {0, 0, 1}, 1, 1).at(0);
      EXPECT_LT(known.token, 3);
      c.known_ids = 0;
      o.suppress_tokens = {3};
      x = logits;
      const Commit banned =
          Sampler(c, o).sample(kernels(), {x.data(), 1, 4}, {5}, {0, 0, 1}, 1, 1).at(0);
      EXPECT_EQ(known.token, banned.token);
      EXPECT_FLOAT_EQ(known.confidence, banned.confidence);
    }
  }
}

}  // namespace
}  // namespace bicache
