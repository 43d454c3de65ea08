// Requests to a tiny model, and how their results are compared.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "support.h"
#include "tiny_model.h"

namespace bicache {

inline Request request(const TinyModel& t, const std::string& cache, int64_t p, int64_t u,
                       int64_t g, unsigned seed) {
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

inline std::vector<Result> generate(const std::shared_ptr<Engine>& engine,
                                    std::vector<Request> requests, int64_t batch_rows = 4096) {
  Generation g(engine, std::move(requests), batch_rows);
  while (!g.done()) g.step();
  EXPECT_EQ(g.steps_done(), g.steps_total());
  return g.results();
}

inline std::shared_ptr<Engine> engine(const std::shared_ptr<const Model>& model, int threads = 1,
                                      int64_t budget = 1 << 24) {
  return std::make_shared<Engine>(model, threads, budget);
}

inline void expect_same(const Result& a, const Result& b, const std::string& what) {
  EXPECT_EQ(a.tokens, b.tokens) << what;
  ASSERT_EQ(a.confidences.size(), b.confidences.size());
  EXPECT_EQ(
      std::memcmp(a.confidences.data(), b.confidences.data(), a.confidences.size() * sizeof(float)),
      0)
      << what;
}

inline std::vector<Request> crowd(const TinyModel& t) {
  std::vector<Request> requests;
  const std::vector<std::string> specs = {"none",
                                          "bicache:depth=2,refresh_steps=3",
                                          "naive",
                                          "bicache:depth=3,splice=strict",
                                          "bicache:depth=0:1/50:3,refresh_steps=2",
                                          "bicache:depth=probe:0.9,refresh_steps=2",
                                          "bicache:depth=1,refresh=drift:0.02,probe_rows=3",
                                          "naive:source=first_request",
                                          "dllm_cache:gen_interval_steps=3,transfer_ratio=0.4",
                                          "fast_dllm:mode=dual,block_start=fill",
                                          "bicache:depth=2,refresh_steps=3+dllm_cache:"
                                          "prompt_interval_steps=2,drift=since_recompute",
                                          "bicache:depth=1+fast_dllm:mode=prefix"};
  for (unsigned i = 0; i < 36; ++i) {
    requests.push_back(
        request(t, specs[i % specs.size()], 9 + 5 * (i % 4), 1 + i % 7, 1 + i % 9, i));
    requests.back().options.temperature = i % 3 == 0 ? 0.8 : 0.0;
    GenerationOptions& o = requests.back().options;
    const char* rules[] = {"random",       "low_confidence", "low_confidence", "origin",
                           "maskgit_plus", "topk_margin",    "entropy"};
    o.remasking = rules[i % 7];
    o.seed = i;
    if (i % 7 == 1) o.threshold = 0.1;
    if (i % 7 == 2) o.factor = 2;
    if (i % 7 == 4) o.alg_temp = 0.5;
    if (i % 11 == 3) o.cfg_scale = 0.7;
    if (i % 5 == 2) o.top_p = 0.8;
    if (i % 5 == 3) o.top_k = 7;
  }
  return requests;
}

}  // namespace bicache
