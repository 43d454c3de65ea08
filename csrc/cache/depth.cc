#include "cache/depth.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <set>

#include "base/check.h"

namespace bicache {
namespace {

std::vector<int> all_depths(int layers) {
  std::vector<int> depths(static_cast<size_t>(layers) + 1);
  std::iota(depths.begin(), depths.end(), 0);
  return depths;
}

class FixedDepth : public DepthPolicy {
 public:
  explicit FixedDepth(int depth) : depth_(depth) {}
  DepthChoice choose(const StepInfo&) const override { return {depth_, "fixed"}; }
  std::optional<int> constant(const RequestInfo&) const override { return depth_; }
  std::vector<int> reachable(int) const override { return {depth_}; }
  std::string str() const override { return std::to_string(depth_); }

 private:
  int depth_;
};

class TableDepth : public DepthPolicy {
 public:
  TableDepth(std::map<int, int> table, std::string kind, RatioOf of)
      : table_(std::move(table)), kind_(std::move(kind)), of_(of) {}

  DepthChoice choose(const StepInfo& s) const override { return look_up(s.request); }
  std::optional<int> constant(const RequestInfo& r) const override { return look_up(r).depth; }
  std::vector<int> reachable(int) const override {
    std::set<int> depths = {0};
    for (const auto& [ratio, depth] : table_) depths.insert(depth);
    return {depths.begin(), depths.end()};
  }
  std::string str() const override {
    std::string text;
    for (const auto& [ratio, depth] : table_) {
      text += (text.empty() ? "" : "/") + std::to_string(ratio) + ":" + std::to_string(depth);
    }
    return kind_ == "table" ? text : kind_ + ":" + text;
  }

 private:
  DepthChoice look_up(const RequestInfo& r) const {
    const int ratio = r.ratio(of_);
    const auto above = table_.upper_bound(ratio);
    const std::string where = cat(kind_, ": ratio ", ratio);
    if (above == table_.begin())
      return {0, cat(where, " is below the first, ", table_.begin()->first)};
    return {std::prev(above)->second, cat(where, " reads the entry at ", std::prev(above)->first)};
  }

  std::map<int, int> table_;
  std::string kind_;
  RatioOf of_;
};

class ProbeDepth : public DepthPolicy {
 public:
  ProbeDepth(double tau, bool strict) : tau_(tau), strict_(strict) {}
  DepthChoice choose(const StepInfo& s) const override {
    if (s.to_entry.empty()) return {0, "probe: nothing was measured yet"};
    const auto layers = static_cast<int>(s.to_entry.size());
    for (int b = 0; b < layers; ++b) {
      const double kv = s.to_entry[b].kv();
      if (!(kv > tau_)) return {b, cat("probe: similarity ", shortest(kv), " in layer ", b)};
      const int splice = strict_ ? b : b + 1;  // of depth b + 1
      if (splice == 0 || splice == layers) continue;
      const double state = s.to_entry[splice].residual;
      if (!(state > tau_))
        return {
            b, cat("probe: similarity ", shortest(state), " of the state entering layer ", splice)};
    }
    return {layers, cat("probe: similarity > ", shortest(tau_), " in all layers observed")};
  }
  std::vector<int> reachable(int layers) const override { return all_depths(layers); }
  bool observes() const override { return true; }
  std::string str() const override { return "probe:" + shortest(tau_); }

 private:
  double tau_;
  bool strict_;
};

class HookDepth : public DepthPolicy {
 public:
  HookDepth(DepthFunction function, std::optional<std::vector<int>> reachable, bool observes)
      : function_(std::move(function)), reachable_(std::move(reachable)), observes_(observes) {}
  DepthChoice choose(const StepInfo& s) const override {
    const int b = function_(s);
    const std::vector<int> depths = reachable(s.request.layers);
    if (!std::binary_search(depths.begin(), depths.end(), b)) {
      std::string list;
      for (const int d : depths) list += (list.empty() ? "" : ", ") + std::to_string(d);
      fail("[cache] depth hook: expected one of ", list, ", got ", b);
    }
    return {b, "hook"};
  }
  std::vector<int> reachable(int layers) const override {
    return reachable_ ? *reachable_ : all_depths(layers);
  }
  bool observes() const override { return observes_; }
  std::string str() const override { return "hook"; }

 private:
  DepthFunction function_;
  std::optional<std::vector<int>> reachable_;
  bool observes_;
};

int parse_int(const std::string& text, const std::string& all) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size() && !text.empty(),
          "[cache] depth: expected a number, a table such as 0:1/30:10, agreement:TABLE, "
          "probe:TAU or hook, got \"",
          all, "\"");
  return value;
}

std::map<int, int> parse_table(const std::string& text) {
  std::map<int, int> table;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find('/', at), text.size());
    const std::string pair = text.substr(at, end - at);
    const size_t colon = pair.find(':');
    require(colon != std::string::npos, "[cache] depth: expected ratio:depth, got \"", pair,
            "\" in \"", text, "\"");
    const int ratio = parse_int(pair.substr(0, colon), text);
    require(table.emplace(ratio, parse_int(pair.substr(colon + 1), text)).second,
            "[cache] depth table: expected each ratio once, got ", ratio, " twice");
    at = end + 1;
  }
  return table;
}

}  // namespace

std::string shortest(double x) {
  char text[32];  // to_chars, unlike printf, does not ask the locale
  return {text, std::to_chars(text, text + sizeof text, x).ptr};
}

int RequestInfo::ratio(RatioOf of) const {
  const int64_t rows = of == RatioOf::request ? n() : p + u;
  return rows == 0 ? 0
                   : static_cast<int>(std::nearbyint(100.0 * static_cast<double>(p) /
                                                     static_cast<double>(rows)));
}

DepthPtr fixed_depth(int depth) {
  require(depth >= 0, "[cache] depth: expected >= 0, got ", depth);
  return std::make_shared<FixedDepth>(depth);
}

DepthPtr table_depth(std::map<int, int> table, std::string kind, RatioOf of) {
  require(!table.empty(), "[cache] depth table: expected at least one ratio:depth pair, got none");
  for (const auto& [ratio, depth] : table) {
    require(0 <= ratio && ratio <= 100, "[cache] depth table: expected ratios 0..100, got ", ratio);
    require(depth >= 0, "[cache] depth table: expected depths >= 0, got ", depth, " at ratio ",
            ratio);
  }
  return std::make_shared<TableDepth>(std::move(table), std::move(kind), of);
}

DepthPtr probe_depth(double tau, bool strict) {
  require(std::isfinite(tau) && -1 <= tau && tau <= 1,
          "[cache] depth probe: expected a similarity -1..1, got ", tau);
  return std::make_shared<ProbeDepth>(tau, strict);
}

DepthPtr hook_depth(DepthFunction function, std::optional<std::vector<int>> reachable,
                    bool observes) {
  if (reachable) {
    std::set<int> depths(reachable->begin(), reachable->end());
    require(!depths.empty() && *depths.begin() >= 0,
            "[cache] depth hook reachable: expected depths >= 0, got ",
            depths.empty() ? "none" : std::to_string(*depths.begin()));
    reachable->assign(depths.begin(), depths.end());
  }
  return std::make_shared<HookDepth>(std::move(function), std::move(reachable), observes);
}

DepthPtr parse_depth(const std::string& text, RatioOf of, DepthPtr hook, bool strict) {
  const size_t colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  const std::string rest = colon == std::string::npos ? "" : text.substr(colon + 1);
  if (kind == "hook") {
    require(hook != nullptr && rest.empty(),
            "[cache] depth hook: expected a function, which a cache string cannot carry; pass "
            "BiCache(depth=function) instead of \"",
            text, "\"");
    return hook;
  }
  if (kind == "probe") {
    double tau = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), tau);
    require(error == std::errc() && end == rest.data() + rest.size() && !rest.empty(),
            "[cache] depth probe: expected probe:TAU such as probe:0.97, got \"", text, "\"");
    return probe_depth(tau, strict);
  }
  if (kind == "table" || kind == "agreement") return table_depth(parse_table(rest), kind, of);
  if (colon != std::string::npos) return table_depth(parse_table(text), "table", of);
  return fixed_depth(parse_int(text, text));
}

}  // namespace bicache
