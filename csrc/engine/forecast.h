// Forecast: what a request would cost under a policy, from its plans alone; runs no model.
#pragma once

#include <optional>

#include "cache/policy.h"
#include "engine/engine.h"
#include "model/cost.h"

namespace bicache {

struct Forecast {
  RequestStats stats;         // as the request would have them, without seconds
  int64_t entry_bytes = 0;    // its prefix entry, unconditional ones too; prefix_dtype f32
  int64_t vanilla_flops = 0;  // the published loops without cache: every row in every layer, and
                              // the head over every row, at every step
};

// A request with p shared-prefix and u own prompt rows, alone, whose prefix is not in the store
// yet. `options` unresolved. `tokens_per_step`: how many positions a step commits on average where
// that depends on what is predicted (threshold, factor). early_stop cannot be foreseen and is taken
// as off. std::invalid_argument for what does not fit the model, and for policies that look at
// activations.
Forecast forecast(const ModelShape& model, const Policy& policy, int64_t p, int64_t u,
                  GenerationOptions options, std::optional<double> tokens_per_step);

}  // namespace bicache
