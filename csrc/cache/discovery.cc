#include "cache/discovery.h"

#include <algorithm>
#include <functional>

namespace bicache {

int64_t Discovery::prefix_of(std::span<const int32_t> prompt, const std::string& salt,
                             int64_t max_tokens, const DiscoveryRule& rule, PrefixStore& store) {
  const int64_t stored = store.longest(prompt, salt, max_tokens);
  const std::lock_guard lock(mutex_);
  std::vector<int64_t> heads;  // tokens in common with each prompt seen before
  for (const Seen& s : seen_) {
    if (s.salt != salt) continue;
    const auto [end, unused] =
        std::mismatch(prompt.begin(), prompt.end(), s.tokens.begin(), s.tokens.end());
    heads.push_back(std::min<int64_t>(end - prompt.begin(), max_tokens));
  }
  seen_.push_back({salt, {prompt.begin(), prompt.end()}});
  tokens_ += prompt.size();
  while (seen_.size() > kPrompts || (tokens_ > kTokens && seen_.size() > 1)) {
    tokens_ -= seen_.front().tokens.size();
    seen_.pop_front();
  }
  // The longest head that min_requests - 1 earlier prompts share with this one.
  const auto others = static_cast<size_t>(std::max<int64_t>(rule.min_requests - 1, 1));
  if (heads.size() < others) return stored;
  std::nth_element(heads.begin(), heads.begin() + static_cast<int64_t>(others) - 1, heads.end(),
                   std::greater<>());
  const int64_t common = heads[others - 1];
  return common >= stored + rule.min_tokens ? common : stored;
}

void Discovery::clear() {
  const std::lock_guard lock(mutex_);
  seen_.clear();
  tokens_ = 0;
}

}  // namespace bicache
