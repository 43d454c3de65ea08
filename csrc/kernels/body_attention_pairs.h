// Blocked attention with online softmax over pairs of bfloat16, for files with AVX-512 BF16. See
// kernels_body.h.

namespace {

constexpr int64_t kStepWords = 16, kStepInputs = 2 * kStepWords;

// The first n of 32 bfloat16 numbers, and zeros.
inline __m512i load_halves(const uint16_t* p, int64_t n) {
  if (n >= kStepInputs) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}

// Up to 16 keys: columns of [words, kPanel].
template <int64_t kPanel>
void pack_key_pairs(const void* const* k, int64_t offset, int64_t n, int64_t head_dim,
                    uint32_t* panel) {
  for (int64_t d = 0; d < head_dim; d += kStepInputs) {
    Floats rows[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      rows[j] =
          j < n ? (Floats)load_halves(static_cast<const uint16_t*>(k[j]) + offset + d, head_dim - d)
                : Floats{};
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      _mm512_storeu_si512(panel + (d / 2 + i) * kPanel, (__m512i)rows[i]);
  }
}

// n values, whole steps of them: kStepWords rows of words of every panel.
template <int64_t kPanel>
void pack_value_pairs(const void* const* v, int64_t offset, int64_t n, int64_t head_dim,
                      int64_t room, uint32_t* panel) {
  const auto row = [&](int64_t j, int64_t d) {
    const __m512i x =
        j < n ? load_halves(static_cast<const uint16_t*>(v[j]) + offset + d, head_dim - d)
              : _mm512_setzero_si512();
    return __builtin_shufflevector(x, x, 0, 4, 1, 5, 2, 6, 3, 7);
  };
  for (int64_t d = 0; d < head_dim; d += kStepInputs) {
    const auto at = [&](int64_t column) {
      return panel + column / kPanel * kPanel * (room / 2) + column % kPanel;
    };
    uint32_t *first = at(d), *second = at(d + kLanes);
    for (int64_t w = 0; w < kStepWords; ++w) {
      const __m512i low = row(2 * w, d), high = row(2 * w + 1, d);
      _mm512_storeu_si512(first + w * kPanel, _mm512_unpacklo_epi16(low, high));
      _mm512_storeu_si512(second + w * kPanel, _mm512_unpackhi_epi16(low, high));
    }
  }
}

// Attention::pack, with panels of kPanel columns; whole steps of words.
template <int64_t kPanel>
void pack_pairs(const void* const* k, const void* const* v, int64_t offset, int64_t n, int64_t room,
                int64_t head_dim, void* keys, void* values) {
  const int64_t words = (head_dim + kStepInputs - 1) / kStepInputs * kStepWords;
  for (int64_t j = 0; j < n; j += kStepInputs) {
    prefetch_rows<uint16_t>(k + j + kStepInputs, offset, n - j - kStepInputs, head_dim);
    for (int64_t i = j; i < j + kStepInputs; i += kLanes) {
      auto* panel = static_cast<uint32_t*>(keys) + i / kPanel * kPanel * words + i % kPanel;
      pack_key_pairs<kPanel>(k + i, offset, n - i, head_dim, panel);
    }
    prefetch_rows<uint16_t>(v + j + kStepInputs, offset, n - j - kStepInputs, head_dim);
    pack_value_pairs<kPanel>(v + j, offset, n - j, head_dim, room,
                             static_cast<uint32_t*>(values) + j / 2 * kPanel);
  }
}

// coarse_exp2, with the instructions for it.
inline Floats fast_exp2(Floats x) {
  constexpr __mmask16 kAll = 0xffff;  // (GCC 12 warns of its own unmasked forms.)
  constexpr int kToFloor = 1;
  const auto r = (Floats)_mm512_maskz_reduce_ps(kAll, (__m512)x, kToFloor);
  return (Floats)_mm512_maskz_scalef_ps(kAll, (__m512)exp2_of_rest(r), (__m512)x);
}

}  // namespace
