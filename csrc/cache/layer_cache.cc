#include "cache/layer_cache.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace bicache {

void LayerCache::Store::init(const std::vector<Kept::Part>& parts, int layers, int64_t rows,
                             int64_t width) {
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
      base.push_back(total + i++ * width);
      step.push_back(count * width);
    });
    total =
        checked_add(total, checked_mul(checked_mul(count, kept, "cache"), width, "cache"), "cache");
  }
  data = Buffer<float>(total);
}

float* LayerCache::Store::find(int layer, int64_t row) {
  const int64_t slot = slot_of[row];
  if (slot < 0 || layer < first_layer[row]) return nullptr;
  return data.data() + base[slot] + (layer - first_layer[row]) * step[slot];
}

LayerCache::LayerCache(int layers, int64_t rows, int64_t kv_width, int64_t dim, const Kept& kept)
    : layers_(layers), rows_(rows), kv_width_(kv_width) {
  kv_.init(kept.kv, layers, rows, 2 * kv_width);
  delta_.init(kept.delta, layers, rows, dim);
  value_.init(kept.value, layers, rows, kv_width);
  // What is read before it was written shows up as NaN logits, which the sampler refuses.
  for (Store* store : {&delta_, &value_})
    std::fill_n(store->data.data(), store->data.size(), std::numeric_limits<float>::quiet_NaN());
  scratch_ = Buffer<float>(checked_mul(rows, 2 * kv_width, "cache"));
  own_.assign(static_cast<size_t>(checked_mul(layers, rows, "cache")), 0);
}

int64_t LayerCache::size_bytes() const {
  return kv_.data.size_bytes() + delta_.data.size_bytes() + value_.data.size_bytes() +
         scratch_.size_bytes() + static_cast<int64_t>(own_.size());
}

int64_t LayerCache::size_bytes(int layers, int64_t rows, int64_t kv_width, int64_t dim,
                               const Kept& kept) {
  int64_t floats = rows * 2 * kv_width;
  const auto add = [&](const std::vector<Kept::Part>& parts, int64_t width) {
    for (const Kept::Part& part : parts)
      floats += part.rows.size() * std::max(0, layers - part.first_layer) * width;
  };
  add(kept.kv, 2 * kv_width);
  add(kept.delta, dim);
  add(kept.value, kv_width);
  return floats * static_cast<int64_t>(sizeof(float)) + layers * rows;
}

float* LayerCache::slot(int layer, int64_t row) {
  float* kept = kv_.find(layer, row);
  return kept != nullptr ? kept : scratch_.data() + row * 2 * kv_width_;
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

void LayerCache::key_rows(int layer, const float* lent, int64_t lent_rows, const float** k,
                          const float** v) {
  for (int64_t row = 0; row < rows_; ++row) {
    if (own(layer, row)) {
      k[row] = slot(layer, row);
    } else {
      require(lent != nullptr && row < lent_rows, "[cache] layer ", layer, " row ", row,
              ": expected K/V written by this request or held by its prefix entry, got neither");
      k[row] = lent + row * 2 * kv_width_;
    }
    v[row] = k[row] + kv_width_;
  }
}

}  // namespace bicache
