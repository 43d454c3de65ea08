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
      {"fast_dllm",
       "recompute the current block only, all rows at each block's start (arXiv 2505.22618)",
       {{"mode", "prefix",
         "what runs between: prefix (the block and all rows after it) or dual (the block alone)"},
        {"refresh_steps", "none",
         "steps after which all rows run again within a block: a number, or none"},
        {"block_start", "commit",
         "commit: the pass over all rows commits tokens, as in Fast-dLLM; fill: it only fills the "
         "caches and the block runs once more, as in BiCache's engine"}},
       "fast_dllm:refresh_steps=1",
       make_fast_dllm},
      {"dllm_cache",
       "recompute the prompt rarely, and of the response only the rows whose V moved most (arXiv "
       "2506.06295)",
       {{"prompt_interval_steps", "50", "steps from one recomputation of the prompt to the next"},
        {"gen_interval_steps", "7",
         "steps from one recomputation of the whole response to the next"},
        {"transfer_ratio", "0.25",
         "share of the response rows that are recomputed in the steps between, 0..1"},
        {"drift", "last_step",
         "V has moved since: last_step, as published, or since_recompute (the row's last "
         "recomputation, so that slow drift adds up)"},
        {"new_tokens", "compete",
         "rows of tokens that the step before committed: compete for being chosen, as published, "
         "or recompute (they are, besides the share: for steps that commit several tokens)"}},
       "dllm_cache:prompt_interval_steps=1,gen_interval_steps=1",
       make_dllm_cache},
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

  const PolicyPtr& prefix() const { return prefix_; }
  bool without_rest() const { return rest_->spec() == "none"; }

  std::string spec() const override {
    return without_rest() ? prefix_->spec() : prefix_->spec() + "+" + rest_->spec();
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
    for (const Kept::Part& part : rest.value)
      kept.value.push_back({part.rows.intersect(others), part.first_layer});
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

const Composed* as_composed(const PolicyPtr& policy) {
  return dynamic_cast<const Composed*>(policy.get());
}

// make_policy() gives a prefix policy together with none for the other rows: without that.
PolicyPtr bare(PolicyPtr policy) {
  const Composed* composed = as_composed(policy);
  return composed != nullptr && composed->without_rest() ? composed->prefix() : policy;
}

}  // namespace

PolicyPtr compose(PolicyPtr a, PolicyPtr b) {
  a = bare(std::move(a));
  b = bare(std::move(b));
  if (b->prefix_only() && !a->prefix_only()) std::swap(a, b);
  require(a->prefix_only() && !b->prefix_only() && as_composed(b) == nullptr,
          "[cache] '+': expected a policy for the shared prefix rows (naive, bicache) and one for "
          "the others (none, fast_dllm, dllm_cache), got ",
          a->spec(), " and ", b->spec(),
          a->prefix_only() ? ", which both speak for the prefix" : ", which both speak for all");
  return std::make_shared<Composed>(std::move(a), std::move(b));
}

int64_t parse_count(const std::string& text, const char* name, const char* field,
                    const char* others) {
  require(!text.empty() && text.size() < 10 &&
              text.find_first_not_of("0123456789") == std::string::npos && std::stoll(text) > 0,
          "[cache] ", name, " ", field, ": expected ", others, "an integer 1..999999999, got \"",
          text, "\"");
  return std::stoll(text);
}

bool parse_choice(const std::string& text, const char* name, const char* field, const char* first,
                  const char* second) {
  require(text == first || text == second, "[cache] ", name, " ", field, ": expected ", first,
          " or ", second, ", got \"", text, "\"");
  return text == second;
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

StepPlan entry_plan(const EntryNeeds& needs, int layers, int64_t rows) {
  int stop = needs.kv_layers;
  for (const int l : needs.joins) stop = std::max(stop, l);
  StepPlan plan = StepPlan::uniform(RowSet::span(0, rows), {});
  if (stop < layers) plan.layers.push_back({stop, {}});
  return plan;
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
