// PrefixEntry: what is kept across requests for one shared prefix. Immutable once made.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/dtype.h"

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
  // Empty, for `rows` prefix rows (p); kv_width = G * D, dim = E; held as `dtype`. Filled by the
  // forward pass that makes it.
  PrefixEntry(int64_t rows, int64_t kv_width, int64_t dim, const EntryNeeds& needs,
              DType dtype = DType::f32)
      : rows_(rows), kv_width_(kv_width), dim_(dim), kv_layers_(needs.kv_layers), dtype_(dtype) {
    const int64_t joins = static_cast<int64_t>(needs.joins.size());
    size_bytes(rows, kv_width, dim, needs, dtype);  // throws where it would not fit an int64
    kv_ = Buffer<std::byte>(kv_layers_ * layer_bytes());
    for (int64_t i = 0; i < joins; ++i) h_.emplace(needs.joins[i], rows * dim * width());
  }

  int64_t rows() const { return rows_; }
  int64_t kv_width() const { return kv_width_; }
  int64_t dim() const { return dim_; }
  DType dtype() const { return dtype_; }
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
                            DType dtype) {
    const auto joins = static_cast<int64_t>(needs.joins.size());
    const int64_t per_row = checked_add(checked_mul(needs.kv_layers, 2 * kv_width, "prefix entry"),
                                        checked_mul(joins, dim, "prefix entry"), "prefix entry");
    return checked_mul(checked_mul(rows, per_row, "prefix entry"), bicache::size_bytes(dtype),
                       "prefix entry");
  }

  // One row of a layer: k after RoPE and v [G, D], h (the residual entering it) [E].
  void put_kv(int layer, int64_t row, const float* k, const float* v) {
    std::byte* at = kv_.data() + layer * layer_bytes() + row * 2 * kv_width_ * width();
    narrow(k, kv_width_, at);
    narrow(v, kv_width_, at + kv_width_ * width());
  }
  void put_h(int layer, int64_t row, const float* h) {
    narrow(h, dim_, h_.at(layer).data() + row * dim_ * width());
  }
  void get_h(int layer, int64_t row, float* out) const {
    widen(h_.at(layer).data() + row * dim_ * width(), dim_, out);
  }
  // All rows of a layer [p, 2, G, D]. In place where they are held as f32; otherwise null, and
  // get_kv copies one row, [2, G, D].
  const float* kv(int layer) const {
    if (dtype_ != DType::f32) return nullptr;
    return reinterpret_cast<const float*>(kv_.data() + layer * layer_bytes());
  }
  void get_kv(int layer, int64_t row, float* out) const {
    widen(kv_.data() + layer * layer_bytes() + row * 2 * kv_width_ * width(), 2 * kv_width_, out);
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
  int64_t width() const { return bicache::size_bytes(dtype_); }
  int64_t layer_bytes() const { return rows_ * 2 * kv_width_ * width(); }

  void narrow(const float* from, int64_t count, std::byte* to) const {
    if (dtype_ == DType::f32) {
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    auto* half = reinterpret_cast<bf16*>(to);
    for (int64_t i = 0; i < count; ++i) half[i] = to_bf16(from[i]);
  }
  void widen(const std::byte* from, int64_t count, float* to) const {
    if (dtype_ == DType::f32) {
      std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    const auto* half = reinterpret_cast<const bf16*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(half[i]);
  }

  int64_t rows_, kv_width_, dim_;
  int kv_layers_;
  DType dtype_;
  Buffer<std::byte> kv_;                // [kv_layers, p, 2, G, D]
  std::map<int, Buffer<std::byte>> h_;  // layer -> [p, E]
};

}  // namespace bicache
