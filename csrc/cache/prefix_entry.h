// PrefixEntry: what is kept across requests for one shared prefix. Immutable once made.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "base/buffer.h"

namespace bicache {

// What a policy may read of an entry.
struct EntryNeeds {
  // alone: the prefix by itself (BiCache). first_request: as it stood in the first request's canvas
  // (how an LLM engine would do it; here to show what that does).
  enum class Source : uint8_t { alone, first_request };
  Source source = Source::alone;
  int kv_layers = 0;       // K and V of layers below this one
  std::vector<int> joins;  // residual entering these layers

  bool nothing() const { return kv_layers == 0 && joins.empty(); }
};

class PrefixEntry {
 public:
  // Empty, for `rows` prefix rows (p); kv_width = G * D, dim = E. Filled by the forward pass that
  // makes it.
  PrefixEntry(int64_t rows, int64_t kv_width, int64_t dim, const EntryNeeds& needs)
      : rows_(rows), kv_width_(kv_width), dim_(dim), kv_layers_(needs.kv_layers) {
    const int64_t layer = checked_mul(rows, 2 * kv_width, "prefix entry");
    kv_ = Buffer<float>(checked_mul(needs.kv_layers, layer, "prefix entry"));
    for (const int l : needs.joins)
      h_.emplace(l, Buffer<float>(checked_mul(rows, dim, "prefix entry")));
  }

  int64_t rows() const { return rows_; }
  int kv_layers() const { return kv_layers_; }
  bool has_h(int layer) const { return h_.contains(layer); }
  bool covers(const EntryNeeds& needs) const {
    if (needs.kv_layers > kv_layers_) return false;
    for (const int l : needs.joins) {
      if (!has_h(l)) return false;
    }
    return true;
  }
  std::vector<int> joins() const {
    std::vector<int> layers;
    for (const auto& [l, h] : h_) layers.push_back(l);
    return layers;
  }
  int64_t size_bytes() const {
    int64_t bytes = kv_.size_bytes();
    for (const auto& [l, h] : h_) bytes += h.size_bytes();
    return bytes;
  }
  // What an entry would take.
  static int64_t size_bytes(int64_t rows, int64_t kv_width, int64_t dim, const EntryNeeds& needs) {
    const auto joins = static_cast<int64_t>(needs.joins.size());
    const int64_t per_row = checked_add(checked_mul(needs.kv_layers, 2 * kv_width, "prefix entry"),
                                        checked_mul(joins, dim, "prefix entry"), "prefix entry");
    return checked_mul(checked_mul(rows, per_row, "prefix entry"), sizeof(float), "prefix entry");
  }

  // [G, D] of one row; k after RoPE.
  const float* k(int layer, int64_t row) const { return kv_.data() + at(layer, row); }
  const float* v(int layer, int64_t row) const { return k(layer, row) + kv_width_; }
  float* k(int layer, int64_t row) { return kv_.data() + at(layer, row); }
  float* v(int layer, int64_t row) { return k(layer, row) + kv_width_; }
  // [E]: residual of one row entering `layer`.
  const float* h(int layer, int64_t row) const { return h_.at(layer).data() + row * dim_; }
  float* h(int layer, int64_t row) { return h_.at(layer).data() + row * dim_; }

 private:
  int64_t at(int layer, int64_t row) const { return (layer * rows_ + row) * 2 * kv_width_; }

  int64_t rows_, kv_width_, dim_;
  int kv_layers_;
  Buffer<float> kv_;                // [kv_layers, p, 2, G, D]
  std::map<int, Buffer<float>> h_;  // layer -> [p, E]
};

}  // namespace bicache
