// avx512_bf16, with products on AMX tiles: 32 rows times 32 columns at a time.
#include <immintrin.h>

#include "kernels/amx_tiles.h"
#include "kernels/kernels.h"

namespace bicache::amx {
namespace {

#include "kernels/lanes_avx512.h"

}  // namespace

#include "kernels/body_vector.h"
//
#include "kernels/body_gemm.h"

namespace {

constexpr int64_t kStrip = 32, kTile = 16;      // columns; rows, columns, words
constexpr int64_t kStepBytes = 2 * kTile * 64;  // of weights: two tiles
constexpr int64_t kChunkSteps = 16;  // 32 KiB of a strip stay in the L1 cache while all rows pass
constexpr int64_t kChunk = kChunkSteps * kTile, kChunkBytes = kChunk * kPanel * 4;

struct Bf16 {
  template <int c, int a, int b>
  static void dot() {
    dot_bf16<c, a, b>();
  }
  static __m512i add(__m512i x, __m512i y) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y)));
  }
  static __m512 value(__m512i sum, const Finish&, int64_t, int64_t, __mmask16) {
    return _mm512_castsi512_ps(sum);
  }
};

struct Int8 {
  template <int c, int a, int b>
  static void dot() {
    dot_u8s8<c, a, b>();
  }
  static __m512i add(__m512i x, __m512i y) { return _mm512_add_epi32(x, y); }
  static __m512 value(__m512i sum, const Finish& f, int64_t row, int64_t column, __mmask16 some) {
    const __m512i correction = _mm512_maskz_loadu_epi32(some, f.correction + column);
    const __m512 scale = _mm512_maskz_loadu_ps(some, f.scale + column);
    return _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(some, _mm512_sub_epi32(sum, correction)),
                         _mm512_mul_ps(_mm512_set1_ps(f.row_scale[row]), scale));
  }
};

template <class Type>
void finish(const Finish& f, __m512i sum, int64_t row, int64_t column, int64_t cols) {
  if (column >= cols) return;
  const auto some = static_cast<__mmask16>(cols - column < kTile ? (1 << (cols - column)) - 1 : -1);
  __m512 y = Type::value(sum, f, row, column, some);
  if (f.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, f.bias + column));
  float* out = f.out + row * f.out_stride + column;
  if (f.stream) return _mm512_stream_ps(out, y);
  if (f.add) y = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), y);
  _mm512_mask_storeu_ps(out, some, y);
}

// The sums of the tiles before, on their way on while the next tiles are computed.
template <class Type>
struct Later {
  const Block* block;
  const int32_t* sums = nullptr;          // [rows, kStrip]
  int64_t row = 0, column = 0, rows = 0;  // of the block: the first, and those left
  bool accumulate = false, last = false;

  void one_row() {
    auto* c = static_cast<int32_t*>(block->c) + row * block->c_stride + column;
    for (int64_t i = 0; i < kStrip; i += kTile) {
      __m512i x = _mm512_load_si512(sums + i);
      if (accumulate) x = Type::add(_mm512_loadu_si512(c + i), x);
      if (last) {
        finish<Type>(*block->finish, x, row, column + i, block->cols);
      } else {
        _mm512_storeu_si512(c + i, x);
      }
    }
    sums += kStrip;
    ++row;
    --rows;
  }
};

// What is fetched into the L2 cache between the steps.
struct Ahead {
  const char* at;
  int64_t lines, a_step;  // left, and with every step

  Ahead(const void* from, int64_t bytes, int64_t steps)
      : at(static_cast<const char*>(from)),
        lines(bytes / 64),
        a_step((lines + steps - 1) / steps) {}
  void step() {
    if (lines <= 0) return;
    for (int64_t i = 0; i < a_step; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);  // never faults
    lines -= a_step;
  }
};

// sums [32 or 16 rows, kStrip] = a . strip over `steps`; a_stride in bytes.
template <class Type, bool kBothRows>
void tiles(const char* a, int64_t a_stride, const char* strip, int64_t steps, int32_t* sums,
           Later<Type>& later, Ahead& ahead) {
  const char* a_low = a + kTile * a_stride;
  zero<0>();
  zero<1>();
  zero<2>();
  zero<3>();
  for (int64_t k = 0; k < steps; ++k, a += 64, a_low += 64, strip += kStepBytes) {
    load_past<4>(a, a_stride);
    load<6>(strip, 64);
    load<7>(strip + kStepBytes / 2, 64);
    if (kBothRows) load_past<5>(a_low, a_stride);
    Type::template dot<0, 4, 6>();
    Type::template dot<1, 4, 7>();
    if (kBothRows) Type::template dot<2, 5, 6>();
    if (kBothRows) Type::template dot<3, 5, 7>();
    ahead.step();
    if (later.rows > 0) later.one_row();
    if (later.rows > 0) later.one_row();
  }
  while (later.rows > 0) later.one_row();
  store<0>(sums, kStrip * 4);
  store<1>(sums + kTile, kStrip * 4);
  if (kBothRows) store<2>(sums + kTile * kStrip, kStrip * 4);
  if (kBothRows) store<3>(sums + kTile * kStrip + kTile, kStrip * 4);
}

// Product::run. Columns behind b.cols are computed as well: the caller's c is a panel wide.
template <class Type>
void tile_product(const Block& b) {
  const Tiles configured;
  alignas(64) int32_t sums[2][2 * kTile * kStrip];
  int turn = 0;
  Later<Type> later{&b};
  const auto* strip = static_cast<const char*>(b.panel);
  const int64_t blocks = (b.rows + 2 * kTile - 1) / (2 * kTile);
  for (int64_t k = 0; k < b.words; k += kChunk) {
    const int64_t steps = (b.words - k < kChunk ? b.words - k : kChunk) / kTile;
    // The next chunk. Memory must not rest where there are few rows.
    const bool here = k + kChunk < b.words;
    const int64_t bytes = here || b.ahead_bytes > kChunkBytes ? kChunkBytes : b.ahead_bytes;
    Ahead ahead(here ? strip + kChunkBytes : b.ahead, bytes,
                steps * (blocks <= 4 ? 1 : 2 * blocks));
    for (int64_t column = 0; column < kPanel; column += kStrip, strip += steps * kStepBytes) {
      for (int64_t r = 0; r < b.rows; r += 2 * kTile) {
        const int64_t rows = b.rows - r < 2 * kTile ? b.rows - r : 2 * kTile;
        const auto* a = reinterpret_cast<const char*>(b.a + r * b.a_stride + k);
        const auto run = rows > kTile ? tiles<Type, true> : tiles<Type, false>;
        run(a, b.a_stride * 4, strip, steps, sums[turn], later, ahead);
        const bool last = b.finish != nullptr && k + kChunk >= b.words;
        later = {&b, sums[turn], r, column, rows, b.accumulate || k > 0, last};
        turn = 1 - turn;
      }
    }
  }
  while (later.rows > 0) later.one_row();
  if (b.finish != nullptr && b.finish->stream) drain();
}

// Product::expand, tile by tile.
void expand_tiles(const uint8_t* packed, const uint8_t* groups, int64_t words, int8_t* out) {
  constexpr int64_t kGroupWords = kInt4Group / 4;
  for (int64_t k = 0; k < words; k += kChunk) {
    const int64_t end = words - k < kChunk ? words : k + kChunk;
    for (int64_t column = 0; column < kPanel; column += kStrip) {
      for (int64_t w = k; w < end; w += kTile) {
        for (int64_t i = 0; i < 2 * kTile; i += kGroupWords) {  // words of the two tiles
          const int64_t group = (w + i % kTile) / kGroupWords;
          const uint8_t* m = groups + group * 2 * kPanel + column + i / kTile * kTile;
          const Int4Group some(4, m, m + kPanel);
          for (int64_t j = 0; j < kGroupWords; j += 2, packed += 64, out += 128) {
            Int4Group::Bytes q;
            __builtin_memcpy(&q, packed, sizeof q);
            some.put(q & 15, out);
            some.put((Int4Group::Bytes)((Int4Group::Pairs)q >> 4) & 15, out + 64);
          }
        }
      }
    }
  }
}

}  // namespace

extern const Product kBf16, kInt8;
const Product kBf16 = {.form = Form::bf16_pairs,
                       .run = tile_product<Bf16>,
                       .word_step = kTile,
                       .row_step = 2 * kTile,
                       .row_block = 256,
                       .chunk = kChunk};
const Product kInt8 = {.form = Form::u8_quads,
                       .run = tile_product<Int8>,
                       .expand = expand_tiles,
                       .word_step = kTile,
                       .row_step = 2 * kTile,
                       .row_block = 256,
                       .chunk = kChunk};

}  // namespace bicache::amx
