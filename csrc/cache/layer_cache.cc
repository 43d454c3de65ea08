#include "cache/layer_cache.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace bicache {

void LayerCache::Store::init(const std::vector<Kept::Part>& parts, int layers, int64_t rows,
                             int64_t row_bytes) {
  slot_of.assign(static_cast<size_t>(rows), -1);
  first_layer.assign(static_cast<size_t>(rows), 0);
  int64_t total = 0;
  for (const Kept::Part& part : parts) {
    const int64_t count = part.rows.size(), kept = std::max(0, layers - part.first_layer);
    int64_t i = 0;
    part.rows.for_each([&](int64_t row) {
      internal_check(slot_of[row] < 0, "[cache] row ", row, " is kept twice");
      slot_of[row] = static_cast<int64_t>(base.size());
      first_layer[row] = part.first_layer;
      base.push_back(total + i++ * row_bytes);
      step.push_back(count * row_bytes);
    });
    total = checked_add(total, checked_mul(checked_mul(count, kept, "cache"), row_bytes, "cache"),
                        "cache");
  }
  data = Buffer<std::byte>(total);
}

std::byte* LayerCache::Store::find(int layer, int64_t row) {
  const int64_t slot = slot_of[row];
  if (slot < 0 || layer < first_layer[row]) return nullptr;
  return data.data() + base[slot] + (layer - first_layer[row]) * step[slot];
}

LayerCache::LayerCache(int layers, int64_t rows, int64_t kv_width, int64_t dim, const Kept& kept,
                       DType kv_dtype)
    : layers_(layers), rows_(rows), kv_width_(kv_width), kv_dtype_(kv_dtype) {
  kv_.init(kept.kv, layers, rows, 2 * kv_bytes());
  delta_.init(kept.delta, layers, rows, dim * static_cast<int64_t>(sizeof(float)));
  value_.init(kept.value, layers, rows, kv_bytes());
  // What is read before it was written shows up as NaN logits, which the sampler refuses: all bits
  // set are a NaN of either type.
  for (Store* store : {&delta_, &value_})
    std::fill_n(store->data.data(), store->data.size(), std::byte{0xff});
  scratch_ = Buffer<std::byte>(checked_mul(rows, 2 * kv_bytes(), "cache"));
  own_.assign(static_cast<size_t>(checked_mul(layers, rows, "cache")), 0);
}

int64_t LayerCache::size_bytes() const {
  return kv_.data.size_bytes() + delta_.data.size_bytes() + value_.data.size_bytes() +
         scratch_.size_bytes() + static_cast<int64_t>(own_.size());
}

int64_t LayerCache::size_bytes(int layers, int64_t rows, int64_t kv_width, int64_t dim,
                               const Kept& kept, DType kv_dtype) {
  const int64_t kv_bytes = kv_width * bicache::size_bytes(kv_dtype);
  int64_t bytes = rows * 2 * kv_bytes + layers * rows;
  const auto add = [&](const std::vector<Kept::Part>& parts, int64_t row_bytes) {
    for (const Kept::Part& part : parts)
      bytes += part.rows.size() * std::max(0, layers - part.first_layer) * row_bytes;
  };
  add(kept.kv, 2 * kv_bytes);
  add(kept.delta, dim * static_cast<int64_t>(sizeof(float)));
  add(kept.value, kv_bytes);
  return bytes;
}

std::byte* LayerCache::slot(int layer, int64_t row) {
  std::byte* kept = kv_.find(layer, row);
  return kept != nullptr ? kept : scratch_.data() + row * 2 * kv_bytes();
}

void LayerCache::recomputed(int layer, int64_t row) {
  if (void* copy = recomputed_v(layer, row))
    std::memcpy(copy, v(layer, row), static_cast<size_t>(kv_bytes()));
}

void LayerCache::begin_layer(int layer) {
  for (int64_t row = 0; row < rows_; ++row) {
    if (kv_.find(layer, row) == nullptr) own_[static_cast<size_t>(layer * rows_ + row)] = 0;
  }
}

void LayerCache::forget_prefix(int64_t p) {
  for (int layer = 0; layer < layers_; ++layer) {
    const auto begin = own_.begin() + layer * rows_;
    std::fill(begin, begin + p, 0);
  }
}

bool LayerCache::borrows(int layer, int64_t p) const {
  const auto begin = own_.begin() + layer * rows_;
  return std::find(begin, begin + p, 0) != begin + p;
}

void LayerCache::key_rows(int layer, const void* lent, int64_t lent_rows, const void** k,
                          const void** v) {
  for (int64_t row = 0; row < rows_; ++row) {
    const std::byte* at;
    if (own(layer, row)) {
      at = slot(layer, row);
    } else {
      require(lent != nullptr && row < lent_rows, "[cache] layer ", layer, " row ", row,
              ": expected K/V written by this request or held by its prefix entry, got neither");
      at = static_cast<const std::byte*>(lent) + row * 2 * kv_bytes();
    }
    k[row] = at;
    v[row] = at + kv_bytes();
  }
}

}  // namespace bicache
