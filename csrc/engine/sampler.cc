#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "base/parallel.h"
#include "base/rng.h"
#include "engine/choices.h"

namespace bicache {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr float kDreamEps = 1e-3f;  // where Dream's schedule ends

void ban(float* logits, int64_t token, int64_t vocab) {
  if (0 <= token && token < vocab) logits[token] = kMinusInf;
}

// torch.linspace(1, eps, steps + 1)[i] in float32, as the published schedule has it (torch's builds
// for x86 fuse multiply and add): products are truncated to a count, so the last bit matters.
float timestep(int64_t i, int64_t steps) {
  const float d = (kDreamEps - 1.0f) / static_cast<float>(steps);
  if (i < (steps + 1) / 2) return std::fma(d, static_cast<float>(i), 1.0f);
  return std::fma(-d, static_cast<float>(steps - i), kDreamEps);
}

}  // namespace

Sampler::Sampler(const ModelConfig& config, const GenerationOptions& options)
    : config_(config), options_(options) {}

double Sampler::transfer_share(const DecodingStep& at) const {
  const int64_t steps = options_.steps_per_block();
  if (at.block_step >= steps - 1) return 1;
  return 1.0f - timestep(at.block_step + 1, steps) / timestep(at.block_step, steps);
}

int64_t Sampler::quota(const DecodingStep& at, int64_t masked) const {
  if (options_.remasking == "origin") return masked;
  const int64_t steps = options_.steps_per_block();
  int64_t count = at.masks / steps + (at.block_step < at.masks % steps ? 1 : 0);
  if (options_.dream()) {
    const auto share = static_cast<float>(transfer_share(at));
    count = static_cast<int64_t>(static_cast<float>(masked) * share);
  }
  return options_.adaptive() ? std::max<int64_t>(count, 1) : count;
}

std::vector<int64_t> Sampler::drawn(const DecodingStep& at, std::vector<int64_t> masked) const {
  if (options_.remasking != "origin") return masked;
  const double share = transfer_share(at);
  std::erase_if(masked, [&](int64_t position) {
    return uniform(static_cast<uint64_t>(options_.seed), Stream::confidence, at.step, position,
                   0) >= share;
  });
  return masked;
}

void Sampler::suppress(float* logits) const {
  for (const int64_t token : options_.suppress_tokens) ban(logits, token, config_.sampled_ids());
  if (options_.logits_eos_inf) ban(logits, config_.eos_token_id, config_.sampled_ids());
}

Sampler::Candidate Sampler::candidate(const Kernels& kernels, float* logits, int64_t position,
                                      int64_t step) const {
  const int64_t vocab = config_.sampled_ids();
  suppress(logits);
  RowStats stats = kernels.row_stats(logits, vocab);
  if (std::isnan(stats.max)) {
    throw std::runtime_error(cat("[sampler] step ", step, " position ", position,
                                 ": expected numbers as logits, got NaN"));
  }
  const auto seed = static_cast<uint64_t>(options_.seed);
  const Choice choice = choose_token(options_, logits, vocab, stats, {seed, step, position});
  if (options_.confidence_eos_eot_inf) {
    // The reference writes -inf through two names that are one array only without noise, so EOS is
    // spared with it.
    if (options_.temperature == 0) ban(logits, config_.eos_token_id, vocab);
    ban(logits, config_.eot_token_id, vocab);
    stats = kernels.row_stats(logits, vocab);
  }
  const double probability =
      std::isinf(stats.max)
          ? 0.0
          : std::exp(static_cast<double>(logits[choice.token]) - stats.max) / stats.sum_exp;
  Candidate c{{position, choice.token, static_cast<float>(probability)}, probability};
  const auto noise = [&] { return uniform(seed, Stream::confidence, step, position, 0); };
  if (options_.remasking == "random") c.rank = noise();
  if (options_.dream()) c.rank = choice.confidence;
  if (options_.dream() && options_.alg_temp > 0)  // the n largest: drawn one after the other
    c.rank = choice.confidence / std::max(options_.alg_temp, 1e-300) - std::log(-std::log(noise()));
  return c;
}

// How many are committed: Fast-dLLM's rules may accept more than `count`.
int64_t Sampler::accepted(const std::vector<Candidate>& best_first, int64_t count) const {
  const auto all = static_cast<int64_t>(best_first.size());
  int64_t n = 0;
  if (options_.threshold) {
    while (n < all && best_first[n].rank >= *options_.threshold) ++n;
  } else if (options_.factor) {
    // The n-th (from 1) needs 1 - factor / (n + 1); the first is always accepted, and so, in the
    // published code, is the last one if the scan comes that far.
    n = 1;
    while (n < all - 1 && best_first[n].rank >= 1 - *options_.factor / static_cast<double>(n + 2))
      ++n;
    if (n == all - 1) n = all;
  }
  return std::min(all, std::max(count, n));
}

std::vector<Commit> Sampler::sample(const Kernels& kernels, View<float> logits,
                                    const std::vector<int64_t>& positions, const DecodingStep& at,
                                    int64_t count, int threads) const {
  std::vector<Candidate> all(positions.size());
  parallel_for(static_cast<int64_t>(all.size()), threads, [&](int64_t i) {
    all[i] = candidate(kernels, logits.row(i), positions[i], at.step);
  });
  std::stable_sort(all.begin(), all.end(),
                   [](const Candidate& a, const Candidate& b) { return a.rank > b.rank; });
  all.resize(static_cast<size_t>(accepted(all, count)));
  std::vector<Commit> commits;
  for (const Candidate& c : all) commits.push_back(c.commit);
  return commits;
}

}  // namespace bicache
