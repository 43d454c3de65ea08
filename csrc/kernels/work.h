// Work, counted where it is done: gemm() and attention() add what the shapes they execute cost.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace bicache {

// The matrix products of a forward pass, in order.
enum class Op : uint8_t { q, k, v, attention, attention_out, router, gate, up, down, head, kCount };

// What one request cost in one layer (Op::head: in a slot of its own after the last layer).
struct Work {
  std::array<int64_t, static_cast<size_t>(Op::kCount)> rows = {};  // rows each product ran over
  int64_t flops = 0;                                               // 2 per multiply-add
  int64_t bytes = 0;  // weights (split over a batch by rows); in attention K and V, read once

  int64_t& rows_of(Op op) { return rows[static_cast<size_t>(op)]; }
  int64_t rows_of(Op op) const { return rows[static_cast<size_t>(op)]; }
  Work& operator+=(const Work& o) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] += o.rows[i];
    flops += o.flops;
    bytes += o.bytes;
    return *this;
  }
};

// sum += some, slot by slot; `sum` may be shorter.
inline void add(std::vector<Work>& sum, const std::vector<Work>& some) {
  sum.resize(std::max(sum.size(), some.size()));
  for (size_t i = 0; i < some.size(); ++i) sum[i] += some[i];
}

// Consecutive rows of one product that belong to one request.
struct Share {
  Work* work = nullptr;  // may be null
  int64_t rows = 0;
};

}  // namespace bicache
