#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "base/parallel.h"
#include "base/rng.h"

namespace bicache {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

void ban(float* logits, int32_t token, int64_t vocab) {
  if (0 <= token && token < vocab) logits[token] = kMinusInf;
}

}  // namespace

Sampler::Sampler(const ModelConfig& config, const GenerationOptions& options)
    : config_(config), options_(options) {}

int64_t Sampler::quota(int64_t masks, int64_t i) const {
  const int64_t steps = options_.steps_per_block();
  return masks / steps + (i < masks % steps ? 1 : 0);
}

// The reference takes the argmax of exp(x) / (-ln u)^T; its logarithm is x - T ln(-ln u), which
// does not overflow.
int32_t Sampler::noisy_argmax(const float* logits, int64_t position, int64_t step) const {
  const auto seed = static_cast<uint64_t>(options_.seed);
  double best = -std::numeric_limits<double>::infinity();
  int32_t token = 0;
  for (int64_t v = 0; v < config_.vocab; ++v) {
    const double u = uniform(seed, Stream::token, step, position, v);
    const double score =
        static_cast<double>(logits[v]) - options_.temperature * std::log(-std::log(u));
    if (score > best) {
      best = score;
      token = static_cast<int32_t>(v);
    }
  }
  return token;
}

Sampler::Candidate Sampler::candidate(const Kernels& kernels, float* logits, int64_t position,
                                      int64_t step) const {
  const int64_t vocab = config_.vocab;
  if (options_.logits_eos_inf) ban(logits, config_.eos_token_id, vocab);
  RowStats stats = kernels.row_stats(logits, vocab);
  if (std::isnan(stats.max)) {
    throw std::runtime_error(cat("[sampler] step ", step, " position ", position,
                                 ": expected numbers as logits, got NaN"));
  }
  const bool noisy = options_.temperature > 0;
  const int32_t token =
      noisy ? noisy_argmax(logits, position, step) : static_cast<int32_t>(stats.argmax);
  if (options_.confidence_eos_eot_inf) {
    // The reference writes -inf through two names that are one array only without noise, so EOS is
    // spared with it.
    if (!noisy) ban(logits, config_.eos_token_id, vocab);
    ban(logits, config_.eot_token_id, vocab);
    stats = kernels.row_stats(logits, vocab);
  }
  const double probability =
      std::isinf(stats.max)
          ? 0.0
          : std::exp(static_cast<double>(logits[token]) - stats.max) / stats.sum_exp;
  const double rank =
      options_.remasking == "random"
          ? uniform(static_cast<uint64_t>(options_.seed), Stream::confidence, step, position, 0)
          : probability;
  return {{position, token, static_cast<float>(probability)}, rank};
}

std::vector<Commit> Sampler::sample(const Kernels& kernels, View<float> logits,
                                    const std::vector<int64_t>& positions, int64_t step,
                                    int64_t count, int threads) const {
  std::vector<Candidate> all(positions.size());
  parallel_for(static_cast<int64_t>(all.size()), threads,
               [&](int64_t i) { all[i] = candidate(kernels, logits.row(i), positions[i], step); });
  std::stable_sort(all.begin(), all.end(),
                   [](const Candidate& a, const Candidate& b) { return a.rank > b.rank; });
  all.resize(std::min(all.size(), static_cast<size_t>(count)));
  std::vector<Commit> commits;
  for (const Candidate& c : all) commits.push_back(c.commit);
  return commits;
}

}  // namespace bicache
