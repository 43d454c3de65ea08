// Prefix files put together by hand from the table in prefix_file.h, so that tests can compare with
// them and get every field wrong; and stores to save.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/hash.h"
#include "cache/prefix_file.h"
#include "temp_files.h"

namespace bicache {

// The running checksum of a prefix file.
class FieldSum {
 public:
  void add(std::string_view field) {
    for (; !field.empty(); field.remove_prefix(std::min<size_t>(field.size(), 1 << 20)))
      sum_ = hash_bytes(std::as_bytes(std::span(field.substr(0, 1 << 20))), sum_);
  }
  std::string bytes() const { return little_endian(sum_); }

 private:
  uint64_t sum_ = 0;
};

struct ImageEntry {
  uint64_t tokens = 0, salt_bytes = 0;
  uint32_t source = 0, kv_layers = 0, joins = 0;
  std::vector<int32_t> ids;
  std::string salt;
  std::vector<uint32_t> join_layers;
  std::vector<std::string> payload;  // K and V, then one residual per join

  ImageEntry() = default;
  explicit ImageEntry(const PrefixStore::Item& item)
      : tokens(item.tokens.size()),
        salt_bytes(item.salt.size()),
        source(item.source == EntryNeeds::Source::first_request ? 1 : 0),
        kv_layers(static_cast<uint32_t>(item.entry->kv_layers())),
        ids(item.tokens),
        salt(item.salt) {
    for (const int l : item.entry->joins()) join_layers.push_back(static_cast<uint32_t>(l));
    joins = static_cast<uint32_t>(join_layers.size());
    for (const auto part : item.entry->parts())
      payload.emplace_back(reinterpret_cast<const char*>(part.data()), part.size());
  }
};

struct PrefixImage {
  std::string magic = "bcprefix";
  uint32_t version = 2, layers = 0;
  uint64_t kv_width = 0, dim = 0;
  uint32_t kv_dtype = 0, residual_dtype = 0, fingerprint_bytes = 0;
  uint64_t count = 0;
  std::string fingerprint;
  std::vector<ImageEntry> entries;

  PrefixImage(const StoreShape& shape, const std::vector<PrefixStore::Item>& items)
      : layers(static_cast<uint32_t>(shape.layers)),
        kv_width(static_cast<uint64_t>(shape.kv_width)),
        dim(static_cast<uint64_t>(shape.dim)),
        kv_dtype(shape.types.kv == DType::bf16 ? 1 : 0),
        residual_dtype(shape.types.residual == DType::bf16 ? 1 : 0),
        fingerprint_bytes(static_cast<uint32_t>(shape.fingerprint.size())),
        count(items.size()),
        fingerprint(shape.fingerprint),
        entries(items.begin(), items.end()) {}

  std::string bytes() const {
    std::string all;
    FieldSum sum;
    const auto put = [&](std::string_view field) {
      all += field;
      sum.add(field);
    };
    const auto u32 = [&](uint32_t x) { put(little_endian(x).substr(0, 4)); };
    const auto u64 = [&](uint64_t x) { put(little_endian(x)); };
    const auto seal = [&] { put(sum.bytes()); };
    put(magic);
    u32(version);
    u32(layers);
    u64(kv_width);
    u64(dim);
    u32(kv_dtype);
    u32(residual_dtype);
    u32(fingerprint_bytes);
    u64(count);
    put(fingerprint);
    seal();
    for (const ImageEntry& e : entries) {
      u64(e.tokens);
      u64(e.salt_bytes);
      u32(e.source);
      u32(e.kv_layers);
      u32(e.joins);
      seal();
      std::string ids, joins;
      for (const int32_t id : e.ids) ids += little_endian(static_cast<uint32_t>(id)).substr(0, 4);
      for (const uint32_t l : e.join_layers) joins += little_endian(l).substr(0, 4);
      put(ids);
      put(e.salt);
      put(joins);
      for (const std::string& part : e.payload) put(part);
      seal();
    }
    return all;
  }
};

// `bytes` with every checksum set right that a reader would come to: damage behind them is then
// content.
inline std::string resealed(std::string bytes, const StoreShape& shape) {
  FieldSum sum;
  size_t at = 0;
  // Passes over a field; false if it is not there.
  const auto skip = [&](uint64_t size) {
    if (size > bytes.size() - at) return false;
    sum.add(std::string_view(bytes).substr(at, size));
    at += size;
    return true;
  };
  const auto number = [&](size_t size, uint64_t& x) {
    if (!skip(size)) return false;
    x = 0;
    for (size_t i = 0; i < size; ++i)
      x |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[at - size + i])) << (8 * i);
    return true;
  };
  const auto seal = [&] {
    if (bytes.size() - at < 8) return false;
    bytes.replace(at, 8, sum.bytes());
    return skip(8);
  };
  uint64_t x = 0, fingerprint = 0, entries = 0;
  if (!skip(8) || !skip(4) || !skip(4) || !skip(8) || !skip(8) || !skip(4) || !skip(4) ||
      !number(4, fingerprint) || !number(8, entries) || !skip(fingerprint) || !seal())
    return bytes;
  const auto k_and_v = static_cast<uint64_t>(2 * shape.kv_width * size_bytes(shape.types.kv));
  const auto h = static_cast<uint64_t>(shape.dim * size_bytes(shape.types.residual));
  for (; entries > 0; --entries) {
    uint64_t tokens = 0, salt = 0, kv_layers = 0, joins = 0;
    if (!number(8, tokens) || !number(8, salt) || !number(4, x) || !number(4, kv_layers) ||
        !number(4, joins) || !seal() || tokens > bytes.size() || !skip(tokens * 4) || !skip(salt) ||
        !skip(joins * 4) || !skip(tokens * kv_layers * k_and_v))
      return bytes;
    for (; joins > 0; --joins) {
      if (!skip(tokens * h)) return bytes;
    }
    if (!seal()) return bytes;
  }
  return bytes;
}

using Ids = std::vector<int32_t>;

constexpr int64_t kBudget = 1 << 30;

// Random bits in every element: infinities and NaNs too.
inline void add(PrefixStore& store, const StoreShape& shape, const Ids& ids,
                const std::string& salt, const EntryNeeds& needs) {
  static std::mt19937 bits(1);
  auto entry = std::make_shared<PrefixEntry>(static_cast<int64_t>(ids.size()), shape.kv_width,
                                             shape.dim, needs, shape.types);
  for (const std::span<std::byte> part : entry->parts()) {
    for (std::byte& b : part) b = static_cast<std::byte>(bits());
  }
  store.insert({ids, needs.source, salt}, std::move(entry));
}

// Two entries with everything in them that the format knows.
inline void fill(PrefixStore& store, const StoreShape& shape) {
  add(store, shape, {1, 2}, "salt", {EntryNeeds::Source::alone, 1, {1, 3}});
  add(store, shape, {2147483647}, "", {EntryNeeds::Source::first_request, 4, {}});
}

// What a store holds, in its order, as a file would have it.
inline std::string content(const PrefixStore& store, const StoreShape& shape) {
  return PrefixImage(shape, store.items()).bytes();
}

}  // namespace bicache
