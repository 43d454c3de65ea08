// Sampler: which masked positions are committed at a step, and to which tokens. The rules of
// LLaDA's generate(), Dream's diffusion_generate() and Fast-dLLM's parallel decoding, exactly.
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

// Where a request stands, as the rules count.
struct DecodingStep {
  int64_t step = 0;        // of the noise
  int64_t block_step = 0;  // of this block's schedule
  int64_t masks = 0;       // masks of the block when it began
};

class Sampler {
 public:
  // `options` resolved.
  Sampler(const ModelConfig& config, const GenerationOptions& options);

  // The least number of positions a step commits of `masked` (ascending) ones. LLaDA: masks /
  // steps, and one more in the first masks % steps steps (get_num_transfer_tokens). Dream: the
  // share 1 - s / t of those that are left, all of them at the last step. At least one with
  // threshold or factor.
  int64_t quota(const DecodingStep& at, int64_t masked) const;
  // The positions that may be committed: all of them, or those drawn (origin: each with
  // probability 1 - s / t). Then the quota is their number.
  std::vector<int64_t> drawn(const DecodingStep& at, std::vector<int64_t> masked) const;

  // The `count` best of `positions` (ascending), or more where threshold or factor say so, from
  // their logits [positions, V] (overwritten), best first; ties: the lower position.
  // std::runtime_error if a logit is NaN.
  std::vector<Commit> sample(const Kernels& kernels, View<float> logits,
                             const std::vector<int64_t>& positions, const DecodingStep& at,
                             int64_t count, int threads) const;

 private:
  struct Candidate {
    Commit commit;
    double rank = 0;  // higher is committed first
  };
  Candidate candidate(const Kernels& kernels, float* logits, int64_t position, int64_t step) const;
  void suppress(float* logits) const;
  double transfer_share(const DecodingStep& at) const;  // 1 - s / t
  int64_t accepted(const std::vector<Candidate>& best_first, int64_t count) const;

  const ModelConfig& config_;
  const GenerationOptions& options_;
};

}  // namespace bicache
