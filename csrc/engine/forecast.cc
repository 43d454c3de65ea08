#include "engine/forecast.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace bicache {
namespace {

int64_t flops(const std::vector<Work>& work) {
  int64_t sum = 0;
  for (const Work& w : work) sum += w.flops;
  return sum;
}

RequestInfo checked(const ModelConfig& c, int64_t p, int64_t u, GenerationOptions& o,
                    std::optional<double> tokens_per_step) {
  o.resolve();
  require(p >= 0 && u >= 0 && p <= c.context && u <= c.context && p + u >= 1,
          "[plan] prompt: expected 1..", c.context, " tokens, got ", p, " shared and ", u,
          " of its own");
  require(p + u + o.gen_length <= c.context, "[plan] prompt (", p + u, ") + gen_length (",
          o.gen_length, "): expected at most ", c.context, " tokens (the model's context), got ",
          p + u + o.gen_length);
  require(o.adaptive() == tokens_per_step.has_value(), "[plan] tokens_per_step: expected ",
          o.adaptive() ? "a number, because threshold and factor commit as many tokens as they find"
                       : "none without threshold or factor",
          ", got ", tokens_per_step ? cat(*tokens_per_step) : "none");
  require(!tokens_per_step || (std::isfinite(*tokens_per_step) && *tokens_per_step >= 1),
          "[plan] tokens_per_step: expected a number >= 1, got ", tokens_per_step.value_or(0));
  // As in a generation: a shifted model needs the last prompt row in the request's own context.
  const int64_t shared = std::min(p, p + u - c.shift);
  return {c.layers, shared, p + u - shared, o.gen_length, c.shift};
}

// Sizes may be any that a config.json claims; they are counted in 63 bits. No policy runs more than
// every row twice per step, and once for the prefix entry.
void check_countable(const ModelConfig& c, const RequestInfo& r, int64_t steps, int branches) {
  const auto n = static_cast<double>(r.n()), e = static_cast<double>(c.dim),
             kv = static_cast<double>(c.kv_width()), q = static_cast<double>(c.q_width()),
             f = static_cast<double>(c.ffn), v = static_cast<double>(c.vocab);
  const auto experts = static_cast<double>(c.experts),
             ffns = static_cast<double>(std::max<int64_t>(c.experts_per_row, 1));
  const double row =
      2 * c.layers * (2 * e * (q + kv) + e * (3 * f * ffns + experts) + 2 * n * q) + 2 * e * v;
  const double most = branches * n * row * (2 * static_cast<double>(steps) + 1);
  require(most < 0x1p63, "[plan] FLOPs: expected a number below 2^63, got up to ", most);
}

}  // namespace

Forecast forecast(const ModelShape& model, const Policy& policy, int64_t p, int64_t u,
                  GenerationOptions options, std::optional<double> tokens_per_step) {
  const ModelConfig& c = model.config;
  const RequestInfo info = checked(c, p, u, options, tokens_per_step);
  policy.check(info);
  const auto branches = options.cfg_scale > 0 ? 2 : 1;
  check_countable(c, info, *options.steps, branches);
  Forecast f;
  f.stats.prefix_tokens = info.p;
  f.stats.cache_bytes = branches * LayerCache::size_bytes(c.layers, info.n(), c.kv_width(), c.dim,
                                                          policy.kept(info), model.kv_dtype);
  if (const EntryNeeds needs = policy.needs(info); !needs.nothing()) {
    f.stats.prefix_hit = false;
    const int64_t rows = needs.source == EntryNeeds::Source::alone ? info.p : info.n();
    const auto work = predicted_work(model, entry_plan(needs, c.layers, rows), rows);
    for (int i = 0; i < branches; ++i) add(f.stats.entry_work, work);
    const EntryTypes types = entry_types(model.kv_dtype, DType::f32);
    f.entry_bytes = branches * PrefixEntry::size_bytes(info.p, c.kv_width(), c.dim, needs, types);
  }

  constexpr int32_t kMask = 1;  // a canvas of which only this is known
  std::vector<int32_t> canvas(static_cast<size_t>(info.n()), kMask);
  const Sampler sampler(c, options);
  Progress progress(info, options);
  StepInfo at;
  at.request = info;
  double owed = 0;
  while (progress.advance(sampler, canvas, kMask)) {
    progress.show(at);
    if (const auto choice = settle(policy, at); choice && info.p > 0) f.stats.note(*choice);
    const StepPlan plan = policy.plan(at);
    require(plan.observe.rows.empty(),
            "[plan] cache: expected a policy that does not look at activations, got ",
            policy.spec());
    check_plan(plan, c.layers, info.n(), info.p, c.shift);
    add(f.stats.work, predicted_work(model, plan, info.n(), branches));
    f.stats.note(plan, c.layers);
    if (plan.logits.empty()) {
      require(++progress.repeat <= Progress::kMaxRepeats, "[plan] policy ", policy.spec(),
              ": expected at most ", Progress::kMaxRepeats,
              " passes without logits at one step, got one more");
      continue;
    }
    owed += std::min(tokens_per_step.value_or(0), static_cast<double>(info.g));
    const int64_t count = std::max(progress.quota, static_cast<int64_t>(owed));
    owed -= std::floor(owed);
    std::vector<int64_t> decided = progress.wanted().list();
    decided.resize(std::min(decided.size(), static_cast<size_t>(count)));
    for (const int64_t i : decided) canvas[i] = 0;
    progress.committed(RowSet::of(std::move(decided)));
    ++f.stats.steps;
  }
  const RowSet all = RowSet::span(0, info.n());
  const auto vanilla = predicted_work(model, StepPlan::uniform(all, all), info.n());
  f.vanilla_flops =
      branches * flops(vanilla) * (options.adaptive() ? f.stats.steps : *options.steps);
  return f;
}

}  // namespace bicache
