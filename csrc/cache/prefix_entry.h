// PrefixEntry: what is kept across requests for one shared prefix. Immutable once made.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/convert.h"

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

// How an entry is held: f32 or bf16.
struct EntryTypes {
  DType kv = DType::f32;        // K and V
  DType residual = DType::f32;  // h
  bool operator==(const EntryTypes&) const = default;
};

// Of the entries of a model whose K and V are `kv`: these as they are, or, where they are f32, as
// `prefix_dtype`.
constexpr EntryTypes entry_types(DType kv, DType prefix_dtype) {
  return {kv == DType::f32 ? prefix_dtype : kv, prefix_dtype};
}

class PrefixEntry {
 public:
  // Empty, for `rows` prefix rows (p); kv_width = G * D, dim = E. Filled by the forward pass that
  // makes it.
  PrefixEntry(int64_t rows, int64_t kv_width, int64_t dim, const EntryNeeds& needs,
              EntryTypes types = {})
      : rows_(rows), kv_width_(kv_width), dim_(dim), kv_layers_(needs.kv_layers), types_(types) {
    size_bytes(rows, kv_width, dim, needs, types);  // throws where it would not fit an int64
    kv_ = Buffer<std::byte>(kv_layers_ * rows * 2 * kv_bytes());
    for (const int layer : needs.joins) h_.emplace(layer, rows * h_bytes());
  }

  int64_t rows() const { return rows_; }
  int64_t kv_width() const { return kv_width_; }
  int64_t dim() const { return dim_; }
  EntryTypes types() const { return types_; }
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
  static int64_t size_bytes(int64_t rows, int64_t kv_width, int64_t dim, const EntryNeeds& needs,
                            EntryTypes types, const char* where = "prefix entry") {
    const auto mul = [&](int64_t a, int64_t b) { return checked_mul(a, b, where); };
    const int64_t kv = mul(mul(needs.kv_layers, mul(2, kv_width)), bicache::size_bytes(types.kv));
    const int64_t h = mul(mul(static_cast<int64_t>(needs.joins.size()), dim),
                          bicache::size_bytes(types.residual));
    return mul(rows, checked_add(kv, h, where));
  }

  // One row of a layer: k after RoPE and v [G, D] of type `from`, h (the residual entering it) [E].
  void put_kv(int layer, int64_t row, const void* k, const void* v, DType from = DType::f32) {
    std::byte* at = kv_.data() + kv_at(layer, row);
    convert(k, from, kv_width_, at, types_.kv);
    convert(v, from, kv_width_, at + kv_bytes(), types_.kv);
  }
  void put_h(int layer, int64_t row, const float* h) {
    convert(h, DType::f32, dim_, h_.at(layer).data() + row * h_bytes(), types_.residual);
  }
  void get_h(int layer, int64_t row, float* out) const {
    convert(h_.at(layer).data() + row * h_bytes(), types_.residual, dim_, out, DType::f32);
  }
  // In place: K and V of all rows of a layer [p, 2, G, D], those of one row [G, D]; of types().kv.
  const void* kv(int layer) const { return kv_.data() + kv_at(layer, 0); }
  const void* k(int layer, int64_t row) const { return kv_.data() + kv_at(layer, row); }
  const void* v(int layer, int64_t row) const {
    return kv_.data() + kv_at(layer, row) + kv_bytes();
  }
  // Of one row, [2, G, D].
  void get_kv(int layer, int64_t row, float* out) const {
    convert(k(layer, row), types_.kv, 2 * kv_width_, out, DType::f32);
  }

  // The bytes as they are held, to save and restore: K and V, then the residuals by layer.
  std::vector<std::span<std::byte>> parts() {
    std::vector<std::span<std::byte>> all = {{kv_.data(), static_cast<size_t>(kv_.size())}};
    for (auto& [l, h] : h_) all.emplace_back(h.data(), static_cast<size_t>(h.size()));
    return all;
  }
  std::vector<std::span<const std::byte>> parts() const {
    std::vector<std::span<const std::byte>> all = {{kv_.data(), static_cast<size_t>(kv_.size())}};
    for (const auto& [l, h] : h_) all.emplace_back(h.data(), static_cast<size_t>(h.size()));
    return all;
  }

 private:
  // Of one row's K or V, of one row's h.
  int64_t kv_bytes() const { return kv_width_ * bicache::size_bytes(types_.kv); }
  int64_t h_bytes() const { return dim_ * bicache::size_bytes(types_.residual); }
  int64_t kv_at(int layer, int64_t row) const { return (layer * rows_ + row) * 2 * kv_bytes(); }

  int64_t rows_, kv_width_, dim_;
  int kv_layers_;
  EntryTypes types_;
  Buffer<std::byte> kv_;                // [kv_layers, p, 2, G, D]
  std::map<int, Buffer<std::byte>> h_;  // layer -> [p, E]
};

}  // namespace bicache
