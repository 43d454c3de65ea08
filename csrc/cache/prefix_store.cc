#include "cache/prefix_store.h"

#include <algorithm>
#include <set>

#include "base/check.h"

namespace bicache {

PrefixStore::PrefixStore(int64_t budget_bytes) {
  require(budget_bytes >= 0, "[prefix store] prefix_budget_bytes: expected >= 0, got ",
          budget_bytes);
  stats_.budget_bytes = budget_bytes;
}

PrefixStore::Items::iterator PrefixStore::locate(std::span<const int32_t> tokens,
                                                 EntryNeeds::Source source) {
  return std::find_if(items_.begin(), items_.end(), [&](const Item& item) {
    return item.source == source &&
           std::equal(item.tokens.begin(), item.tokens.end(), tokens.begin(), tokens.end());
  });
}

PrefixStore::Entry PrefixStore::find(std::span<const int32_t> tokens, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto it = locate(tokens, needs.source);
  if (it == items_.end() || !it->entry->covers(needs)) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  items_.splice(items_.begin(), items_, it);
  return it->entry;
}

EntryNeeds PrefixStore::widened(std::span<const int32_t> tokens, const EntryNeeds& needs) const {
  const std::lock_guard lock(mutex_);
  const auto it = const_cast<PrefixStore*>(this)->locate(tokens, needs.source);
  if (it == items_.end()) return needs;
  std::set<int> joins(needs.joins.begin(), needs.joins.end());
  for (const int l : it->entry->joins()) joins.insert(l);
  return {needs.source,
          std::max(needs.kv_layers, it->entry->kv_layers()),
          {joins.begin(), joins.end()}};
}

void PrefixStore::insert(std::span<const int32_t> tokens, EntryNeeds::Source source, Entry entry) {
  const std::lock_guard lock(mutex_);
  if (const auto old = locate(tokens, source); old != items_.end()) {
    stats_.size_bytes -= old->size_bytes;
    items_.erase(old);
  }
  const int64_t size_bytes = entry->size_bytes() + static_cast<int64_t>(tokens.size_bytes());
  if (size_bytes > stats_.budget_bytes) {
    ++stats_.refused;
    return;
  }
  while (stats_.size_bytes + size_bytes > stats_.budget_bytes) {
    stats_.size_bytes -= items_.back().size_bytes;
    items_.pop_back();
    ++stats_.evictions;
  }
  stats_.size_bytes += size_bytes;
  items_.push_front({{tokens.begin(), tokens.end()}, source, std::move(entry), size_bytes});
}

void PrefixStore::clear() {
  const std::lock_guard lock(mutex_);
  items_.clear();
  stats_.size_bytes = 0;
}

PrefixStore::Stats PrefixStore::stats() const {
  const std::lock_guard lock(mutex_);
  Stats s = stats_;
  s.entries = static_cast<int64_t>(items_.size());
  return s;
}

}  // namespace bicache
