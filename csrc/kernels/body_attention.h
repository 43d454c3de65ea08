// Blocked attention with online softmax, in floats. See kernels_body.h.

namespace {

inline Floats load_wide(const float* p, int64_t left) { return load(p, left); }

// bfloat16, widened.
inline Floats load_wide(const bf16* p, int64_t left) {
  if (left >= kLanes) return widen(p);
  bf16 lanes[kLanes] = {};
  for (int64_t i = 0; i < left; ++i) lanes[i] = p[i];
  return widen(lanes);
}

// Up to kLanes keys: columns of [D, kPanel].
template <class Element>
void pack_keys(const void* const* k, int64_t offset, int64_t n, int64_t head_dim, float* panel) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t left = head_dim - d;
    Floats rows[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      rows[j] = j < n ? load_wide(static_cast<const Element*>(k[j]) + offset + d, left) : Floats{};
    }
    transpose(rows);
    for (int64_t i = 0; i < kLanes && i < left; ++i) store(panel + (d + i) * kPanel, rows[i]);
  }
}

// Attention::pack, into floats.
template <class Element>
void pack_attention(const void* const* k, const void* const* v, int64_t offset, int64_t n,
                    int64_t room, int64_t head_dim, void* keys, void* values) {
  for (int64_t j = 0; j < n; j += kLanes) {
    if (j % 32 == 0) prefetch_rows<Element>(k + j + 32, offset, n - j - 32, head_dim);
    float* panel = static_cast<float*>(keys) + j / kPanel * kPanel * head_dim + j % kPanel;
    pack_keys<Element>(k + j, offset, n - j, head_dim, panel);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (j % 32 == 0) prefetch_rows<Element>(v + j + 32, offset, n - j - 32, head_dim);
    const Element* row = static_cast<const Element*>(v[j]) + offset;
    float* to = static_cast<float*>(values) + j * kPanel;
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store(to + d / kPanel * kPanel * room + d % kPanel, load_wide(row + d, head_dim - d));
  }
}

// Scores become weights; what was summed before is rescaled to the new largest score.
template <bool kRounded>
void softmax(float* scores, int64_t n, float scale, Softmax& state, float* out, int64_t head_dim) {
  const float step = scale * kLog2e;
  Floats high = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) high = larger(load(scores + j, n - j, -kInfinity), high);
  rescale(max_lanes(high), state, out, head_dim,
          [=](Floats x) { return kRounded ? coarse_exp2(x * step) : exp(x * scale); });
  const Floats base = splat(base_of(state)), minus = -base * step;
  Floats sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats x = load(scores + j, n - j, -kInfinity);
    const Floats weight = kRounded ? (Floats)round_half(coarse_exp2(fma(x, splat(step), minus)))
                                   : exp((x - base) * scale);
    sum += weight;
    store(scores + j, weight, n - j);
  }
  state.sum += sum_lanes(sum);
}

// Attention::attend. The weights of bfloat16 values are rounded to it, and summed as they are then.
template <bool kRounded>
void attend(const AttentionBlock& b) {
  constexpr int64_t kRows = 48;  // whose scores stay in L1
  const int64_t dim = b.head_dim, width = (dim + kPanel - 1) / kPanel * kPanel;
  const auto *keys = static_cast<const float*>(b.keys),
             *values = static_cast<const float*>(b.values);
  const auto* weights = reinterpret_cast<const int32_t*>(b.scratch);
  for (int64_t r = 0; r < b.rows; r += kRows) {
    const int64_t rows = b.rows - r < kRows ? b.rows - r : kRows;
    float* out = b.out + r * width;
    for (int64_t first = 0; first < b.n; first += kKeyBlock) {
      const int64_t n = b.n - first < kKeyBlock ? b.n - first : kKeyBlock;
      for (int64_t j = 0; j < n; j += kPanel) {
        const int64_t cols = n - j < kPanel ? n - j : kPanel;
        product<DotF32>({b.q + r * b.words, b.words, keys + (first + j) * dim, dim, b.scratch + j,
                         kKeyBlock, rows, cols, false});
      }
      for (int64_t i = 0; i < rows; ++i) {
        softmax<kRounded>(b.scratch + i * kKeyBlock, n, b.scale, b.state[r + i], out + i * width,
                          dim);
      }
      for (int64_t d = 0; d < dim; d += kPanel) {
        const int64_t cols = dim - d < kPanel ? dim - d : kPanel;
        product<DotF32>({weights, kKeyBlock, values + d * b.room + first * kPanel, n, out + d,
                         width, rows, cols, true});
      }
    }
  }
}

}  // namespace
