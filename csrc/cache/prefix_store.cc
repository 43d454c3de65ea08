#include "cache/prefix_store.h"

#include <algorithm>
#include <set>

#include "base/check.h"
#include "base/hash.h"

namespace bicache {

int64_t PrefixStore::Item::size_bytes() const {
  return entry->size_bytes() + static_cast<int64_t>(tokens.size() * sizeof(int32_t) + salt.size());
}

PrefixStore::PrefixStore(int64_t budget_bytes, uint64_t hash_mask) : hash_mask_(hash_mask) {
  require(budget_bytes >= 0, "[prefix store] prefix_budget_bytes: expected >= 0, got ",
          budget_bytes);
  stats_.budget_bytes = budget_bytes;
}

uint64_t PrefixStore::hash(const PrefixKey& key) const {
  const uint64_t salt = hash_bytes(std::as_bytes(std::span(key.salt)));
  return hash_bytes(std::as_bytes(key.tokens), salt + static_cast<uint64_t>(key.source)) &
         hash_mask_;
}

// The hash only narrows the search: ids and salt are compared in full.
PrefixStore::Slots::iterator PrefixStore::locate(const PrefixKey& key) {
  const auto [begin, end] = index_.equal_range(hash(key));
  for (auto it = begin; it != end; ++it) {
    const Item& item = it->second->item;
    if (item.source == key.source && item.salt == key.salt &&
        std::equal(item.tokens.begin(), item.tokens.end(), key.tokens.begin(), key.tokens.end()))
      return it->second;
  }
  return slots_.end();
}

PrefixStore::Entry PrefixStore::find(const PrefixKey& key, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto slot = locate(key);
  Entry entry = slot == slots_.end() ? nullptr : slot->held.lock();
  if (entry == nullptr || !entry->covers(needs)) {
    ++stats_.misses;
    return nullptr;
  }
  ++stats_.hits;
  slots_.splice(slots_.begin(), slots_, slot);
  return entry;
}

EntryNeeds PrefixStore::widened(const PrefixKey& key, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto slot = locate(key);
  if (slot == slots_.end() || slot->item.entry == nullptr) return needs;
  const PrefixEntry& there = *slot->item.entry;
  std::set<int> joins(needs.joins.begin(), needs.joins.end());
  for (const int l : there.joins()) joins.insert(l);
  return {needs.source, std::max(needs.kv_layers, there.kv_layers()), {joins.begin(), joins.end()}};
}

bool PrefixStore::keeps(const PrefixKey& key, const EntryNeeds& needs) {
  const std::lock_guard lock(mutex_);
  const auto slot = locate(key);
  return slot != slots_.end() && slot->item.entry != nullptr && slot->item.entry->covers(needs);
}

int64_t PrefixStore::longest(std::span<const int32_t> prompt, const std::string& salt,
                             int64_t max_tokens) {
  const std::lock_guard lock(mutex_);
  max_tokens = std::min(max_tokens, static_cast<int64_t>(prompt.size()));
  int64_t longest = 0;
  for (const Slot& slot : slots_) {
    const Item& item = slot.item;
    const auto count = static_cast<int64_t>(item.tokens.size());
    if (longest < count && count <= max_tokens && item.source == EntryNeeds::Source::alone &&
        item.salt == salt && !slot.held.expired() &&
        std::equal(item.tokens.begin(), item.tokens.end(), prompt.begin()))
      longest = count;
  }
  return longest;
}

void PrefixStore::remove(Slots::iterator slot) {
  if (slot->item.entry != nullptr) stats_.size_bytes -= slot->item.size_bytes();
  const auto [begin, end] = index_.equal_range(slot->hash);
  index_.erase(std::find_if(begin, end, [&](const auto& pair) { return pair.second == slot; }));
  slots_.erase(slot);
}

void PrefixStore::drop_expired() {
  for (auto it = slots_.begin(); it != slots_.end();) {
    const auto slot = it++;
    if (slot->held.expired()) remove(slot);
  }
}

void PrefixStore::add(const PrefixKey& key, const Entry& entry, bool keep) {
  slots_.push_front(
      {{{key.tokens.begin(), key.tokens.end()}, key.source, key.salt, keep ? entry : nullptr},
       entry,
       hash(key)});
  index_.emplace(slots_.front().hash, slots_.begin());
  if (keep) stats_.size_bytes += slots_.front().item.size_bytes();
}

void PrefixStore::insert(const PrefixKey& key, Entry entry) {
  const std::lock_guard lock(mutex_);
  drop_expired();
  const int64_t size_bytes =
      entry->size_bytes() + static_cast<int64_t>(key.tokens.size_bytes() + key.salt.size());
  const auto old = locate(key);
  if (old != slots_.end() && old->item.entry != nullptr &&
      old->item.entry->covers({key.source, entry->kv_layers(), entry->joins()}))
    return;           // somebody else was faster
  int64_t stays = 0;  // what cannot go
  for (auto slot = slots_.begin(); slot != slots_.end(); ++slot) {
    if (slot != old && slot->pinned()) stays += slot->item.size_bytes();
  }
  if (size_bytes > stats_.budget_bytes - stays) {
    ++stats_.refused;
    if (old == slots_.end()) add(key, entry, false);  // an older one goes on serving whom it can
    return;
  }
  if (old != slots_.end()) remove(old);
  for (auto it = slots_.end(); stats_.size_bytes + size_bytes > stats_.budget_bytes;) {
    const auto slot = std::prev(it);
    if (slot->item.entry == nullptr || slot->pinned()) {
      it = slot;
      continue;
    }
    remove(slot);
    ++stats_.evictions;
  }
  add(key, entry, true);
}

std::vector<PrefixStore::Item> PrefixStore::items() const {
  const std::lock_guard lock(mutex_);
  std::vector<Item> all;
  for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) {
    if (slot->item.entry != nullptr) all.push_back(slot->item);
  }
  return all;
}

void PrefixStore::clear() {
  const std::lock_guard lock(mutex_);
  index_.clear();
  slots_.clear();
  const int64_t budget_bytes = stats_.budget_bytes;
  stats_ = {};
  stats_.budget_bytes = budget_bytes;
}

PrefixStore::Stats PrefixStore::stats() const {
  const std::lock_guard lock(mutex_);
  Stats s = stats_;
  for (const Slot& slot : slots_) {
    s.entries += slot.item.entry != nullptr ? 1 : 0;
    s.pinned += slot.pinned() ? 1 : 0;
  }
  return s;
}

}  // namespace bicache
