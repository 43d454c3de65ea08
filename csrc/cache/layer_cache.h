// LayerCache: the K, V and deltas one request keeps from pass to pass, and the scratch of those it
// does not.
#pragma once

#include <cstddef>
#include <vector>

#include "base/buffer.h"
#include "base/dtype.h"
#include "cache/rows.h"

namespace bicache {

// What must outlive a pass; constant per request, declared by its policy. Writes are unconditional,
// so this is a question of storage only: rows named here keep what they write in layers >=
// first_layer, all others only within the layer.
struct Kept {
  struct Part {
    RowSet rows;
    int first_layer = 0;
  };
  std::vector<Part> kv;          // disjoint rows
  std::vector<Part> delta = {};  // disjoint rows
  std::vector<Part> value = {};  // V as of a row's last recomputation; disjoint rows

  static Kept everything(int64_t rows) {
    const Part all{RowSet::span(0, rows), 0};
    return {{all}, {all}, {all}};
  }
};

class LayerCache {
 public:
  LayerCache() = default;
  // For `rows` rows (N), kv_width = G * D, dim = E. `kv_dtype`: of K and V, f32 or bf16; deltas are
  // float32.
  LayerCache(int layers, int64_t rows, int64_t kv_width, int64_t dim, const Kept& kept,
             DType kv_dtype);

  int64_t rows() const { return rows_; }
  DType kv_dtype() const { return kv_dtype_; }
  int64_t size_bytes() const;
  // Of a cache that was not made.
  static int64_t size_bytes(int layers, int64_t rows, int64_t kv_width, int64_t dim,
                            const Kept& kept, DType kv_dtype);

  // Call once per layer and pass, before anything is written: forgets the rows of this layer that
  // are not kept.
  void begin_layer(int layer);
  // Forgets the request's own K/V of rows [0, p) in every layer.
  void forget_prefix(int64_t p);

  // Where row `row` keeps its K and V [G, D] of this layer, of kv_dtype; `wrote` marks them as this
  // request's own.
  void* k(int layer, int64_t row) { return slot(layer, row); }
  void* v(int layer, int64_t row) { return slot(layer, row) + kv_bytes(); }
  void wrote(int layer, int64_t row) { own_[static_cast<size_t>(layer * rows_ + row)] = 1; }
  bool own(int layer, int64_t row) const {
    return own_[static_cast<size_t>(layer * rows_ + row)] != 0;
  }

  // Where row `row` keeps its delta [E] of this layer; null where the policy does not keep it.
  float* delta(int layer, int64_t row) { return reinterpret_cast<float*>(delta_.find(layer, row)); }
  // Where row `row` keeps the V [G, D] of its last recomputation, of kv_dtype; null where the
  // policy does not keep it. `recomputed` copies the row's V there.
  void* recomputed_v(int layer, int64_t row) { return value_.find(layer, row); }
  void recomputed(int layer, int64_t row);

  // Whether some of rows [0, p) lend the prefix entry's K/V in this layer.
  bool borrows(int layer, int64_t p) const;
  // Pointers to K and V [G, D] of all N rows: the request's own where it wrote them, otherwise the
  // prefix entry's, `lent` [lent_rows, 2, G, D] of kv_dtype.
  void key_rows(int layer, const void* lent, int64_t lent_rows, const void** k, const void** v);

 private:
  struct Store {
    std::vector<int64_t> slot_of;  // row -> slot, -1: not kept
    std::vector<int> first_layer;  // row -> first layer that is kept
    std::vector<int64_t> base;     // slot -> offset of its first layer, in bytes
    std::vector<int64_t> step;     // slot -> bytes from one layer to the next
    Buffer<std::byte> data;
    void init(const std::vector<Kept::Part>& parts, int layers, int64_t rows, int64_t row_bytes);
    std::byte* find(int layer, int64_t row);
  };
  int64_t kv_bytes() const { return kv_width_ * bicache::size_bytes(kv_dtype_); }  // of K or V
  std::byte* slot(int layer, int64_t row);  // K then V, [2, G, D]

  int layers_ = 0;
  int64_t rows_ = 0, kv_width_ = 0;
  DType kv_dtype_ = DType::f32;
  Store kv_, delta_, value_;
  Buffer<std::byte> scratch_;  // [N, 2, G, D]: rows not kept, of the layer that runs
  std::vector<uint8_t> own_;   // [L, N]
};

}  // namespace bicache
