// DepthPolicy: how many layers of a prefix's K/V a request may reuse (b, the reusable depth).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cache/step_info.h"

namespace bicache {

struct DepthChoice {
  int depth = -1;
  std::string why;  // one line, for statistics
};

class DepthPolicy {
 public:
  virtual ~DepthPolicy() = default;
  // b from this step on; asked at every refresh.
  virtual DepthChoice choose(const StepInfo& step) const = 0;
  // b of every step, where that is known before the first one.
  virtual std::optional<int> constant(const RequestInfo&) const { return {}; }
  // Every depth it may choose on a model of L layers, ascending: the store keeps what can be read
  // and no more.
  virtual std::vector<int> reachable(int layers) const = 0;
  // Whether it wants StepInfo::to_entry.
  virtual bool observes() const { return false; }
  // As it is written in a cache string.
  virtual std::string str() const = 0;
};

using DepthPtr = std::shared_ptr<const DepthPolicy>;

DepthPtr fixed_depth(int depth);
// The value at the largest key <= ratio; below the first key 0 (no reuse across requests). `kind`:
// where the table comes from, "table" (BiCache's similarity profile) or "agreement".
DepthPtr table_depth(std::map<int, int> depth_at_ratio, std::string kind = "table",
                     RatioOf of = RatioOf::request);
// BiCache's profile rule on rows of the request itself, and more careful: the leading run of layers
// whose K/V are more alike than `tau` (section 3.2) and at whose end the state that the splice
// restores is, too. Nothing is reused before the first measurement.
DepthPtr probe_depth(double tau, bool strict = false);
// A user's function.
using DepthFunction = std::function<int(const StepInfo&)>;
DepthPtr hook_depth(DepthFunction function, std::optional<std::vector<int>> reachable,
                    bool observes);

// "5", "0:1/30:10/90:17" or "table:0:1/30:10" (ratio:depth), "agreement:48:5/86:0", "probe:0.97",
// or "hook", which stands for `hook`.
DepthPtr parse_depth(const std::string& text, RatioOf of = RatioOf::request, DepthPtr hook = {},
                     bool strict = false);

// As a cache string has it: the shortest text that reads back as `x`.
std::string shortest(double x);

}  // namespace bicache
