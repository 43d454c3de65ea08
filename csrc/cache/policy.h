// Policy: which rows are recomputed in which layer at which step. A policy returns data; it owns no
// tensors, calls no kernels and does no I/O, so one object serves any number of requests and
// threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cache/depth.h"
#include "cache/layer_cache.h"
#include "cache/plan.h"
#include "cache/prefix_entry.h"

namespace bicache {

// What a policy sees at one step of one request.
struct StepInfo {
  RequestInfo request;
  int64_t step = 0;        // passes that committed so far, from the request's start, across blocks
  RowSpan block;           // current block: rows [begin, end)
  int64_t block_step = 0;  // the same, within this block
  RowSet wanted;           // masked positions of this block
  int repeat = 0;          // passes already made at this step (after a pass without logits)
  int64_t first_row =
      0;  // first row the policy speaks for: p when another one speaks for the shared prefix
};

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
  // 3. what must outlive a pass.
  virtual Kept kept(const RequestInfo&) const { return {}; }
  // 4. one plan per pass, until no masks are left.
  virtual StepPlan plan(const StepInfo& step) const = 0;

  // For statistics: the depth b of this request (-1: the policy has none).
  virtual int depth(const RequestInfo&) const { return -1; }
};

using PolicyPtr = std::shared_ptr<const Policy>;

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
  PolicyPtr (*make)(const std::vector<std::string>& values);  // one value per field, in order
};
const std::vector<PolicyRow>& policy_table();

// "name", "name:field=value,field=value", or two of them joined by '+'. std::invalid_argument lists
// what exists.
PolicyPtr make_policy(const std::string& text);

// `prefix` speaks for the shared prefix rows, `rest` for all others; the plan is the union, layer
// by layer.
PolicyPtr compose(PolicyPtr prefix, PolicyPtr rest);

// Makers of the table's rows, one file each.
PolicyPtr make_none(const std::vector<std::string>& values);
PolicyPtr make_naive(const std::vector<std::string>& values);
PolicyPtr make_bicache(const std::vector<std::string>& values);

}  // namespace bicache
