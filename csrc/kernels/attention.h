// Bidirectional softmax attention of some rows of each request over all of its keys.
#pragma once

#include <span>

#include "kernels/kernels.h"
#include "kernels/work.h"

namespace bicache {

// One request's queries. Keys are given row by row, because a row's K/V live wherever they were
// last written: in the request's own cache or in a shared prefix entry, which is read in place.
struct AttentionJob {
  const float* q = nullptr;        // [R, H, D] after RoPE
  float* out = nullptr;            // [R, H, D]
  int64_t rows = 0;                // R
  const void* const* k = nullptr;  // [N] pointers to [G, D], after RoPE, by absolute position
  const void* const* v = nullptr;  // [N] pointers to [G, D]
  int64_t keys = 0;                // N
  Work* work = nullptr;            // charged for Op::attention; may be null
};

// out = softmax(q k^T / sqrt(D)) v for every job; query head h reads KV head h * G / H. K and V are
// `kv`: f32, or bf16; then q and the weights exp(score - largest score so far) are rounded to
// bfloat16 before they are multiplied. All sums are float32, that of the weights too (rounded). A
// job with rows needs keys, and its `out` apart from its `q`; one without rows costs nothing.
void attention(const Kernels& kernels, std::span<const AttentionJob> jobs, int64_t heads,
               int64_t kv_heads, int64_t head_dim, DType kv, int threads);

}  // namespace bicache
