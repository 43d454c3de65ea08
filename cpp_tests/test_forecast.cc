// What is predicted from the plans alone is what gemm() and attention() count.
#include "engine/forecast.h"
#include "requests.h"

namespace bicache {
namespace {

const std::vector<std::string> kPolicies = {
    "none",
    "naive",
    "naive:source=first_request",
    "bicache:depth=2,refresh_steps=3",
    "bicache:depth=3,splice=strict,refresh=block",
    "bicache:depth=0:1/50:3,refresh_steps=2",
    "fast_dllm:mode=prefix",
    "fast_dllm:mode=dual,refresh_steps=2",
    "fast_dllm:mode=dual,block_start=fill",
    "dllm_cache:prompt_interval_steps=3,gen_interval_steps=2,transfer_ratio=0.3",
    "dllm_cache:transfer_ratio=0",
    "dllm_cache:gen_interval_steps=1",
    "dllm_cache:drift=since_recompute,transfer_ratio=0.9",
    "dllm_cache:new_tokens=recompute",
    "dllm_cache:new_tokens=recompute,transfer_ratio=0.95,gen_interval_steps=4",
    "bicache:depth=2,refresh_steps=2+dllm_cache:prompt_interval_steps=3,gen_interval_steps=4",
    "bicache:depth=1+fast_dllm:mode=dual,block_start=fill",
    "naive+dllm_cache"};

// `at_most`: the bytes of `b` may be less than those of `a`.
void expect_same_work(const std::vector<Work>& a, const std::vector<Work>& b,
                      const std::string& what, bool at_most = false) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t l = 0; l < a.size(); ++l) {
    EXPECT_EQ(a[l].rows, b[l].rows) << what << " layer " << l;
    EXPECT_EQ(a[l].flops, b[l].flops) << what << " layer " << l;
    if (at_most) {
      EXPECT_GE(a[l].bytes, b[l].bytes) << what << " layer " << l;
    } else {
      EXPECT_EQ(a[l].bytes, b[l].bytes) << what << " layer " << l;
    }
  }
}

// `counted`: what became of r in a fresh engine.
void expect_foreseen(const Model& model, const Request& r, const Result& counted, Engine& engine) {
  ModelShape shape{model.config(), model.weights().dtype, model.kv_dtype(), model.backend(),
                   &model.kernels()};
  EXPECT_EQ(shape.weight_bytes(), model.weights().size_bytes());
  const Forecast f = forecast(shape, *r.policy, r.prefix,
                              static_cast<int64_t>(r.prompt.size()) - r.prefix, r.options, {});
  const std::string what = r.policy->spec();
  // Which experts rows choose is known only where they choose all of them.
  const bool at_most = shape.config.experts > shape.config.experts_per_row;
  expect_same_work(f.stats.work, counted.stats.work, what, at_most);
  expect_same_work(f.stats.entry_work, counted.stats.entry_work, what + " entry", at_most);
  EXPECT_EQ(f.stats.steps, counted.stats.steps) << what;
  EXPECT_EQ(f.stats.passes, counted.stats.passes) << what;
  EXPECT_EQ(f.stats.refreshes, counted.stats.refreshes) << what;
  EXPECT_EQ(f.stats.depths, counted.stats.depths) << what;
  EXPECT_EQ(f.stats.cache_bytes, counted.stats.cache_bytes) << what;
  EXPECT_EQ(f.stats.prefix_tokens, counted.stats.prefix_tokens) << what;
  int64_t entry_bytes = 0;
  for (const PrefixStore::Item& item : engine.store().items())
    entry_bytes += item.entry->size_bytes();
  EXPECT_EQ(f.entry_bytes, entry_bytes) << what;
}

TEST(Forecast, EqualsWhatIsCounted) {
  TinyModel gqa, normed, shifted;
  normed.qk_norm = true;
  normed.vocab = 131;  // not a multiple of a panel
  shifted.shift = true;
  TinyModel dream, illada, moe, all;
  dream.family = "dream";
  illada.family = "illada";
  moe.family = all.family = "llada-moe";
  all.top_k = all.experts = 3;
  for (const Kernels* kernels : tables_under_test(kSanitized)) {
    for (const TinyModel& t : thinned<TinyModel>({normed, dream, gqa, moe, shifted, illada, all})) {
      for (const auto& [dtype, kv] : {std::pair{DType::f32, DType::f32},
                                      {DType::f32, DType::bf16},
                                      {DType::bf16, DType::bf16},
                                      {DType::bf16, DType::f32},
                                      {DType::int8, DType::bf16},
                                      {DType::int4, DType::bf16}}) {
        // What other families add does not depend on types, except that a router has its own.
        if (t.family != "llada" && dtype != DType::int8) continue;
        const auto model = t.load(*kernels, dtype, kv);
        for (const std::string& spec : kPolicies) {
          for (const auto& [p, u, g] : {std::tuple{15, 5, 8}, {0, 9, 12}, {12, 1, 1}}) {
            Request r = request(t, spec, p, u, g, 1);
            r.options.suppress_tokens = {t.mask()};  // a tied head likes what it saw
            const auto e = engine(model);
            expect_foreseen(*model, r, generate(e, {r})[0], *e);
          }
        }
      }
    }
  }
}

TEST(Forecast, KnowsTheDecodingRules) {
  TinyModel t;
  const auto model = t.load();
  using Change = void (*)(GenerationOptions&);
  for (const Change change : std::initializer_list<Change>{
           [](GenerationOptions& o) { o.steps = 3; },
           [](GenerationOptions& o) { o.steps = 24, o.block_length = 12; },
           [](GenerationOptions& o) { o.remasking = "origin", o.block_length = 12; },
           [](GenerationOptions& o) { o.remasking = "origin", o.steps = 6; },
           [](GenerationOptions& o) { o.remasking = "entropy", o.block_length = {}; },
           [](GenerationOptions& o) { o.remasking = "maskgit_plus", o.steps = 6; },
           [](GenerationOptions& o) { o.cfg_scale = 1.5; }}) {
    for (const std::string spec : {"none", "bicache:depth=2,refresh_steps=3", "dllm_cache",
                                   "dllm_cache:new_tokens=recompute",
                                   "bicache:depth=1+fast_dllm:mode=dual,block_start=fill"}) {
      Request r = request(t, spec, 15, 5, 12, 1);
      change(r.options);
      const auto e = engine(model);
      expect_foreseen(*model, r, generate(e, {r})[0], *e);
    }
  }
}

// In a batch, rows and FLOPs stay each request's own, and the bytes of all are those of one pass.
TEST(Forecast, HoldsForEveryRequestOfABatch) {
  TinyModel t;
  const auto model = t.load();
  std::vector<Request> requests;
  for (size_t i = 0; i < kPolicies.size(); ++i)
    requests.push_back(request(t, kPolicies[i], 5 + static_cast<int64_t>(i) % 7, 3, 8, 1));
  const auto results = generate(engine(model), requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    const Forecast f =
        forecast({model->config(), DType::f32, DType::f32, Backend::packed, &model->kernels()},
                 *requests[i].policy, requests[i].prefix, 3, requests[i].options, {});
    for (size_t l = 0; l < f.stats.work.size(); ++l) {
      EXPECT_EQ(f.stats.work[l].flops, results[i].stats.work[l].flops) << kPolicies[i];
      EXPECT_EQ(f.stats.work[l].rows, results[i].stats.work[l].rows) << kPolicies[i];
      EXPECT_GE(f.stats.work[l].bytes, results[i].stats.work[l].bytes) << kPolicies[i];
    }
  }
}

TEST(Forecast, TheUncachedLoopRunsTheHeadOnEveryRow) {
  TinyModel t;
  const ModelShape shape{t.load()->config()};
  GenerationOptions o;
  o.gen_length = 8;
  const Forecast f = forecast(shape, *make_policy("none"), 0, 12, o, {});
  const ModelConfig& c = shape.config;
  const int64_t layer = 2 * (2 * c.dim * c.q_width() + 2 * c.dim * c.kv_width() +
                             3 * c.dim * c.ffn + 2 * 20 * c.q_width());
  EXPECT_EQ(f.vanilla_flops, 8 * 20 * (c.layers * layer + 2 * c.dim * c.vocab));
  int64_t none = 0;
  for (const Work& w : f.stats.work) none += w.flops;
  EXPECT_EQ(f.vanilla_flops - none, (8 * 20 - 36) * 2 * c.dim * c.vocab);  // 8 + 7 + ... + 1 masks
}

TEST(Forecast, AdaptiveRulesNeedARate) {
  TinyModel t;
  const ModelShape shape{t.load()->config()};
  GenerationOptions o;
  o.gen_length = 12;
  o.threshold = 0.9;
  const auto steps = [&](double rate) {
    return forecast(shape, *make_policy("none"), 0, 12, o, rate).stats.steps;
  };
  EXPECT_EQ(steps(1), 12);
  EXPECT_EQ(steps(3), 4);
  EXPECT_EQ(steps(1.5), 8);
  EXPECT_EQ(steps(100), 1);
  EXPECT_EQ(steps(1e300), 1);
  EXPECT_THROW(forecast(shape, *make_policy("none"), 0, 12, o, {}), std::invalid_argument);
  EXPECT_THROW(steps(0.5), std::invalid_argument);
  o.threshold = {};
  EXPECT_THROW(steps(2), std::invalid_argument);
}

TEST(Forecast, RefusesWhatItCannotForesee) {
  TinyModel t;
  const ModelShape shape{t.load()->config()};
  GenerationOptions o;
  o.gen_length = 8;
  const auto error = [&](const std::string& spec, int64_t p, int64_t u) -> std::string {
    try {
      forecast(shape, *make_policy(spec), p, u, o, {});
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "none";
  };
  EXPECT_EQ(error("bicache:depth=2", 10, 2), "none");
  EXPECT_NE(error("bicache:depth=probe:0.9", 10, 2).find("does not look at activations"),
            std::string::npos);
  EXPECT_NE(error("bicache:depth=1,refresh=drift:0.1", 10, 2).find("activations"),
            std::string::npos);
  EXPECT_NE(error("bicache:depth=9", 10, 2).find("expected 0..4"), std::string::npos);
  EXPECT_NE(error("none", 0, 0).find("expected 1..128 tokens"), std::string::npos);
  EXPECT_NE(error("none", -1, 5).find("expected 1..128 tokens"), std::string::npos);
  EXPECT_NE(error("none", 100, 25).find("at most 128"), std::string::npos);
}

// A config.json may claim any size.
TEST(Forecast, RefusesWhatCannotBeCounted) {
  ModelShape shape{TinyModel().load()->config()};
  ModelConfig& c = shape.config;
  c.layers = 4096;
  c.dim = c.ffn = c.vocab = c.embeddings = c.context = int64_t{1} << 24;
  c.head_dim = c.dim / c.heads;
  GenerationOptions o;
  o.gen_length = 8;
  const auto error = [&](int64_t u) -> std::string {
    try {
      forecast(shape, *make_policy("none"), 0, u, o, {});
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "none";
  };
  EXPECT_NE(error(1).find("[plan] FLOPs: expected a number below 2^63"), std::string::npos);
  c.layers = 32;
  c.dim = 4096, c.ffn = 12288, c.vocab = c.embeddings = 126464, c.head_dim = 1024;
  EXPECT_EQ(error(100000), "none");
  o.gen_length = int64_t{1} << 20;
  EXPECT_NE(error(1).find("[plan] FLOPs"), std::string::npos);
}

}  // namespace
}  // namespace bicache
