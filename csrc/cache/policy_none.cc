// none: every row, every layer, every step. The reference all others are measured against.
#include "cache/policy.h"

namespace bicache {
namespace {

class None : public Policy {
 public:
  std::string spec() const override { return "none"; }
  StepPlan plan(const StepInfo& s) const override {
    return StepPlan::uniform(RowSet::span(s.first_row, s.request.n()), s.wanted);
  }
};

}  // namespace

PolicyPtr make_none(const std::vector<std::string>&, const DepthPtr&) {
  return std::make_shared<None>();
}

}  // namespace bicache
