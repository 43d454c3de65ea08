// bicache (arXiv 2606.07571): the prefix's K/V are reused across requests in layers < b and
// recomputed in this request's context in the deeper ones, every refresh_steps; in between, the
// request's own prefix K/V are reused in every layer.
#include <algorithm>

#include "base/check.h"
#include "cache/policy.h"

namespace bicache {
namespace {

class BiCache : public Policy {
 public:
  BiCache(std::shared_ptr<const DepthPolicy> depth, int64_t refresh_steps, bool strict)
      : depth_(std::move(depth)), refresh_steps_(refresh_steps), strict_(strict) {}

  std::string spec() const override {
    return cat("bicache:depth=", depth_->str(), ",refresh_steps=", refresh_steps_,
               ",splice=", strict_ ? "strict" : "official");
  }
  bool prefix_only() const override { return true; }

  void check(const RequestInfo& r) const override {
    for (const int b : depth_->reachable()) {
      require(0 <= b && b <= r.layers, "[cache] bicache depth: expected 0..", r.layers,
              " (the model's layers), got ", b);
    }
  }

  EntryNeeds needs(const RequestInfo& r) const override {
    if (splice(depth_->depth(r)) == 0 || r.p == 0) return {};  // rows start from their embeddings
    // One entry serves every depth this policy may choose.
    EntryNeeds needs{EntryNeeds::Source::alone, 0, {}};
    for (const int b : depth_->reachable()) {
      const int c = splice(b);
      needs.kv_layers = std::max(needs.kv_layers, c);
      if (0 < c && c < r.layers) needs.joins.push_back(c);
    }
    return needs;
  }

  Kept kept(const RequestInfo& r) const override {
    return {{{RowSet::span(0, r.p), splice(depth_->depth(r))}}, {}};
  }

  StepPlan plan(const StepInfo& s) const override {
    if (s.step % refresh_steps_ != 0 || s.repeat > 0) return {{{0, {}}}, {}, false};
    const int c = splice(depth_->depth(s.request));
    const RowSet prefix = RowSet::span(0, s.request.p);
    StepPlan plan{{}, {}, !prefix.empty() && c < s.request.layers};
    if (c > 0) plan.layers.push_back({0, {}});
    if (c < s.request.layers) plan.layers.push_back({c, {prefix, prefix, {}}});
    return plan;
  }

  int depth(const RequestInfo& r) const override { return depth_->depth(r); }

 private:
  // First layer in which the prefix rows run. The official code restores the boundary after layer b
  // - 1, so that layer b's prefix K/V are those of the entry as well: b + 1 stale layers. strict
  // restores it one layer earlier: exactly b.
  int splice(int depth) const { return std::max(0, depth - (strict_ ? 1 : 0)); }

  std::shared_ptr<const DepthPolicy> depth_;
  int64_t refresh_steps_;
  bool strict_;
};

}  // namespace

PolicyPtr make_bicache(const std::vector<std::string>& values) {
  const std::string &steps = values[1], &splice = values[2];
  require(!steps.empty() && steps.size() < 10 &&
              steps.find_first_not_of("0123456789") == std::string::npos && std::stoll(steps) > 0,
          "[cache] bicache refresh_steps: expected a number >= 1, got \"", steps, "\"");
  require(splice == "official" || splice == "strict",
          "[cache] bicache splice: expected official or strict, got \"", splice, "\"");
  return std::make_shared<BiCache>(parse_depth(values[0]), std::stoll(steps), splice == "strict");
}

}  // namespace bicache
