// Sampler: which masked positions are committed at a step, and to which tokens. LLaDA's generate(),
// exactly.
#pragma once

#include <vector>

#include "base/view.h"
#include "engine/options.h"
#include "kernels/kernels.h"
#include "model/config.h"

namespace bicache {

// A position that has been decided.
struct Commit {
  int64_t position = 0;  // on the canvas
  int32_t token = 0;
  float confidence =
      0;  // probability of the token when it was committed, without noise or temperature
};

class Sampler {
 public:
  // `options` resolved.
  Sampler(const ModelConfig& config, const GenerationOptions& options);

  // How many positions step `i` of a block commits that began with `masks` masks: masks / steps,
  // and one more in the first masks % steps steps (get_num_transfer_tokens).
  int64_t quota(int64_t masks, int64_t i) const;

  // The `count` best of `positions` (ascending), from their logits [positions, V] (overwritten),
  // best first; ties: the lower position. `step`: steps committed since the request's start.
  // std::runtime_error if a logit is NaN.
  std::vector<Commit> sample(const Kernels& kernels, View<float> logits,
                             const std::vector<int64_t>& positions, int64_t step, int64_t count,
                             int threads) const;

 private:
  struct Candidate {
    Commit commit;
    double rank = 0;
  };
  Candidate candidate(const Kernels& kernels, float* logits, int64_t position, int64_t step) const;
  int32_t noisy_argmax(const float* logits, int64_t position, int64_t step) const;

  const ModelConfig& config_;
  const GenerationOptions& options_;
};

}  // namespace bicache
