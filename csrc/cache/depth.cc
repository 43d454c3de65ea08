#include "cache/depth.h"

#include <charconv>
#include <cmath>
#include <set>

#include "base/check.h"

namespace bicache {
namespace {

class FixedDepth : public DepthPolicy {
 public:
  explicit FixedDepth(int depth) : depth_(depth) {}
  int depth(const RequestInfo&) const override { return depth_; }
  std::vector<int> reachable() const override { return {depth_}; }
  std::string str() const override { return std::to_string(depth_); }

 private:
  int depth_;
};

class TableDepth : public DepthPolicy {
 public:
  explicit TableDepth(std::map<int, int> table) : table_(std::move(table)) {}
  int depth(const RequestInfo& request) const override {
    const auto above = table_.upper_bound(request.ratio());
    return above == table_.begin() ? 0 : std::prev(above)->second;
  }
  std::vector<int> reachable() const override {
    std::set<int> depths = {0};
    for (const auto& [ratio, depth] : table_) depths.insert(depth);
    return {depths.begin(), depths.end()};
  }
  std::string str() const override {
    std::string text;
    for (const auto& [ratio, depth] : table_) {
      text += (text.empty() ? "" : "/") + std::to_string(ratio) + ":" + std::to_string(depth);
    }
    return text;
  }

 private:
  std::map<int, int> table_;
};

int parse_int(const std::string& text, const std::string& all) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  require(error == std::errc() && end == text.data() + text.size() && !text.empty(),
          "[cache] depth: expected a number or a table such as 0:1/30:10, got \"", all, "\"");
  return value;
}

}  // namespace

int RequestInfo::ratio() const {
  return n() == 0 ? 0
                  : static_cast<int>(
                        std::nearbyint(100.0 * static_cast<double>(p) / static_cast<double>(n())));
}

std::shared_ptr<const DepthPolicy> fixed_depth(int depth) {
  require(depth >= 0, "[cache] depth: expected >= 0, got ", depth);
  return std::make_shared<FixedDepth>(depth);
}

std::shared_ptr<const DepthPolicy> table_depth(std::map<int, int> table) {
  require(!table.empty(), "[cache] depth table: expected at least one ratio:depth pair, got none");
  for (const auto& [ratio, depth] : table) {
    require(0 <= ratio && ratio <= 100, "[cache] depth table: expected ratios 0..100, got ", ratio);
    require(depth >= 0, "[cache] depth table: expected depths >= 0, got ", depth, " at ratio ",
            ratio);
  }
  return std::make_shared<TableDepth>(std::move(table));
}

std::shared_ptr<const DepthPolicy> parse_depth(const std::string& text) {
  if (text.find(':') == std::string::npos) return fixed_depth(parse_int(text, text));
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
  return table_depth(std::move(table));
}

}  // namespace bicache
