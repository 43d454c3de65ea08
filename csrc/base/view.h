// A matrix somebody else owns. Memory layout of the whole library, stated once: row-major, the last
// axis contiguous; a view's rows may lie further apart than its columns are many (`stride`, in
// elements).
//
// Letters in shape comments: B requests, N rows (positions) of one request, R rows computed now, L
// layers, H query heads, G KV heads, D head dim, E model dim, F FFN dim, V vocabulary, p
// shared-prefix rows, u own-prompt rows, g response rows.
#pragma once

#include <cstdint>

namespace bicache {

template <class T>
struct View {
  T* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  View() = default;
  View(T* data, int64_t rows, int64_t cols) : View(data, rows, cols, cols) {}
  View(T* data, int64_t rows, int64_t cols, int64_t stride)
      : data(data), rows(rows), cols(cols), stride(stride) {}
  template <class U>  // View<float> -> View<const float>
  View(const View<U>& o) : View(o.data, o.rows, o.cols, o.stride) {}

  T* row(int64_t i) const { return data + i * stride; }
  View slice(int64_t begin, int64_t end) const { return {row(begin), end - begin, cols, stride}; }
};

}  // namespace bicache
