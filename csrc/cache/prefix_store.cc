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
  std::erase_if(items_, [](const Item& item) { return item.held.expired(); });
  return std::find_if(items_.begin(), items_.end(), [&](const Item& item) {
    return item.source == source &&
           std::equal(item.tokens.begin(), item.tokens.end(), tokens.begin(), tokens.end());
  });
}

PrefixStore::Entry PrefixStore::find(std::span<const int32_t> tokens, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto it = locate(tokens, needs.source);
  Entry entry = it == items_.end() ? nullptr : it->held.lock();
  if (entry == nullptr || !entry->covers(needs)) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  items_.splice(items_.begin(), items_, it);
  return entry;
}

EntryNeeds PrefixStore::widened(std::span<const int32_t> tokens, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto it = locate(tokens, needs.source);
  if (it == items_.end() || it->kept == nullptr) return needs;
  std::set<int> joins(needs.joins.begin(), needs.joins.end());
  for (const int l : it->kept->joins()) joins.insert(l);
  return {
      needs.source, std::max(needs.kv_layers, it->kept->kv_layers()), {joins.begin(), joins.end()}};
}

// Outside the budget from now on.
void PrefixStore::drop(Items::iterator item) {
  stats_.size_bytes -= item->size_bytes;
  item->size_bytes = 0;
  item->kept = nullptr;
}

void PrefixStore::insert(std::span<const int32_t> tokens, EntryNeeds::Source source, Entry entry) {
  const std::lock_guard lock(mutex_);
  const int64_t size_bytes = entry->size_bytes() + static_cast<int64_t>(tokens.size_bytes());
  const auto old = locate(tokens, source);
  if (size_bytes > stats_.budget_bytes) {
    ++stats_.refused;
    if (old != items_.end()) return;  // the older one goes on serving whom it can
    items_.push_back({{tokens.begin(), tokens.end()}, source, nullptr, entry, 0});
    return;
  }
  if (old != items_.end()) {
    drop(old);
    items_.erase(old);
  }
  for (auto it = items_.end(); stats_.size_bytes + size_bytes > stats_.budget_bytes;) {
    if ((--it)->kept == nullptr) continue;
    drop(it);
    ++stats_.evictions;
  }
  stats_.size_bytes += size_bytes;
  items_.push_front({{tokens.begin(), tokens.end()}, source, entry, entry, size_bytes});
}

void PrefixStore::clear() {
  const std::lock_guard lock(mutex_);
  items_.clear();
  const int64_t budget_bytes = stats_.budget_bytes;
  stats_ = {};
  stats_.budget_bytes = budget_bytes;
}

PrefixStore::Stats PrefixStore::stats() const {
  const std::lock_guard lock(mutex_);
  Stats s = stats_;
  s.entries =
      std::count_if(items_.begin(), items_.end(), [](const Item& i) { return i.kept != nullptr; });
  return s;
}

}  // namespace bicache
