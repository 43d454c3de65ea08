// Vectors of kLanes floats, and exp. See kernels_body.h.

namespace {

typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

constexpr float kInfinity = __builtin_inff();

inline Floats splat(float x) { return x - Floats{}; }  // x + 0 would lose the sign of -0

inline Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// As many lanes as are left; the others are `fill`, and take part in the same arithmetic: an
// element's bits do not depend on where in a vector it stands.
inline Floats load(const float* p, int64_t left, float fill = 0) {
  if (left >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < left; ++i) lanes[i] = p[i];
  return load(lanes);
}

inline void store(float* p, Floats v, int64_t left) {
  if (left >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < left; ++i) p[i] = lanes[i];
}

template <class V>
auto low_half(V v) {
  if constexpr (sizeof(V) == 64) return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (sizeof(V) == 32) return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}

template <class V>
auto high_half(V v) {
  if constexpr (sizeof(V) == 64) return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (sizeof(V) == 32) return __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

template <class V>
float sum_lanes(V v) {
  if constexpr (sizeof(V) > 16) return sum_lanes(low_half(v) + high_half(v));
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// Of halves and quarters, too.
template <class V>
V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
float max_lanes(V v) {
  if constexpr (sizeof(V) > 16) return max_lanes(larger(high_half(v), low_half(v)));
  const float even = v[2] > v[0] ? v[2] : v[0], odd = v[3] > v[1] ? v[3] : v[1];
  return odd > even ? odd : even;
}

// y * 2^n of whole n from -150 to 129, rounded once. In two steps: 2^128 and 2^-149 are no normal
// floats.
template <class V>
V times_power_of_two(V y, V n) {
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  return y * (V)((half + 127) << 23) * (V)((whole - half + 127) << 23);
}

// e^x to 1 ulp or so over all floats, subnormal results included: 2^n e^r with |r| <= ln(2) / 2,
// where e^r = 1 + r + r^2 q(r), q fitted for the least relative error. exp(0) is exactly 1.
inline Floats exp(Floats x) {
  constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  x = smaller(splat(89.0f), larger(splat(-104.0f), x));  // NaN passes both
  const Floats shifted = fma(x, splat(kLog2e), splat(kRound));
  const Floats n = shifted - splat(kRound);
  Floats r = fma(n, splat(-kLn2High), x);  // exact: kLn2High has trailing zeros
  r = fma(n, splat(-kLn2Low), r);
  Floats q = splat(0x1.6db4e4p-10f);
  q = fma(q, r, splat(0x1.123be0p-7f));
  q = fma(q, r, splat(0x1.55545ep-5f));
  q = fma(q, r, splat(0x1.55548ep-3f));
  q = fma(q, r, splat(0x1p-1f));
  const Floats y = fma(r * r, q, r) + splat(1.0f);
  return times_power_of_two(y, n);
}

}  // namespace
