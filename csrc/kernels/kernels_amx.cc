// avx512_bf16, with products on AMX tiles: 32 rows times 32 columns at a time.
#include <immintrin.h>

#include <algorithm>

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
constexpr int64_t kChunk = 16 * kTile;          // 32 KiB of a strip stay in L1 while all rows pass

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

// The sums of the tiles before, on their way on while the next tiles are computed.
template <class Type>
struct Later {
  const int32_t* sums = nullptr;  // [rows, kStrip]
  int64_t rows = 0;               // left
  int64_t row = 0, column = 0;    // of the block: the next, and the first
  bool accumulate = false, last = false;

  [[gnu::always_inline]] void one_row(const Block& b) {
    auto* c = static_cast<int32_t*>(b.c) + row * b.c_stride + column;
    for (int64_t i = 0; i < kStrip; i += kTile) {
      __m512i x = _mm512_load_si512(sums + i);
      if (accumulate) x = Type::add(_mm512_loadu_si512(c + i), x);
      if (last) {
        finish(*b.finish, x, column + i, b.cols);
      } else {
        _mm512_storeu_si512(c + i, x);
      }
    }
    sums += kStrip;
    ++row;
    --rows;
  }

 private:
  [[gnu::always_inline]] void finish(const Finish& f, __m512i sum, int64_t first, int64_t cols) {
    const int64_t n = std::clamp<int64_t>(cols - first, 0, kTile);
    const auto some = static_cast<__mmask16>((1 << n) - 1);
    __m512 y = Type::value(sum, f, row, first, some);
    if (f.bias != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(some, f.bias + first));
    float* out = f.out + row * f.out_stride + first;
    if (f.stream) return _mm512_stream_ps(out, y);
    if (f.add) y = _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), y);
    _mm512_mask_storeu_ps(out, some, y);
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
[[gnu::always_inline]] inline void tiles(const Block& b, const char* a, const char* strip,
                                         int64_t steps, int32_t* sums, Later<Type>& later,
                                         Ahead& ahead) {
  const int64_t a_stride = b.a_stride * 4;
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
    if (later.rows > 0) later.one_row(b);
    if (later.rows > 0) later.one_row(b);
  }
  while (later.rows > 0) later.one_row(b);
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
  Later<Type> later;
  const auto* strip = static_cast<const char*>(b.panel);
  const int64_t blocks = (b.rows + 2 * kTile - 1) / (2 * kTile);
  const int64_t chunk = even_chunk(b.words, kChunk), chunk_bytes = chunk * kPanel * 4;
  for (int64_t k = 0; k < b.words; k += chunk) {
    const int64_t steps = std::min(chunk, b.words - k) / kTile;
    const bool here = k + chunk < b.words;
    // The next chunk, spread evenly: memory never rests.
    const int64_t turns = steps * 2 * blocks;
    const int64_t part = b.ahead_bytes * chunk / b.words / 64 * 64;
    const auto* after = static_cast<const char*>(b.ahead);
    Ahead ahead = b.near ? Ahead(after + k / chunk * part, part, turns)
                  : here ? Ahead(strip + chunk_bytes, chunk_bytes, turns)
                         : Ahead(after, std::min(chunk_bytes, b.ahead_bytes), turns);
    for (int64_t column = 0; column < kPanel; column += kStrip, strip += steps * kStepBytes) {
      for (int64_t r = 0; r < b.rows; r += 2 * kTile) {
        const int64_t rows = b.rows - r < 2 * kTile ? b.rows - r : 2 * kTile;
        const auto* a = reinterpret_cast<const char*>(b.a + r * b.a_stride + k);
        if (rows > kTile) {
          tiles<Type, true>(b, a, strip, steps, sums[turn], later, ahead);
        } else {
          tiles<Type, false>(b, a, strip, steps, sums[turn], later, ahead);
        }
        const bool last = b.finish != nullptr && !here;
        later = {sums[turn], rows, r, column, b.accumulate || k > 0, last};
        turn = 1 - turn;
      }
    }
  }
  while (later.rows > 0) later.one_row(b);
  if (b.finish != nullptr && b.finish->stream) drain();
}

// Product::expand, tile by tile.
void expand_tiles(const uint8_t* packed, const uint8_t* groups, int64_t words, int8_t* out) {
  constexpr int64_t kGroupWords = kInt4Group / 4;
  const int64_t chunk = even_chunk(words, kChunk);
  for (int64_t k = 0; k < words; k += chunk) {
    const int64_t end = std::min(k + chunk, words);
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
                       .speed = 8,
                       .chunk = kChunk};
const Product kInt8 = {.form = Form::u8_quads,
                       .run = tile_product<Int8>,
                       .expand = expand_tiles,
                       .word_step = kTile,
                       .row_step = 2 * kTile,
                       .row_block = 256,
                       .speed = 16,
                       .chunk = kChunk};

}  // namespace bicache::amx
