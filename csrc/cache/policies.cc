// The policy table, cache strings, and the composition of two policies.
#include <algorithm>

#include "base/check.h"
#include "cache/policy.h"

namespace bicache {

const std::vector<PolicyRow>& policy_table() {
  static const std::vector<PolicyRow> table = {
      {"none", "recompute every row in every layer at every step", {}, "none", make_none},
      {"naive",
       "LLM-style prefix caching: the prefix's K/V are computed once and reused in every layer; "
       "wrong for diffusion models, "
       "here to show the collapse",
       {{"source", "alone",
         "where the K/V come from: alone (the prefix by itself) or first_request"}},
       "",
       make_naive},
      {"bicache",
       "reuse the shared prefix's K/V in the shallow layers, recompute them deeper (arXiv "
       "2606.07571)",
       {{"depth", "",
         "layers whose prefix K/V are reused: a number, a table ratio:depth/ratio:depth, "
         "agreement:TABLE (calibrated by the agreement of answers) or probe:TAU (measured while "
         "the request runs)"},
        {"refresh_steps", "16",
         "steps between two recomputations of the deeper layers' prefix K/V"},
        {"splice", "official",
         "official: prefix rows rejoin in layer depth, as published; strict: one layer earlier, so "
         "that exactly depth layers "
         "use stale K/V"},
        {"refresh", "steps",
         "when they are recomputed: steps (every refresh_steps), block (at each block's first "
         "step) or drift:LIMIT (when observed rows have moved by more than LIMIT = 1 - cosine, and "
         "at least every refresh_steps)"},
        {"source", "alone",
         "where the reused K/V come from: alone (the prefix by itself, as published) or "
         "first_request (as they stood in the first request's canvas; for comparison)"},
        {"ratio", "request",
         "how tables are read: request = 100 p / (p + u + g), as published at run time, or prompt "
         "= 100 p / (p + u), as published in the profiler"},
        {"probe_rows", "8", "prefix rows that are observed, where something asks for it"}},
       "bicache:depth=1,refresh_steps=1,splice=strict",
       make_bicache},
  };
  return table;
}

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t at = 0;
  for (size_t end; (end = text.find(separator, at)) != std::string::npos; at = end + 1) {
    parts.push_back(text.substr(at, end - at));
  }
  parts.push_back(text.substr(at));
  return parts;
}

template <class Rows>
std::string names(const Rows& rows) {
  std::string text;
  for (const auto& row : rows) text += (text.empty() ? "" : ", ") + std::string(row.name);
  return text.empty() ? "none" : text;
}

PolicyPtr make_one(const std::string& text, const DepthPtr& hook) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const auto& table = policy_table();
  const auto row =
      std::find_if(table.begin(), table.end(), [&](const PolicyRow& r) { return name == r.name; });
  require(row != table.end(), "[cache] policy: expected one of ", names(table), ", got \"", name,
          "\"");

  std::vector<std::string> values;
  for (const PolicyField& f : row->fields) values.emplace_back(f.value);
  std::vector<bool> given(values.size(), false);
  const auto settings =
      colon == std::string::npos ? std::vector<std::string>{} : split(text.substr(colon + 1), ',');
  for (const std::string& setting : settings) {
    const size_t equals = setting.find('=');
    const std::string key = setting.substr(0, equals);
    const auto field = std::find_if(row->fields.begin(), row->fields.end(),
                                    [&](const PolicyField& f) { return key == f.name; });
    require(field != row->fields.end(), "[cache] ", name, ": expected settings ",
            names(row->fields), ", got \"", key, "\" in \"", text, "\"");
    require(equals != std::string::npos, "[cache] ", name, ": expected ", key, "=value, got \"",
            setting, "\"");
    const auto i = static_cast<size_t>(field - row->fields.begin());
    require(!given[i], "[cache] ", name, ": expected ", key, " once, got it twice in \"", text,
            "\"");
    given[i] = true;
    values[i] = setting.substr(equals + 1);
  }
  for (size_t i = 0; i < values.size(); ++i) {
    require(!values[i].empty(), "[cache] ", name, ": expected a value for ", row->fields[i].name,
            " (", row->fields[i].help, "), got none");
  }
  return row->make(values, hook);
}

class Composed : public Policy {
 public:
  Composed(PolicyPtr prefix, PolicyPtr rest) : prefix_(std::move(prefix)), rest_(std::move(rest)) {}

  std::string spec() const override {
    return rest_->spec() == "none" ? prefix_->spec() : prefix_->spec() + "+" + rest_->spec();
  }
  void check(const RequestInfo& r) const override {
    prefix_->check(r);
    rest_->check(r);
  }
  EntryNeeds needs(const RequestInfo& r) const override { return prefix_->needs(r); }
  EntryNeeds prefix_needs(const RequestInfo& r) const override { return prefix_->prefix_needs(r); }
  std::optional<DepthChoice> choose(const StepInfo& s) const override { return prefix_->choose(s); }

  Kept kept(const RequestInfo& r) const override {
    Kept kept = prefix_->kept(r);
    const RowSet others = RowSet::span(r.p, r.n());
    const Kept rest = rest_->kept(r);
    for (const Kept::Part& part : rest.kv)
      kept.kv.push_back({part.rows.intersect(others), part.first_layer});
    for (const Kept::Part& part : rest.delta)
      kept.delta.push_back({part.rows.intersect(others), part.first_layer});
    return kept;
  }

  StepPlan plan(const StepInfo& s) const override {
    StepInfo others = s;
    others.first_row = s.request.p;
    const StepPlan a = prefix_->plan(s), b = rest_->plan(others);
    std::vector<int> firsts;
    for (const LayerSpan& span : a.layers) firsts.push_back(span.first);
    for (const LayerSpan& span : b.layers) firsts.push_back(span.first);
    std::sort(firsts.begin(), firsts.end());
    firsts.erase(std::unique(firsts.begin(), firsts.end()), firsts.end());

    StepPlan plan{{}, b.logits, a.from_entry, a.observe};
    for (const int first : firsts) {
      const LayerPlan &x = a.at(first), &y = b.at(first);
      LayerPlan both{x.live.unite(y.live), x.fresh.unite(y.fresh), x.select};
      both.select.insert(both.select.end(), y.select.begin(), y.select.end());
      plan.layers.push_back({first, std::move(both)});
    }
    return plan;
  }

 private:
  PolicyPtr prefix_, rest_;
};

}  // namespace

PolicyPtr compose(PolicyPtr prefix, PolicyPtr rest) {
  require(prefix->prefix_only(),
          "[cache] '+': expected a policy for the shared prefix on the left, got ", prefix->spec());
  require(!rest->prefix_only(),
          "[cache] '+': expected a policy for the other rows on the right, got ", rest->spec(),
          "; both speak for the shared prefix");
  return std::make_shared<Composed>(std::move(prefix), std::move(rest));
}

std::optional<DepthChoice> settle(const Policy& policy, StepInfo& step) {
  std::optional<DepthChoice> choice = policy.choose(step);
  if (choice) {
    step.depth = choice->depth;
    step.refreshed_step = step.step;
    step.to_own.clear();
  }
  return choice;
}

PolicyPtr make_policy(const std::string& text, const DepthPtr& hook) {
  const std::vector<std::string> parts = split(text, '+');
  require(parts.size() <= 2, "[cache] policy: expected at most two joined by '+', got \"", text,
          "\"");
  PolicyPtr first = make_one(parts[0], hook);
  if (parts.size() == 2) return compose(std::move(first), make_one(parts[1], hook));
  return first->prefix_only() ? compose(std::move(first), make_none({}, {})) : first;
}

}  // namespace bicache
