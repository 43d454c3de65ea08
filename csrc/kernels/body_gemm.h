// Products of rows of 4-byte words with packed panels: one tile template for all element types. See
// kernels_body.h.
//
// A Dot says how one word of a row (1, 2 or 4 inputs) meets one vector of a panel:
//   Sums             kLanes sums
//   Weight, kInputs  a panel is [words, kPanel, kInputs] of Weight
//   word(p)          the word at p, in every lane
//   load(p)          kLanes columns of one row of a panel
//   dot(x, w, sum)   sum + x . w

namespace {

constexpr int64_t kPanel = kLanes * kTileVectors;
static_assert(kKeyBlock % kPanel == 0 && kPanel <= kMaxPanel);

struct DotF32 {
  using Sums = Floats;
  using Scalar = float;
  using Weight = float;
  static constexpr int kInputs = 1;
  static Floats word(const int32_t* p) {
    float x;
    __builtin_memcpy(&x, p, sizeof x);
    return splat(x);
  }
  static Floats load(const float* p) {
    Floats w;
    __builtin_memcpy(&w, p, sizeof w);
    return w;
  }
  static Floats dot(Floats x, Floats w, Floats sum) { return fma(x, w, sum); }
};

// bfloat16 weights; activations that were rounded to it and widened again.
struct DotBf16Wide : DotF32 {
  using Weight = bf16;
  static Floats load(const bf16* p) { return widen(p); }
};

constexpr int64_t kLine = 64;  // of the cache, in bytes

template <class Dot>
struct Tile {
  const int32_t* a;
  int64_t a_stride;
  const typename Dot::Weight* panel;
  int64_t words;
  typename Dot::Scalar* c;
  int64_t c_stride;
  int64_t rows, cols;
  bool accumulate;
  uintptr_t ahead, ahead_end;  // addresses to fetch meanwhile
  int64_t ahead_lines;         // of 64 bytes, with every word
  const Finish* finish;        // null: none
  int64_t row;                 // of the block: the first of the tile
};

template <class Sums, class Scalar>
Sums load_sums(const Scalar* p, int64_t left) {
  Sums sums = {};
  if (left >= kLanes) {  // a copy of fixed size is one instruction
    __builtin_memcpy(&sums, p, sizeof sums);
  } else {
    __builtin_memcpy(&sums, p, static_cast<size_t>(left) * 4);
  }
  return sums;
}

template <class Sums, class Scalar>
void store_sums(Scalar* p, const Sums& sums, int64_t left) {
  if (left >= kLanes) {
    __builtin_memcpy(p, &sums, sizeof sums);
  } else {
    __builtin_memcpy(p, &sums, static_cast<size_t>(left) * 4);
  }
}

// The first kRows rows of a product, kVectors vectors wide: each element of c is one chain of dot()
// over the words, ascending.
template <class Dot, int kRows, int kVectors>
void tile(const Tile<Dot>& p) {
  using Sums = typename Dot::Sums;
  const int32_t* a = p.a;
  const typename Dot::Weight* panel = p.panel;
  const int64_t a_stride = p.a_stride, words = p.words;
  const int64_t left = p.cols - (kVectors - 1) * kLanes;  // columns in the last vector
  constexpr int64_t kRowValues = kPanel * Dot::kInputs, kSoonWords = 8;
  constexpr auto kRowBytes = static_cast<int64_t>(kRowValues * sizeof(typename Dot::Weight));
  Sums sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const auto* c = p.c + r * p.c_stride + v * kLanes;
      sum[r][v] = p.accumulate ? load_sums<Sums>(c, v == kVectors - 1 ? left : kLanes) : Sums{};
    }
  }
  uintptr_t ahead = p.ahead;
  for (int64_t k = 0; k < words; ++k) {
    for (int64_t i = 0; i < p.ahead_lines; ++i, ahead += uintptr_t{kLine})
      __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);  // into L2; never faults
    const auto* soon = reinterpret_cast<const char*>(panel + (k + kSoonWords) * kRowValues);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRowBytes; i += kLine) __builtin_prefetch(soon + i);  // into L1
    decltype(Dot::load(panel)) w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      w[v] = Dot::load(panel + (k * kPanel + v * kLanes) * Dot::kInputs);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto x = Dot::word(a + r * a_stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::dot(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      auto* c = p.c + r * p.c_stride + v * kLanes;
      store_sums(c, sum[r][v], v == kVectors - 1 ? left : kLanes);
    }
  }
}

// What Finish says, of the `rows` rows that a tile has just summed.
template <class Dot>
void finish_rows(const Tile<Dot>& p, int rows) {
  const Finish& f = *p.finish;
  for (int64_t r = 0; r < rows; ++r) {
    float* out = f.out + (p.row + r) * f.out_stride;
    for (int64_t i = 0; i < p.cols; i += kLanes) {
      const int64_t left = p.cols - i;
      const auto sum = load_sums<typename Dot::Sums>(p.c + r * p.c_stride + i, left);
      Floats y;
      if constexpr (sizeof(typename Dot::Weight) == 1) {
        const Ints whole = (Ints)sum - load_sums<Ints>(f.correction + i, left);
        y = __builtin_convertvector(whole, Floats) *
            (f.row_scale[p.row + r] * load(f.scale + i, left));
      } else {
        y = sum;
      }
      if (f.bias != nullptr) y += load(f.bias + i, left);
      if (f.stream) {
        stream(out + i, y);
      } else {
        store(out + i, f.add ? load(out + i, left) + y : y, left);
      }
    }
  }
}

template <class Dot, int kRows, int kVectors>
void row_tiles(Tile<Dot> p) {
  for (; p.rows >= kRows; p.rows -= kRows) {
    tile<Dot, kRows, kVectors>(p);
    if (p.finish != nullptr) finish_rows(p, kRows);
    p.row += kRows;
    p.a += kRows * p.a_stride;
    p.c += kRows * p.c_stride;
    p.ahead += static_cast<uintptr_t>(p.words * p.ahead_lines * kLine);
    if (p.ahead >= p.ahead_end) p.ahead_lines = 0;
  }
  if constexpr (kRows > 1) row_tiles<Dot, kRows - 1, kVectors>(p);
}

template <class Dot, int kVectors>
void columns(const Tile<Dot>& p) {
  if constexpr (kVectors > 1) {
    if (p.cols <= (kVectors - 1) * kLanes) return columns<Dot, kVectors - 1>(p);
  }
  row_tiles<Dot, kTileRows, kVectors>(p);
}

// Product::run.
template <class Dot>
void product(const Block& b) {
  using Weight = typename Dot::Weight;
  if (b.cols <= 0) return;
  const int64_t tiles = (b.rows + kTileRows - 1) / kTileRows;
  const auto ahead = reinterpret_cast<uintptr_t>(b.ahead);
  const int64_t steps = b.words * tiles * kLine;
  columns<Dot, kTileVectors>(
      Tile<Dot>{b.a, b.a_stride, static_cast<const Weight*>(b.panel), b.words,
                static_cast<typename Dot::Scalar*>(b.c), b.c_stride, b.rows, b.cols, b.accumulate,
                ahead, ahead + static_cast<uintptr_t>(b.ahead_bytes),
                steps > 0 ? (b.ahead_bytes + steps - 1) / steps : 0, b.finish, 0});
  if (b.finish != nullptr && b.finish->stream) drain();
}

// m (in every 16 bits) and z (in every byte) of the inputs in one vector of a panel.
struct Int4Group {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t Pairs __attribute__((vector_size(kLanes * 4)));
  Pairs m;
  Bytes z;

  // Of the columns from m[0] and z[0] on, which take `inputs` neighbouring bytes: 4 or 2.
  Int4Group(int inputs, const uint8_t* of_m, const uint8_t* of_z)
      : m(inputs == 4 ? (Pairs)(quads(of_m) * 0x10001u) : (Pairs)pairs(of_m)),
        z(inputs == 4 ? (Bytes)(quads(of_z) * 0x1010101u)
                      : (Bytes)((Pairs)pairs(of_z) * uint16_t{0x101})) {}
  // Of four bits in every byte. Two bytes are multiplied as one number: m * q < 256, so nothing is
  // carried.
  void put(Bytes q, int8_t* out) const {
    const Bytes y = (Bytes)((Pairs)q * m) - z;
    __builtin_memcpy(out, &y, sizeof y);
  }
};

// Product::expand. A column takes kInputs neighbouring bytes.
template <int kInputs>
void expand(const uint8_t* packed, const uint8_t* groups, int64_t words, int8_t* out) {
  constexpr int64_t kBytes = kLanes * 4, kRow = kPanel * kInputs, kWords = kInt4Group / kInputs;
  constexpr bool kWide =
      kRow > kBytes;  // a pair of vectors lies in one row of the panel, not in two
  constexpr int64_t kStep = kWide ? kRow : 2 * kBytes;
  for (; words > 0; words -= kWords) {
    for (int64_t v = 0; v < kRow; v += 2 * kBytes) {
      const uint8_t *m = groups + v / kInputs, *next = kWide ? m + kBytes / kInputs : m;
      const Int4Group low(kInputs, m, m + kPanel), high(kInputs, next, next + kPanel);
      for (int64_t at = v; at < kWords * kRow; at += kStep) {
        Int4Group::Bytes q;
        __builtin_memcpy(&q, packed + at / 2, sizeof q);
        low.put(q & 15, out + at);
        high.put((Int4Group::Bytes)((Int4Group::Pairs)q >> 4) & 15, out + at + kBytes);
      }
    }
    packed += kWords * kRow / 2;
    out += kWords * kRow;
    groups += 2 * kPanel;
  }
}

}  // namespace
