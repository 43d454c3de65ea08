// naive: prefix caching as it is right for causal language models and wrong for diffusion ones: K/V
// of the prefix computed once and reused in every layer, at every step, by every request. Here to
// show the collapse (spec: BiCache section 1).
#include "base/check.h"
#include "cache/policy.h"

namespace bicache {
namespace {

class Naive : public Policy {
 public:
  explicit Naive(EntryNeeds::Source source) : source_(source) {}
  std::string spec() const override {
    return source_ == EntryNeeds::Source::alone ? "naive:source=alone"
                                                : "naive:source=first_request";
  }
  bool prefix_only() const override { return true; }
  EntryNeeds needs(const RequestInfo& r) const override {
    return r.p == 0 ? EntryNeeds{} : EntryNeeds{source_, r.layers, {}};
  }
  std::optional<DepthChoice> choose(const StepInfo& s) const override {
    if (s.step > 0 || s.repeat > 0) return {};
    return DepthChoice{s.request.layers, "naive"};
  }
  StepPlan plan(const StepInfo&) const override { return {{{0, {}}}, {}, false}; }

 private:
  EntryNeeds::Source source_;
};

}  // namespace

PolicyPtr make_naive(const std::vector<std::string>& values, const DepthPtr&) {
  require(values[0] == "alone" || values[0] == "first_request",
          "[cache] naive source: expected alone or first_request, got \"", values[0], "\"");
  return std::make_shared<Naive>(values[0] == "alone" ? EntryNeeds::Source::alone
                                                      : EntryNeeds::Source::first_request);
}

}  // namespace bicache
