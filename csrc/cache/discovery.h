// Discovery: which head of a prompt is worth being a shared prefix, where nobody said so.
#pragma once

#include <deque>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cache/prefix_store.h"

namespace bicache {

struct DiscoveryRule {
  int64_t min_tokens = 64;   // n: shorter common heads are not worth an entry
  int64_t min_requests = 3;  // m: requests that must begin alike, this one included
};

class Discovery {
 public:
  // Tokens of `prompt` to take as its shared prefix; 0: none. The longest whole entry of the store
  // that begins the prompt; or, where the last prompts of this salt show a common head that is
  // longer by at least min_tokens, that head, which the caller then stores. Remembers the prompt.
  // At most `max_tokens`.
  int64_t prefix_of(std::span<const int32_t> prompt, const std::string& salt, int64_t max_tokens,
                    const DiscoveryRule& rule, PrefixStore& store);
  void clear();

 private:
  static constexpr size_t kPrompts = 256;             // remembered at most,
  static constexpr size_t kTokens = size_t{1} << 20;  // of this many tokens in all
  struct Seen {
    std::string salt;
    std::vector<int32_t> tokens;
  };
  std::mutex mutex_;
  std::deque<Seen> seen_;  // the latest last
  size_t tokens_ = 0;
};

}  // namespace bicache
