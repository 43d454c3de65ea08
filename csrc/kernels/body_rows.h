// Element-wise kernels and those of one row. See kernels_body.h.

namespace {

Floats load(const bf16* p, int64_t left) {
  if (left >= kLanes) return widen(p);
  bf16 lanes[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) lanes[i] = p[i];
  return widen(lanes);
}

template <class T>
float dot(const T* a, const T* b, int64_t n) {
  constexpr int kSums = 4;
  Floats sum[kSums] = {};
  for (int64_t first = 0; first < n; first += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const int64_t i = first + s * kLanes;
      if (i < n) sum[s] = fma(load(a + i, n - i), load(b + i, n - i), sum[s]);
    }
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const double mean = static_cast<double>(dot(x, x, n)) / static_cast<double>(n);
  const float scale = static_cast<float>(1 / __builtin_sqrt(mean + static_cast<double>(eps)));
  for (int64_t i = 0; i < n; i += kLanes) {
    store(y + i, load(x + i, n - i) * scale * load(weight + i, n - i), n - i);
  }
}

void rope(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const Floats a = load(x + i, left), b = load(x + half + i, left);
    const Floats c = load(cos + i, left), s = load(sin + i, left);
    store(x + i, fma(a, c, -(b * s)), left);
    store(x + half + i, fma(b, c, a * s), left);
  }
}

void silu_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats x = load(gate + i, n - i);
    store(gate + i, x / (splat(1.0f) + exp(-x)) * load(up + i, n - i), n - i);
  }
}

void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(x + i, load(x + i, n - i) + load(y + i, n - i), n - i);
}

void divide(const float* x, float divisor, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(x + i, n - i) / divisor, n - i);
}

// The upper halves of x, rounded to nearest, ties to even, in the upper bits; NaN stays NaN.
Words round_half(Floats x) {
  const Words bits = (Words)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? rounded : bits | 0x400000) & 0xffff0000;
}

void round_to_floats(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(y + i, (Floats)round_half(load(x + i, n - i)), n - i);
}

// The low kBytes bytes of every lane.
template <class Lane>
void store_narrow(Lane* p, Words v, int64_t left) {
  typedef Lane Lanes __attribute__((vector_size(kLanes * sizeof(Lane))));
  const Lanes lanes = __builtin_convertvector(v, Lanes);
  __builtin_memcpy(p, &lanes,
                   left >= kLanes ? sizeof lanes : static_cast<size_t>(left) * sizeof(Lane));
}

void round_to_halves(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_narrow(y + i, round_half(load(x + i, n - i)) >> 16, n - i);
}

// The largest magnitude; NaN if there is a NaN or an infinity.
float magnitude(const float* x, int64_t n) {
  Floats high = {}, poison = {};  // x - x is 0, or NaN
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = load(x + i, n - i);
    high = larger((Floats)((Words)v & 0x7fffffff), high);
    poison += v - v;
  }
  return max_lanes(high) + sum_lanes(poison);
}

template <class Lane>
float quantize(const float* x, int64_t n, int32_t offset, Lane* q) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const float largest = magnitude(x, n);
  const float inverse = largest > 0 ? 127 / largest : 0;  // of a tiny one: infinite
  const bool usable = largest > 0 && inverse < kInfinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats scaled = usable ? load(x + i, n - i) * inverse : Floats{};
    const Words whole = (Words)(scaled + splat(kRound)) - (Words)splat(kRound);
    store_narrow(q + i, whole + static_cast<uint32_t>(offset), n - i);
  }
  return usable || !(largest >= 0) ? largest / 127 : 0;
}

float quantize_s16(const float* x, int64_t n, int16_t* q) { return quantize(x, n, 0, q); }
float quantize_u8(const float* x, int64_t n, uint8_t* q) { return quantize(x, n, 128, q); }

void dequantize(const int32_t* sum, const int32_t* correction, const float* scale, float row_scale,
                int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Ints whole = load_sums<Ints>(sum + i, left) - load_sums<Ints>(correction + i, left);
    store(y + i, __builtin_convertvector(whole, Floats) * (row_scale * load(scale + i, left)),
          left);
  }
}

// Where the first NaN of x is, if any is expected.
int64_t first_nan(const float* x, int64_t n) {
  int64_t i = 0;
  while (i < n - 1 && x[i] == x[i]) ++i;
  return i;
}

double sum_exp(const float* x, float max, int64_t n) {
  HalfDoubles low = {}, high = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats e = exp(load(x + i, n - i, -kInfinity) - max);
    low += low_doubles(e);
    high += high_doubles(e);
  }
  low += high;
  double sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += low[i];
  return sum;
}

RowStats row_stats(const float* x, int64_t n) {
  Floats best = splat(-kInfinity);
  Ints best_vector = {}, nan = {}, vector = {};
  for (int64_t i = 0; i < n; i += kLanes, vector += 1) {
    const Floats v = load(x + i, n - i, -kInfinity);
    nan |= v != v;
    best_vector = v > best ? vector : best_vector;
    best = larger(v, best);
  }
  RowStats stats = {0, -kInfinity, 0};
  for (int i = 0; i < kLanes; ++i) {
    if (nan[i] != 0) return {first_nan(x, n), __builtin_nanf(""), __builtin_nan("")};
    const int64_t index = int64_t{best_vector[i]} * kLanes + i;
    if (best[i] > stats.max || (best[i] == stats.max && index < stats.argmax))
      stats = {index, best[i], 0};
  }
  stats.sum_exp = sum_exp(x, stats.max, n);
  return stats;
}

}  // namespace
