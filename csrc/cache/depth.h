// DepthPolicy: how many layers of a prefix's K/V a request may reuse (b, the reusable depth).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace bicache {

// What is known of a request before it runs.
struct RequestInfo {
  int layers = 0;  // L
  int64_t p = 0;   // shared-prefix rows
  int64_t u = 0;   // the request's own prompt rows
  int64_t g = 0;   // response rows
  int shift = 0;   // position i is predicted from row i - shift

  int64_t n() const { return p + u + g; }
  // BiCache's ratio: round(100 p / (p + u + g)), mask rows included (half to even, as Python
  // rounds).
  int ratio() const;
};

class DepthPolicy {
 public:
  virtual ~DepthPolicy() = default;
  // b of this request, 0..L.
  virtual int depth(const RequestInfo& request) const = 0;
  // Every depth it may return, so that the store keeps what can be read and no more.
  virtual std::vector<int> reachable() const = 0;
  // As it is written in a cache string.
  virtual std::string str() const = 0;
};

std::shared_ptr<const DepthPolicy> fixed_depth(int depth);
// BiCache's offline table: the value at the largest key <= ratio; below the first key 0 (no reuse
// across requests).
std::shared_ptr<const DepthPolicy> table_depth(std::map<int, int> depth_at_ratio);
// "5", or "0:1/30:10/90:17" (ratio:depth).
std::shared_ptr<const DepthPolicy> parse_depth(const std::string& text);

}  // namespace bicache
