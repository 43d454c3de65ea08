#include "cache/plan.h"

#include <algorithm>

#include "base/check.h"

namespace bicache {

const LayerPlan& StepPlan::at(int layer) const {
  const LayerSpan* found = nullptr;
  for (const LayerSpan& s : layers) {
    if (s.first <= layer) found = &s;
  }
  internal_check(found != nullptr, "[plan] layer ", layer,
                 ": expected a span from layer 0 on, got none");
  return found->plan;
}

StepPlan StepPlan::uniform(RowSet rows, RowSet logits) {
  return {{{0, {rows, rows, {}}}}, std::move(logits), false};
}

RowCount predicted_rows(const StepPlan& plan, int layer) {
  RowCount n{plan.at(layer).fresh.size(), 0};
  if (plan.observe.first <= layer && layer < plan.observe.end)
    n.recomputed += plan.observe.rows.size();
  for (const Select& s : plan.at(layer).select) {
    n.recomputed += s.count;
    n.value_only += s.rows.size() - s.count;
  }
  return n;
}

namespace {

void check_layer(const LayerPlan& plan, int layer, int64_t n) {
  const RowSet all = RowSet::span(0, n);
  require(all.contains(plan.live), "[plan] layer ", layer, " live: expected rows of 0..", n - 1,
          ", got ", plan.live.str());
  require(plan.live.contains(plan.fresh), "[plan] layer ", layer,
          " fresh: expected a subset of live (", plan.live.str(), "), got ", plan.fresh.str());
  RowSet idle = plan.live.minus(plan.fresh);
  for (const Select& s : plan.select) {
    require(idle.contains(s.rows), "[plan] layer ", layer,
            " select: expected rows that are live, not fresh and in no other select (", idle.str(),
            "), got ", s.rows.str());
    require(0 <= s.count && s.count <= s.rows.size(), "[plan] layer ", layer,
            " select count: expected 0..", s.rows.size(), ", got ", s.count);
    idle = idle.minus(s.rows);
  }
}

}  // namespace

void check_plan(const StepPlan& plan, int layers, int64_t n, int64_t p, int shift) {
  require(!plan.layers.empty() && plan.layers.front().first == 0,
          "[plan] layers: expected a first span at layer 0, got ",
          plan.layers.empty() ? "none" : "a later one");
  const RowSet prefix = RowSet::span(0, p);
  const RowSet* below = nullptr;
  int last = -1;
  for (const LayerSpan& s : plan.layers) {
    require(s.first > last && s.first < std::max(layers, 1),
            "[plan] layers: expected spans ascending below ", layers, ", got ", s.first, " after ",
            last);
    check_layer(s.plan, s.first, n);
    if (below != nullptr) {
      const RowSet late = s.plan.live.minus(*below);
      require(prefix.contains(late), "[plan] layer ", s.first,
              ": expected only shared-prefix rows to join late, got ", late.str());
    }
    below = &s.plan.live;
    last = s.first;
  }
  require(prefix.contains(plan.observe.rows), "[plan] observe: expected shared-prefix rows (",
          prefix.str(), "), got ", plan.observe.rows.str());
  require(0 <= plan.observe.first && plan.observe.first <= plan.observe.end &&
              plan.observe.end <= layers,
          "[plan] observe: expected layers of 0..", layers, ", got ", plan.observe.first, " to ",
          plan.observe.end);
  plan.logits.for_each([&](int64_t i) {
    const int64_t row = std::max<int64_t>(i - shift, 0);
    require(0 <= i && i < n && below->contains(row), "[plan] logits: position ", i,
            " is predicted from row ", row, ", expected it to be live in the last layer (",
            below->str(), ")");
  });
}

}  // namespace bicache
