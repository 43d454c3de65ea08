// dllm_cache (arXiv 2506.06295) in its reduced form, equal to the published one: the prompt's
// residual is not carried between its recomputations, because nothing reads it; attention and FFN
// outputs of a response row are one delta; the output head runs where logits are read. Layer 0's
// response rows are always recomputed, as in its repository: that is how new tokens enter. Deeper,
// the published rule lets them compete for the share that is recomputed; where a step commits more
// tokens than that share holds, some never get through: new_tokens=recompute is ours.
#include <algorithm>
#include <charconv>

#include "base/check.h"
#include "cache/policy.h"

namespace bicache {
namespace {

struct Settings {
  int64_t prompt_interval_steps = 50;
  int64_t gen_interval_steps = 7;
  double transfer_ratio = 0.25;
  Since since = Since::last_pass;
  bool recompute_new = false;
};

class DllmCache : public Policy {
 public:
  explicit DllmCache(Settings settings) : o_(settings) {}

  std::string spec() const override {
    return cat("dllm_cache:prompt_interval_steps=", o_.prompt_interval_steps,
               ",gen_interval_steps=", o_.gen_interval_steps,
               ",transfer_ratio=", shortest(o_.transfer_ratio),
               o_.since == Since::recompute ? ",drift=since_recompute" : "",
               o_.recompute_new ? ",new_tokens=recompute" : "");
  }

  Kept kept(const RequestInfo& r) const override {
    Kept kept;
    const RowSet response = RowSet::span(first_response(r), r.n());
    if (o_.prompt_interval_steps > 1) kept.kv.push_back({RowSet::span(0, first_response(r)), 0});
    if (o_.gen_interval_steps == 1) return kept;
    kept.kv.push_back({response, 1});
    kept.delta.push_back({response, 1});
    if (o_.since == Since::recompute && o_.transfer_ratio > 0) kept.value.push_back({response, 1});
    return kept;
  }

  StepPlan plan(const StepInfo& s) const override {
    const int64_t cut = first_response(s.request);
    const RowSet response = RowSet::span(cut, s.request.n());
    RowSet prompt;
    if (s.step % o_.prompt_interval_steps == 0) prompt = RowSet::span(s.first_row, cut);
    const RowSet live = prompt.unite(response);
    StepPlan plan = StepPlan::uniform(live, s.wanted);
    if (s.step % o_.gen_interval_steps == 0) return plan;
    LayerPlan rest{live, o_.recompute_new ? prompt.unite(s.committed) : prompt, {}};
    if (o_.transfer_ratio > 0) {
      const RowSet others = response.minus(rest.fresh);
      const auto share = static_cast<double>(response.size()) * o_.transfer_ratio;
      rest.select = {{others, std::min(static_cast<int64_t>(share), others.size()), o_.since}};
    }
    if (s.request.layers > 1) plan.layers.push_back({1, std::move(rest)});
    return plan;
  }

 private:
  // The last prompt row predicts the first response token on a shifted model, so it counts as
  // response.
  static int64_t first_response(const RequestInfo& r) { return r.p + r.u - r.shift; }

  Settings o_;
};

double parse_share(const std::string& text, const char* name, const char* field) {
  double x = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
  require(error == std::errc() && end == text.data() + text.size() && 0 <= x && x <= 1, "[cache] ",
          name, " ", field, ": expected a number 0..1, got \"", text, "\"");
  return x;
}

}  // namespace

PolicyPtr make_dllm_cache(const std::vector<std::string>& values, const DepthPtr&) {
  Settings o;  // values: in the order of the policy table's fields
  o.prompt_interval_steps = parse_count(values[0], "dllm_cache", "prompt_interval_steps");
  o.gen_interval_steps = parse_count(values[1], "dllm_cache", "gen_interval_steps");
  o.transfer_ratio = parse_share(values[2], "dllm_cache", "transfer_ratio");
  if (parse_choice(values[3], "dllm_cache", "drift", "last_step", "since_recompute"))
    o.since = Since::recompute;
  o.recompute_new = parse_choice(values[4], "dllm_cache", "new_tokens", "compete", "recompute");
  return std::make_shared<DllmCache>(o);
}

}  // namespace bicache
