// The kernels, written once. kernels_<isa>.cc includes this inside its namespace, after defining
// kIsa, kLanes, kTileRows, kTileVectors, Floats, Words, fma(a, b, c) and load(const bf16*).
//
// Everything here has internal linkage and uses no std:: template and no inline function of other
// headers: the linker would keep one copy of those, perhaps one that this CPU cannot run. For the
// same reason there is no #pragma once: every instruction set has its own.

namespace {

typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float HalfFloats __attribute__((vector_size(kLanes * 2)));
typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));

constexpr int64_t kPanel = kLanes * kTileVectors;
constexpr float kInfinity = __builtin_inff();
static_assert(kKeyBlock % kPanel == 0 && kPanel <= kMaxPanel);

Floats splat(float x) { return x - Floats{}; }  // x + 0 would lose the sign of -0

Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

// As many lanes as are left; the others are `fill`, and take part in the same arithmetic: an
// element's bits do not depend on where in a vector it stands.
Floats load(const float* p, int64_t left, float fill = 0) {
  if (left >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = fill;
  for (int64_t i = 0; i < left; ++i) lanes[i] = p[i];
  return load(lanes);
}

void store(float* p, Floats v, int64_t left) {
  if (left >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < left; ++i) p[i] = lanes[i];
}

float sum_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// The larger; NaN in a is passed over.
Floats larger(Floats a, Floats b) { return a > b ? a : b; }

float max_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      if (lanes[i + width] > lanes[i]) lanes[i] = lanes[i + width];
    }
  }
  return lanes[0];
}

Floats power_of_two(Words n) { return (Floats)((n + 127) << 23); }

// e^x to 1 ulp or so over all floats, subnormal results included: 2^n e^r with |r| <= ln(2) / 2,
// where e^r = 1 + r + r^2 q(r), q fitted for the least relative error. exp(0) is exactly 1.
Floats exp(Floats x) {
  constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRound = 0x1.8p23f;           // adding it rounds to an integer, in the low bits
  x = x < splat(-104.0f) ? splat(-104.0f) : x;  // NaN passes both
  x = x > splat(89.0f) ? splat(89.0f) : x;
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
  const Words whole = (Words)shifted - (Words)splat(kRound);
  const Words half =
      (Words)((Ints)whole >> 1);  // in two steps: 2^128 and 2^-149 are no normal floats
  return y * power_of_two(half) * power_of_two(whole - half);
}

template <class W>
struct Product {
  const float* a;
  int64_t a_stride;
  const W* panel;  // [inputs, kPanel]
  int64_t inputs;
  float* c;
  int64_t c_stride;
  int64_t rows, cols;
  bool accumulate;
  uintptr_t ahead;       // address to prefetch from, meanwhile
  uintptr_t ahead_step;  // bytes of it per input and tile of rows
};

// The first kRows rows of a product, kVectors vectors wide: each element of c is one chain of fma
// over k ascending.
template <int kRows, int kVectors, class W>
void tile(const Product<W>& p) {
  const float* a = p.a;
  const W* panel = p.panel;
  const int64_t a_stride = p.a_stride, inputs = p.inputs;
  const int64_t left = p.cols - (kVectors - 1) * kLanes;  // columns in the last vector
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const float* c = p.c + r * p.c_stride + v * kLanes;
      sum[r][v] = !p.accumulate ? Floats{} : v == kVectors - 1 ? load(c, left) : load(c);
    }
  }
  uintptr_t ahead = p.ahead;
  for (int64_t k = 0; k < inputs; ++k, ahead += p.ahead_step) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);  // into L2; never faults
    Floats w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats x = splat(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* c = p.c + r * p.c_stride + v * kLanes;
      v == kVectors - 1 ? store(c, sum[r][v], left) : store(c, sum[r][v]);
    }
  }
}

template <int kRows, int kVectors, class W>
void row_tiles(Product<W> p) {
  for (; p.rows >= kRows; p.rows -= kRows) {
    tile<kRows, kVectors>(p);
    p.a += kRows * p.a_stride;
    p.c += kRows * p.c_stride;
    p.ahead += static_cast<uintptr_t>(p.inputs) * p.ahead_step;
  }
  if constexpr (kRows > 1) row_tiles<kRows - 1, kVectors>(p);
}

template <int kVectors, class W>
void product(const Product<W>& p) {
  if constexpr (kVectors > 1) {
    if (p.cols <= (kVectors - 1) * kLanes) return product<kVectors - 1>(p);
  }
  row_tiles<kTileRows, kVectors>(p);
}

template <class W>
void gemm(const float* a, int64_t a_stride, const W* panel, int64_t inputs, float* c,
          int64_t c_stride, int64_t rows, int64_t cols, bool accumulate) {
  if (cols <= 0) return;
  // Behind this block of a packed matrix stands the next one: it comes from memory while the tiles
  // after the first compute on what is in L2. Few rows would otherwise wait for it.
  const auto tiles = static_cast<uintptr_t>((rows + kTileRows - 1) / kTileRows);
  product<kTileVectors>(Product<W>{a, a_stride, panel, inputs, c, c_stride, rows, cols, accumulate,
                                   reinterpret_cast<uintptr_t>(panel + inputs * kPanel),
                                   tiles > 0 ? kPanel * sizeof(W) / tiles : 0});
}

float dot(const float* a, const float* b, int64_t n) {
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
    HalfFloats halves[2];
    __builtin_memcpy(halves, &e, sizeof e);
    low += __builtin_convertvector(halves[0], HalfDoubles);
    high += __builtin_convertvector(halves[1], HalfDoubles);
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

typedef float Quad __attribute__((vector_size(16)));

// out[i + 4 stride ...]: four keys, four dimensions each, as columns.
void transpose_quads(const float* const* k, int64_t offset, float* out, int64_t stride) {
  Quad row[4];
  for (int j = 0; j < 4; ++j) __builtin_memcpy(&row[j], k[j] + offset, sizeof row[j]);
  const Quad low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Quad low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Quad high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Quad cols[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                        __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                        __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                        __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int d = 0; d < 4; ++d) __builtin_memcpy(out + d * stride, &cols[d], sizeof cols[d]);
}

// One panel of keys: columns [0, n) of [head_dim, kPanel], the rest 0.
void pack_keys(const float* const* k, int64_t offset, int64_t n, int64_t head_dim, float* panel) {
  const int64_t quads = n / 4 * 4, dims = head_dim / 4 * 4;
  for (int64_t j = 0; j < quads; j += 4) {
    for (int64_t d = 0; d < dims; d += 4)
      transpose_quads(k + j, offset + d, panel + d * kPanel + j, kPanel);
    for (int64_t d = dims; d < head_dim; ++d) {
      for (int64_t i = j; i < j + 4; ++i) panel[d * kPanel + i] = k[i][offset + d];
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int64_t j = quads; j < kPanel; ++j) panel[d * kPanel + j] = j < n ? k[j][offset + d] : 0;
  }
}

// One panel of values: [n, kPanel], columns [0, cols), the rest 0.
void pack_values(const float* const* v, int64_t offset, int64_t n, int64_t cols, float* panel) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      store(panel + j * kPanel + i, load(v[j] + offset + i, cols - i));
  }
}

// What online softmax knows of a query row: the largest score, and the sum of exp(score - largest).
struct Softmax {
  float max, sum;
};

// Scores become exp(score - largest so far); `out`, summed before, is rescaled to that.
void softmax_block(float* scores, int64_t n, float scale, Softmax& state, float* out,
                   int64_t head_dim) {
  Floats high = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    store(scores + j, load(scores + j, n - j) * scale, n - j);
    high = larger(load(scores + j, n - j, -kInfinity), high);
  }
  const float block_max = max_lanes(high), max = block_max > state.max ? block_max : state.max;
  Floats sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats e = exp(load(scores + j, n - j, -kInfinity) - max);
    sum += e;
    store(scores + j, e, n - j);
  }
  if (max > state.max) {  // otherwise the factor is exactly 1
    const float factor = exp(splat(state.max - max))[0];
    state.sum *= factor;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(out + d, load(out + d, head_dim - d) * factor, head_dim - d);
    }
  }
  state.max = max;
  state.sum += sum_lanes(sum);
}

void attention(const float* q, int64_t q_stride, const float* const* k, const float* const* v,
               int64_t offset, int64_t keys, int64_t head_dim, float scale, float* out,
               int64_t out_stride, int64_t rows, float* scratch) {
  const int64_t value_panels = (head_dim + kPanel - 1) / kPanel;
  float* packed_keys = scratch;                               // [kKeyBlock / kPanel, D, kPanel]
  float* packed_values = packed_keys + kKeyBlock * head_dim;  // [value_panels, kKeyBlock, kPanel]
  float* scores = packed_values + value_panels * kKeyBlock * kPanel;  // [rows, kKeyBlock]
  Softmax state[kAttentionRows];
  for (int64_t r = 0; r < rows; ++r) {
    state[r] = {-kInfinity, 0};
    for (int64_t d = 0; d < head_dim; ++d) out[r * out_stride + d] = 0;
  }
  for (int64_t first = 0; first < keys; first += kKeyBlock) {
    const int64_t n = keys - first < kKeyBlock ? keys - first : kKeyBlock;
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t cols = n - j < kPanel ? n - j : kPanel;
      float* panel = packed_keys + j * head_dim;
      pack_keys(k + first + j, offset, cols, head_dim, panel);
      gemm(q, q_stride, panel, head_dim, scores + j, kKeyBlock, rows, cols, false);
    }
    for (int64_t r = 0; r < rows; ++r) {
      softmax_block(scores + r * kKeyBlock, n, scale, state[r], out + r * out_stride, head_dim);
    }
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      const int64_t cols = head_dim - d < kPanel ? head_dim - d : kPanel;
      float* panel = packed_values + d * kKeyBlock;
      pack_values(v + first, offset + d, n, cols, panel);
      gemm(scores, kKeyBlock, panel, n, out + d, out_stride, rows, cols, true);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* y = out + r * out_stride;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(y + d, load(y + d, head_dim - d) / state[r].sum, head_dim - d);
    }
  }
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {kIsa,     kPanel, gemm<float>, gemm<bf16>, rms_norm, rope,
                          silu_mul, add,    dot,         attention,  row_stats};
