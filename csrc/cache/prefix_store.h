// PrefixStore: the prefix entries of one model, found by their exact token ids.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "cache/prefix_entry.h"

namespace bicache {

class PrefixStore {
 public:
  using Entry = std::shared_ptr<const PrefixEntry>;

  struct Stats {
    int64_t entries = 0, size_bytes = 0, budget_bytes = 0;
    int64_t hits = 0, misses = 0, evictions = 0;
    int64_t refused =
        0;  // larger than the whole budget: used by the request that made them, not kept
  };

  explicit PrefixStore(int64_t budget_bytes);

  // The entry of exactly these ids that covers `needs`, or null. Counts a hit or a miss.
  Entry find(std::span<const int32_t> tokens, const EntryNeeds& needs);
  // `needs`, widened by what an entry of these ids already holds: what to compute so that nobody
  // loses anything.
  EntryNeeds widened(std::span<const int32_t> tokens, const EntryNeeds& needs);
  // Keeps the entry in place of an older one of the same ids; the least recently used go until the
  // budget is met. Requests that hold an evicted or refused entry keep it alive until they end, and
  // until then it is found.
  void insert(std::span<const int32_t> tokens, EntryNeeds::Source source, Entry entry);

  // Forgets all entries and counts.
  void clear();
  Stats stats() const;

 private:
  struct Item {
    std::vector<int32_t> tokens;
    EntryNeeds::Source source;
    Entry kept;                             // null: outside the budget,
    std::weak_ptr<const PrefixEntry> held;  // alive while a request holds it
    int64_t size_bytes;                     // of a kept one: entry and ids
  };
  using Items =
      std::list<Item>;  // the most recently used first; few and large, so a linear search is enough
  Items::iterator locate(std::span<const int32_t> tokens, EntryNeeds::Source source);
  void drop(Items::iterator item);

  mutable std::mutex mutex_;
  Items items_;
  Stats stats_;
};

}  // namespace bicache
