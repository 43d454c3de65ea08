// Policy: which rows are recomputed in which layer at which step. A policy returns data; it owns no
// tensors, calls no kernels and does no I/O, so one object serves any number of requests and
// threads.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cache/depth.h"
#include "cache/layer_cache.h"
#include "cache/plan.h"
#include "cache/prefix_entry.h"

namespace bicache {

class Policy {
 public:
  virtual ~Policy() = default;

  // The canonical cache string: make_policy(spec()) is this policy again.
  virtual std::string spec() const = 0;
  // True: speaks for the shared prefix rows only, and is completed by another policy for the rest
  // (`a+b`).
  virtual bool prefix_only() const { return false; }

  // Lifecycle, per request:
  // 1. check: std::invalid_argument if the settings do not fit this request's model.
  virtual void check(const RequestInfo&) const {}
  // 2. what it may read of a prefix entry (looked up, or made, before the first step); nothing: no
  // entry is used.
  virtual EntryNeeds needs(const RequestInfo&) const { return {}; }
  // The same of all requests that may come with this prefix, whatever follows it.
  virtual EntryNeeds prefix_needs(const RequestInfo& r) const { return needs(r); }
  // 3. what must outlive a pass.
  virtual Kept kept(const RequestInfo&) const { return {}; }
  // 4. before each pass: the depth b from this step on, where the policy settles it now (bicache:
  // at a refresh). The engine puts it into `step` before it asks for the plan; see settle().
  virtual std::optional<DepthChoice> choose(const StepInfo&) const { return {}; }
  // 5. one plan per pass, until no masks are left.
  virtual StepPlan plan(const StepInfo& step) const = 0;
};

using PolicyPtr = std::shared_ptr<const Policy>;

// Lifecycle step 4: asks, and notes the answer in `step`.
std::optional<DepthChoice> settle(const Policy& policy, StepInfo& step);

// The pass that makes a prefix entry, on a canvas of `rows` rows: everything recomputed, up to the
// last layer the entry keeps something of.
StepPlan entry_plan(const EntryNeeds& needs, int layers, int64_t rows);

// One setting of a policy, and how it is described to users.
struct PolicyField {
  const char* name;
  const char* value;  // default, as text; "" if it must be given
  const char* help;
};

// One row of the policy table.
struct PolicyRow {
  const char* name;
  const char* help;
  std::vector<PolicyField> fields;
  const char* identity;  // a cache string at which the policy must equal `none` bit for bit; "" if
                         // it has none
  // One value per field, in order; `hook` is what "depth=hook" stands for.
  PolicyPtr (*make)(const std::vector<std::string>& values, const DepthPtr& hook);
};
const std::vector<PolicyRow>& policy_table();

// "name", "name:field=value,field=value", or two of them joined by '+'. std::invalid_argument lists
// what exists. `hook`: what "depth=hook" stands for.
PolicyPtr make_policy(const std::string& text, const DepthPtr& hook = {});

// One that speaks for the shared prefix rows and one that then speaks for all others, in either
// order; the plan is the union, layer by layer. std::invalid_argument if both speak for the same
// rows.
PolicyPtr compose(PolicyPtr a, PolicyPtr b);

// Makers of the table's rows, one file each.
PolicyPtr make_none(const std::vector<std::string>& values, const DepthPtr& hook);
PolicyPtr make_naive(const std::vector<std::string>& values, const DepthPtr& hook);
PolicyPtr make_bicache(const std::vector<std::string>& values, const DepthPtr& hook);
PolicyPtr make_fast_dllm(const std::vector<std::string>& values, const DepthPtr& hook);
PolicyPtr make_dllm_cache(const std::vector<std::string>& values, const DepthPtr& hook);

// For them: one setting `field` of policy `name`, from a cache string; std::invalid_argument says
// what was expected.
// An integer 1..999999999; `others`: what else the field takes, for the message ("none or ").
int64_t parse_count(const std::string& text, const char* name, const char* field,
                    const char* others = "");
// True for `second`, false for `first`.
bool parse_choice(const std::string& text, const char* name, const char* field, const char* first,
                  const char* second);

}  // namespace bicache
