// What all attention kernels of an instruction set share. See kernels_body.h.

namespace {

// The lower, or the upper halves of a and b, lane by lane in turn.
template <class V>
V interleave_low(V a, V b) {
  if constexpr (sizeof(V) == 16) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  if constexpr (sizeof(V) == 32) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  if constexpr (sizeof(V) == 64) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
}

template <class V>
V interleave_high(V a, V b) {
  if constexpr (sizeof(V) == 16) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  if constexpr (sizeof(V) == 32) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (sizeof(V) == 64) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  }
}

// Rows become columns, kLanes of each.
inline void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Into L2: the first 32 of n rows, from column `offset` on.
template <class Element>
void prefetch_rows(const void* const* rows, int64_t offset, int64_t n, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t j = 0; j < n && j < 32; ++j) {
    for (int64_t d = 0; d < head_dim; d += kLine)
      __builtin_prefetch(static_cast<const Element*>(rows[j]) + offset + d, 0, 2);
  }
}

constexpr float kLog2e = 0x1.715476p+0f;

// 2^x to a relative 2^-18 for x <= 0, for weights that are rounded to bfloat16: 2^n p(x - n) with n
// the whole number below. 0 below 2^-126.
constexpr float kExp2[] = {1, 0x1.62d6c6p-1f, 0x1.ee2450p-3f, 0x1.abf86ap-5f, 0x1.b7f72ep-7f};

inline Floats exp2_of_rest(Floats r) {
  Floats y = splat(kExp2[4]);
  for (int i = 3; i >= 0; --i) y = fma(y, r, splat(kExp2[i]));
  return y;
}

inline Floats coarse_exp2(Floats x) {
  constexpr float kRound = 0x1.8p23f + 127;  // adding it rounds; the low bits become an exponent
  const Floats low = splat(-127.0f);
  x = low > x ? low : x;  // NaN passes
  const Floats shifted = x - splat(0x1.fffffep-2f) + splat(kRound);
  return exp2_of_rest(x - (shifted - splat(kRound))) * (Floats)((Words)shifted << 23);
}

// A row's sums move to a new largest score; `decay` is the exponential of differences.
template <class Decay>
void rescale(float block_max, Softmax& state, float* out, int64_t head_dim, Decay&& decay) {
  if (!(block_max > state.max)) return;
  const float factor = decay(splat(state.max - block_max))[0];
  state.max = block_max;
  state.sum *= factor;
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(out + d) * factor);
}

// What scores are compared with: all may be -infinity so far, and weigh nothing then.
inline float base_of(const Softmax& state) { return state.max == -kInfinity ? 0 : state.max; }

}  // namespace
