// bicache (arXiv 2606.07571): the prefix's K/V are reused across requests in layers < b and
// recomputed in this request's context in the deeper ones at every refresh; in between, the
// request's own prefix K/V are reused in every layer (sections 3.5 and 3.6).
#include <algorithm>
#include <charconv>
#include <cmath>

#include "base/check.h"
#include "cache/policy.h"

namespace bicache {
namespace {

struct Settings {
  enum class Refresh : uint8_t { steps, block, drift };
  DepthPtr depth;
  int64_t refresh_steps = 16;
  Refresh refresh = Refresh::steps;
  double max_drift = 0;
  bool strict = false;
  EntryNeeds::Source source = EntryNeeds::Source::alone;
  RatioOf ratio = RatioOf::request;
  int64_t probe_rows = 8;
};

class BiCache : public Policy {
 public:
  explicit BiCache(Settings settings) : o_(std::move(settings)) {}

  std::string spec() const override {
    const Settings usual;
    std::string text = cat("bicache:depth=", o_.depth->str(), ",refresh_steps=", o_.refresh_steps,
                           ",splice=", o_.strict ? "strict" : "official");
    if (o_.refresh != usual.refresh) text += ",refresh=" + refresh();
    if (o_.source != usual.source) text += ",source=first_request";
    if (o_.ratio != usual.ratio) text += ",ratio=prompt";
    if (o_.probe_rows != usual.probe_rows) text += cat(",probe_rows=", o_.probe_rows);
    return text;
  }
  bool prefix_only() const override { return true; }

  void check(const RequestInfo& r) const override {
    for (const int b : o_.depth->reachable(r.layers)) {
      require(0 <= b && b <= r.layers, "[cache] bicache depth: expected 0..", r.layers,
              " (the model's layers), got ", b);
    }
  }

  EntryNeeds needs(const RequestInfo& r) const override {
    const std::optional<int> b = o_.depth->constant(r);
    if (b && splice(*b) == 0) return {};  // rows start from their embeddings
    return prefix_needs(r);
  }

  EntryNeeds prefix_needs(const RequestInfo& r) const override {
    if (r.p == 0) return {};
    // One entry serves every depth this policy may choose.
    EntryNeeds needs{o_.source, 0, {}};
    for (const int depth : o_.depth->reachable(r.layers)) {
      const int c = splice(depth);
      needs.kv_layers = std::max(needs.kv_layers, c);
      if (0 < c && c < r.layers) needs.joins.push_back(c);
    }
    return needs;
  }

  Kept kept(const RequestInfo& r) const override {
    int first = r.layers;
    if (const std::optional<int> b = o_.depth->constant(r)) {
      first = splice(*b);
    } else {
      for (const int depth : o_.depth->reachable(r.layers)) first = std::min(first, splice(depth));
    }
    return {{{RowSet::span(0, r.p), first}}, {}};
  }

  std::optional<DepthChoice> choose(const StepInfo& s) const override {
    if (s.repeat > 0 || !refreshes(s)) return {};
    if (s.request.p == 0) return DepthChoice{0, "no shared prefix"};
    return o_.depth->choose(s);
  }

  StepPlan plan(const StepInfo& s) const override {
    const RequestInfo& r = s.request;
    const RowSet prefix = RowSet::span(0, r.p);
    if (s.refreshed_step != s.step || s.repeat > 0) {
      StepPlan plan{{{0, {}}}, {}, false};
      if (o_.refresh == Settings::Refresh::drift && splice(s.depth) < r.layers)
        plan.observe = {observed(r), splice(s.depth), r.layers, false};
      return plan;
    }
    const int c = splice(s.depth);
    StepPlan plan{{}, {}, !prefix.empty()};
    if (c > 0) plan.layers.push_back({0, {}});
    if (c < r.layers) plan.layers.push_back({c, {prefix, prefix, {}}});
    if (o_.depth->observes()) plan.observe = {observed(r), 0, needs(r).kv_layers, true};
    return plan;
  }

 private:
  // First layer in which the prefix rows run. The official code restores the boundary after layer b
  // - 1, so that layer b's prefix K/V are those of the entry as well: b + 1 stale layers. strict
  // restores it one layer earlier: exactly b.
  int splice(int depth) const { return std::max(0, depth - (o_.strict ? 1 : 0)); }

  std::string refresh() const {
    if (o_.refresh == Settings::Refresh::steps) return "steps";
    if (o_.refresh == Settings::Refresh::block) return "block";
    return "drift:" + shortest(o_.max_drift);
  }

  bool refreshes(const StepInfo& s) const {
    if (s.step == 0) return true;
    if (o_.refresh == Settings::Refresh::block) return s.block_step == 0;
    if (o_.refresh == Settings::Refresh::steps) return s.step % o_.refresh_steps == 0;
    if (s.step - s.refreshed_step >= o_.refresh_steps) return true;
    double drift = 0;  // of the layers that a refresh recomputes
    for (auto l = static_cast<size_t>(splice(s.depth)); l < s.to_own.size(); ++l)
      drift = std::max(drift, 1 - s.to_own[l].kv());
    return drift > o_.max_drift;
  }

  // probe_rows of the prefix, evenly spread.
  RowSet observed(const RequestInfo& r) const {
    const int64_t count = std::min(o_.probe_rows, r.p);
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < count; ++i) rows.push_back((2 * i + 1) * r.p / (2 * count));
    return RowSet::of(std::move(rows));
  }

  Settings o_;
};

void parse_refresh(const std::string& text, Settings& o) {
  if (text == "steps") return;
  if (text == "block") {
    o.refresh = Settings::Refresh::block;
    return;
  }
  const std::string limit = text.substr(0, 6) == "drift:" ? text.substr(6) : "";
  const auto [end, error] = std::from_chars(limit.data(), limit.data() + limit.size(), o.max_drift);
  require(!limit.empty() && error == std::errc() && end == limit.data() + limit.size() &&
              std::isfinite(o.max_drift) && o.max_drift >= 0,
          "[cache] bicache refresh: expected steps, block or drift:LIMIT with LIMIT >= 0, got \"",
          text, "\"");
  o.refresh = Settings::Refresh::drift;
}

}  // namespace

PolicyPtr make_bicache(const std::vector<std::string>& values, const DepthPtr& hook) {
  Settings o;  // values: in the order of the policy table's fields
  o.refresh_steps = parse_count(values[1], "bicache", "refresh_steps");
  parse_refresh(values[3], o);
  o.strict = parse_choice(values[2], "bicache", "splice", "official", "strict");
  o.source = parse_choice(values[4], "bicache", "source", "alone", "first_request")
                 ? EntryNeeds::Source::first_request
                 : EntryNeeds::Source::alone;
  o.ratio = parse_choice(values[5], "bicache", "ratio", "request", "prompt") ? RatioOf::prompt
                                                                             : RatioOf::request;
  o.probe_rows = parse_count(values[6], "bicache", "probe_rows");
  o.depth = parse_depth(values[0], o.ratio, hook, o.strict);
  return std::make_shared<BiCache>(std::move(o));
}

}  // namespace bicache
