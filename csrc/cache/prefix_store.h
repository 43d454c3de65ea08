// PrefixStore: the prefix entries of one model, found by their exact token ids within one
// namespace.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/prefix_entry.h"

namespace bicache {

// Whose entry it is. Requests with different salts never share one, whatever their ids.
struct PrefixKey {
  std::span<const int32_t> tokens;
  EntryNeeds::Source source = EntryNeeds::Source::alone;
  std::string salt;
};

class PrefixStore {
 public:
  using Entry = std::shared_ptr<const PrefixEntry>;

  struct Stats {
    int64_t entries = 0, size_bytes = 0, budget_bytes = 0;
    int64_t pinned = 0;  // entries that a request holds now: not evicted until it ends
    int64_t hits = 0, misses = 0, evictions = 0;
    // Did not fit beside the pinned ones: used by the requests that were under way, not kept.
    int64_t refused = 0;
  };
  // One kept entry.
  struct Item {
    std::vector<int32_t> tokens;
    EntryNeeds::Source source;
    std::string salt;
    Entry entry;
    PrefixKey key() const { return {tokens, source, salt}; }
    int64_t size_bytes() const;
  };

  // `hash_mask`: which bits of the hash are used; tests make collisions with it.
  explicit PrefixStore(int64_t budget_bytes, uint64_t hash_mask = ~uint64_t{0});

  // The entry of exactly this key that covers `needs`, or null. Counts a hit or a miss.
  Entry find(const PrefixKey& key, const EntryNeeds& needs);
  // `needs`, widened by what an entry of this key already holds: what to compute so that nobody
  // loses anything.
  EntryNeeds widened(const PrefixKey& key, const EntryNeeds& needs);
  // Whether an entry of this key that covers `needs` is kept.
  bool keeps(const PrefixKey& key, const EntryNeeds& needs);
  // Tokens of the longest whole entry (source: alone) that begins `prompt` and has at most
  // `max_tokens`; 0: none. Never the head of a longer entry: its rows saw the rest.
  int64_t longest(std::span<const int32_t> prompt, const std::string& salt, int64_t max_tokens);
  // Keeps the entry in place of an older one of the same key that holds less; of those that nobody
  // holds, the least recently used go until the budget is met. Requests that hold a replaced or
  // refused entry keep it alive until they end, and until then a refused one is found.
  void insert(const PrefixKey& key, Entry entry);

  // What is kept, the least recently used first.
  std::vector<Item> items() const;
  // Forgets all entries and counts.
  void clear();
  Stats stats() const;

 private:
  struct Slot {
    Item item;                              // item.entry is null outside the budget,
    std::weak_ptr<const PrefixEntry> held;  // which is alive while a request holds it
    uint64_t hash = 0;
    bool pinned() const { return item.entry != nullptr && item.entry.use_count() > 1; }
  };
  using Slots = std::list<Slot>;  // the most recently used first

  uint64_t hash(const PrefixKey& key) const;
  Slots::iterator locate(const PrefixKey& key);
  void add(const PrefixKey& key, const Entry& entry, bool keep);
  void remove(Slots::iterator slot);
  void drop_expired();

  mutable std::mutex mutex_;
  const uint64_t hash_mask_;
  Slots slots_;
  std::unordered_multimap<uint64_t, Slots::iterator> index_;
  Stats stats_;  // entries and pinned are counted when asked for
};

}  // namespace bicache
