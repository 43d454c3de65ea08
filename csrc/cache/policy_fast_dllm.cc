// fast_dllm (arXiv 2505.22618; generate.py of its repository): every row runs at a block's start,
// and K/V of the rows around the block stay as they are until the next one.
#include "base/check.h"
#include "cache/policy.h"

namespace bicache {
namespace {

struct Settings {
  bool dual = false;          // only the block runs; otherwise the rows after it do, too
  int64_t refresh_steps = 0;  // 0: at block starts alone
  bool fill = false;          // the pass over all rows commits nothing
};

class FastDllm : public Policy {
 public:
  explicit FastDllm(Settings settings) : o_(settings) {}

  std::string spec() const override {
    std::string text = cat("fast_dllm:mode=", o_.dual ? "dual" : "prefix");
    if (o_.refresh_steps > 0) text += cat(",refresh_steps=", o_.refresh_steps);
    if (o_.fill) text += ",block_start=fill";
    return text;
  }

  Kept kept(const RequestInfo& r) const override {
    if (o_.refresh_steps == 1 && !o_.fill) return {};
    return {{{RowSet::span(0, r.n()), 0}}};
  }

  StepPlan plan(const StepInfo& s) const override {
    const bool start =
        o_.refresh_steps > 0 ? s.block_step % o_.refresh_steps == 0 : s.block_step == 0;
    const RowSet all = RowSet::span(s.first_row, s.request.n());
    if (start && !o_.fill) return StepPlan::uniform(all, s.wanted);
    if (start && s.repeat == 0) return StepPlan::uniform(all, {});
    // A model that predicts from the row before needs that of the block's first position.
    return StepPlan::uniform(
        RowSet::span(s.block.begin - s.request.shift, o_.dual ? s.block.end : s.request.n()),
        s.wanted);
  }

 private:
  Settings o_;
};

}  // namespace

PolicyPtr make_fast_dllm(const std::vector<std::string>& values, const DepthPtr&) {
  Settings o;  // values: in the order of the policy table's fields
  o.dual = parse_choice(values[0], "fast_dllm", "mode", "prefix", "dual");
  if (values[1] != "none")
    o.refresh_steps = parse_count(values[1], "fast_dllm", "refresh_steps", "none or ");
  o.fill = parse_choice(values[2], "fast_dllm", "block_start", "commit", "fill");
  return std::make_shared<FastDllm>(o);
}

}  // namespace bicache
