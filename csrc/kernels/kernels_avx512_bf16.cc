// avx512, and bfloat16 dot products of 2 inputs a lane (subnormal numbers count as 0).
#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx512_bf16 {
namespace {

#include "kernels/lanes_avx512.h"

}  // namespace

#include "kernels/body_vector.h"
//
#include "kernels/body_gemm.h"
//
#include "kernels/body_softmax.h"
//
#include "kernels/body_attention_pairs.h"

namespace {

struct DotBf16 {
  using Scalar = float;
  using Sums = Floats;
  using Weight = bf16;
  static constexpr int kInputs = 2;
  static __m512i word(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  static Sums dot(__m512i x, __m512i w, Sums sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

Floats load_scores(const float* p, int64_t left) {
  if (left >= kLanes) return load(p);
  const __mmask16 mask = static_cast<__mmask16>(left > 0 ? (1u << left) - 1 : 0);
  return (Floats)_mm512_mask_loadu_ps((__m512)splat(-kInfinity), mask, p);
}

// Scores become weights in bfloat16, in their place and zero-padded; what was summed before is
// rescaled to the new largest score.
void softmax_pairs(float* scores, int64_t n, float step, Softmax& state, float* out,
                   int64_t head_dim) {
  Floats high[2] = {splat(-kInfinity), splat(-kInfinity)};
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    high[0] = larger(load_scores(scores + j, n - j), high[0]);
    high[1] = larger(load_scores(scores + j + kLanes, n - j - kLanes), high[1]);
  }
  rescale(max_lanes(larger(high[0], high[1])), state, out, head_dim,
          [=](Floats x) { return fast_exp2(x * step); });
  const Floats minus = splat(-(base_of(state) * step)), factor = splat(step);
  const auto weight = [&](int64_t j) {
    return (__m512)fast_exp2(fma(load_scores(scores + j, n - j), factor, minus));
  };
  Floats sum[2] = {};
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    const __m512 first = weight(j);
    const auto pairs = (Words)_mm512_cvtne2ps_pbh(weight(j + kLanes), first);
    sum[0] += (Floats)(pairs << 16);
    sum[1] += (Floats)(pairs & 0xffff0000);
    __builtin_memcpy(reinterpret_cast<uint16_t*>(scores) + j, &pairs, sizeof pairs);
  }
  state.sum += sum_lanes(sum[0] + sum[1]);
}

// Attention::attend.
void attend(const AttentionBlock& b) {
  constexpr int64_t kRows = 48;  // whose scores stay in L1
  const int64_t dim = b.head_dim, width = (dim + kPanel - 1) / kPanel * kPanel;
  const auto *keys = static_cast<const uint32_t*>(b.keys),
             *values = static_cast<const uint32_t*>(b.values);
  const auto* weights = reinterpret_cast<const int32_t*>(b.scratch);
  static_assert(kKeyBlock == kPanel);
  for (int64_t r = 0; r < b.rows; r += kRows) {
    const int64_t rows = b.rows - r < kRows ? b.rows - r : kRows;
    float* out = b.out + r * width;
    for (int64_t first = 0; first < b.n; first += kKeyBlock) {
      const int64_t n = b.n - first < kKeyBlock ? b.n - first : kKeyBlock;
      product<DotBf16>({b.q + r * b.words, b.words, keys + first * b.words, b.words, b.scratch,
                        kKeyBlock, rows, n, false});
      for (int64_t i = 0; i < rows; ++i) {
        softmax_pairs(b.scratch + i * kKeyBlock, n, b.scale * kLog2e, b.state[r + i],
                      out + i * width, dim);
      }
      for (int64_t d = 0; d < dim; d += kPanel) {
        const int64_t cols = dim - d < kPanel ? dim - d : kPanel;
        product<DotBf16>({weights, kKeyBlock, values + d * (b.room / 2) + first / 2 * kPanel,
                          (n + 1) / 2, out + d, width, rows, cols, true});
      }
    }
  }
}

}  // namespace

extern const Product kBf16;
const Product kBf16 = {Form::bf16_pairs, product<DotBf16>};

extern const Attention kAttention;
const Attention kAttention = {.form = Form::bf16_pairs,
                              .word_step = kStepWords,
                              .pack = pack_pairs<kPanel>,
                              .attend = attend};

}  // namespace bicache::avx512_bf16
