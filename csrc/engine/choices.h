// Which token a position takes, from its logits: greedy or with noise, from all tokens or the most
// probable ones.
#pragma once

#include <cstdint>

#include "base/rng.h"
#include "engine/options.h"
#include "kernels/kernels.h"

namespace bicache {

// Of one position at one step, by token.
struct TokenNoise {
  uint64_t seed = 0;
  int64_t step = 0, position = 0;
  double operator()(int64_t token) const {
    return uniform(seed, Stream::token, step, position, token);
  }
};

struct Choice {
  int32_t token = 0;
  double confidence = 0;  // of Dream's rules; 0 with LLaDA's
};

// logits [vocab], `stats` of them. LLaDA: the argmax of exp(x) / (-ln u)^T, which draws from
// softmax(x / T). Dream (sample_tokens): the same draw; its confidences are of softmax(x / T), or
// softmax(x) at T = 0, over the kept tokens: the token's probability (maskgit_plus), the best less
// the second best (topk_margin), or sum p ln(p + 1e-10) (entropy). Kept are the most probable
// tokens, up to and with the one that passes top_p, and of these the top_k largest (ties with the
// k-th stay).
Choice choose_token(const GenerationOptions& options, const float* logits, int64_t vocab,
                    const RowStats& stats, const TokenNoise& noise);

}  // namespace bicache
