// The kernel table: one set of function pointers per instruction set, the same source
// (kernels_body.h) compiled once per ISA. Chosen once from CPUID, forced with
// BICACHE_ISA=generic|avx2|avx512.
//
// Row-stable: within one ISA, the bits of an output row depend on that row's inputs alone, never on
// how many rows are computed together, on which thread, or on where in a tile the row falls. Sums
// run in a fixed order: products over k ascending, one multiply-add each (fused where the ISA has
// it); attention over key blocks of kKeyBlock aligned to absolute positions. Kernels never throw,
// and read and write nothing but what their shapes say.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace bicache {

constexpr int64_t kKeyBlock = 64;       // keys per block of the online softmax
constexpr int64_t kAttentionRows = 48;  // most query rows of one call of Kernels::attention
constexpr int64_t kMaxPanel = 64;       // no table's panel is wider

// The largest of n logits (ties: the lowest index), and sum(exp(x - max)). NaN anywhere: `argmax`
// is the first NaN, `max` and `sum_exp` are NaN. An infinite `max` makes `sum_exp` NaN.
struct RowStats {
  int64_t argmax = 0;
  float max = 0;
  double sum_exp = 0;
};

struct Kernels {
  const char* isa;
  int64_t panel;  // output columns of one packed panel: [inputs, panel], zero-padded

  // c[r, j] (+)= sum_k a[r, k] * panel[k, j], r < rows, j < cols <= panel; accumulate: starts from
  // c, so a sum cut into pieces has the bits of the whole.
  void (*gemm_f32)(const float* a, int64_t a_stride, const float* panel, int64_t inputs, float* c,
                   int64_t c_stride, int64_t rows, int64_t cols, bool accumulate);
  void (*gemm_bf16)(const float* a, int64_t a_stride, const bf16* panel, int64_t inputs, float* c,
                    int64_t c_stride, int64_t rows, int64_t cols, bool accumulate);

  // y = weight * x / sqrt(mean(x^2) + eps); [n]. y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // Rotates the halves of one head in place: (a, b) -> (a cos - b sin, b cos + a sin); cos, sin
  // [head_dim / 2].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t head_dim);
  // gate = silu(gate) * up; [n].
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // x += y; [n].
  void (*add)(float* x, const float* y, int64_t n);
  // Dot product of two vectors; [n].
  float (*dot)(const float* a, const float* b, int64_t n);
  // Softmax attention of `rows` <= kAttentionRows query rows of one head over all `keys` >= 1 rows
  // of its KV head, scores scaled by `scale`.
  //   q, out: row r at + r * stride; [D] each, and apart: out is written before all of q is read.
  //   k[j] + offset, v[j] + offset: [D] of key row j (absolute position j).
  //   scratch: at least attention_scratch(D) floats.
  void (*attention)(const float* q, int64_t q_stride, const float* const* k, const float* const* v,
                    int64_t offset, int64_t keys, int64_t head_dim, float scale, float* out,
                    int64_t out_stride, int64_t rows, float* scratch);
  RowStats (*row_stats)(const float* x, int64_t n);
};

// Floats of scratch that Kernels::attention wants.
int64_t attention_scratch(int64_t head_dim);

// Every table this build has and this CPU can run, slowest first (generic is always there).
std::vector<const Kernels*> available_kernels();

// The table `forced` names (nullptr or "": the last of available_kernels()). std::invalid_argument
// lists what there is when the build or the CPU lacks it.
const Kernels& choose_kernels(const char* forced);

// The table in use: choose_kernels(BICACHE_ISA), decided at the first call.
const Kernels& kernels();

// Whether `isa` (one of generic, avx2, avx512) runs on this CPU, be it in this build or not.
bool cpu_has(const char* isa);

}  // namespace bicache
