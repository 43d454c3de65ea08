// bf16 attention on AMX tiles: while they multiply, the vector units turn scores into weights.
#include <immintrin.h>

#include "kernels/amx_tiles.h"
#include "kernels/kernels.h"

namespace bicache::amx_attention {
namespace {

#include "kernels/lanes_avx512.h"

}  // namespace

#include "kernels/body_vector.h"
//
#include "kernels/body_softmax.h"
//
#include "kernels/body_attention_pairs.h"

namespace {

// A tile of keys or values: [kStepWords, kSide] words, one after the other.
constexpr int64_t kSide = 16, kTileBytes = 4 * kStepWords * kSide;
constexpr int64_t kRows = 2 * kSide;          // of one strip: what is multiplied at once
constexpr int64_t kRowBytes = 4 * kKeyBlock;  // of scores; the weights take their place

// Four tiles that stand as a square: where they are in memory.
struct Square {
  char* at;
  int64_t row, down;  // bytes from row to row, and to the lower two tiles
};

// Tile t = the tile at p, which is read once: it would push others out of L1.
template <int t>
inline void load_once(const char* p) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{64}), "i"(t) : "memory");
}

template <int t>
inline void store_of(const Square& s) {
  amx::store<t>(s.at + (t & 1) * 64 + (t >> 1) * s.down, s.row);
}

template <int t, bool kAdd>
inline void start_of(const Square& s) {
  if constexpr (kAdd) amx::load<t>(s.at + (t & 1) * 64 + (t >> 1) * s.down, s.row);
  if constexpr (!kAdd) amx::zero<t>();
}

inline void store_all(const Square& s) {
  store_of<0>(s);
  store_of<1>(s);
  store_of<2>(s);
  store_of<3>(s);
}

// The scores of a strip and one block of keys, on their way to weights.
struct Scores {
  float* at;            // [kRows, kKeyBlock]
  float minus[kRows];   // what weights take away from scores * step
  float factor[kRows];  // of what was summed before
  bool rescale;         // some of them are not 1
};

// A strip: up to kRows query rows, all keys of a block.
struct Strip {
  const AttentionBlock& b;
  const int32_t* q;
  float* out;
  int64_t rows, width;
  Scores scores[3];
  float step;            // of scores, to powers of 2
  float largest[kRows];  // as Softmax::max
  Floats sums[kRows];    // of weights, lane by lane

  int64_t blocks() const { return (b.n + kKeyBlock - 1) / kKeyBlock; }
  // Steps of tiles to the end of this block.
  int64_t steps(int64_t block) const {
    const int64_t n = b.n - block * kKeyBlock;
    return ((n < kKeyBlock ? n : kKeyBlock) + kStepInputs - 1) / kStepInputs;
  }
};

// One lane per row: the largest of kSide vectors.
inline Floats max_by_row(Floats (&v)[kSide]) {
#pragma GCC unroll 4
  for (int half = kSide / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      v[i] = larger(interleave_low(v[i], v[i + half]), interleave_high(v[i], v[i + half]));
  }
  return v[0];
}

// The new largest scores.
inline void find_largest(Strip& s, Scores& scores) {
  scores.rescale = false;
  for (int64_t first = 0; first < s.rows; first += kSide) {
    Floats high[kSide];
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r) {
      const float* row = scores.at + (first + r) * kKeyBlock;
      high[r] = larger(larger(load(row), load(row + kLanes)),
                       larger(load(row + 2 * kLanes), load(row + 3 * kLanes)));
    }
    const Floats old = load(s.largest + first), now = larger(max_by_row(high), old);
    const Ints grown = now > old;
    store(s.largest + first, now);
    store(scores.minus + first, now == splat(-kInfinity) ? Floats{} : now * -s.step);
    store(scores.factor + first, grown ? fast_exp2((old - now) * s.step) : splat(1));
    scores.rescale |= _mm512_movepi32_mask((__m512i)grown) != 0;
  }
}

inline void weigh(Strip& s, Scores& scores, int64_t r) {
  float* row = scores.at + r * kKeyBlock;
  const Floats step = splat(s.step), minus = splat(scores.minus[r]);
  Floats sum = s.sums[r] * scores.factor[r];
#pragma GCC unroll 2
  for (int64_t j = 0; j < kKeyBlock; j += 2 * kLanes) {
    const Floats low = fast_exp2(fma(load(row + j), step, minus));
    const Floats high = fast_exp2(fma(load(row + j + kLanes), step, minus));
    const auto pairs = (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    sum += (Floats)(pairs << 16);
    sum += (Floats)(pairs & 0xffff0000);
    __builtin_memcpy(reinterpret_cast<char*>(row) + 2 * j, &pairs, sizeof pairs);
  }
  s.sums[r] = sum;
}

// The way of some scores to weights, row by row, at the pace of the tiles' steps.
class Softmaxing {
 public:
  Softmaxing(Strip& strip, Scores& scores, int64_t steps)
      : strip_(strip), scores_(scores), pace_(steps > 0 ? (strip.rows + steps - 1) / steps : 0) {}

  void step() { advance(pace_); }
  void finish() { advance(strip_.rows); }

 private:
  void advance(int64_t rows) {
    for (; rows > 0 && row_ < strip_.rows; --rows, ++row_) weigh(strip_, scores_, row_);
  }

  Strip& strip_;
  Scores& scores_;
  int64_t pace_, row_ = 0;
};

struct Nothing {
  void step() {}
};

// What is multiplied: a [32, steps] with its tiles side by side, b [steps, 32] with each column of
// tiles in a row.
struct Factors {
  const char* a;
  int64_t a_row;
  const char* b;
  int64_t b_next;
  int64_t steps;
};

// `to` (+)= a . b, which stays in the tiles. What they held goes to `pending`, one by one between
// the first products: stores at the end would wait for the last ones.
template <bool kAdd, class Meanwhile>
inline void multiply(const Factors& f, const Square& to, Square& pending, Meanwhile& meanwhile) {
  const char *a = f.a, *low = f.a + kSide * f.a_row, *b = f.b, *right = f.b + f.b_next;
  load_once<6>(b);
  amx::load<4>(a, f.a_row);
  store_of<0>(pending);
  start_of<0, kAdd>(to);
  amx::dot_bf16<0, 4, 6>();
  load_once<7>(right);
  store_of<1>(pending);
  start_of<1, kAdd>(to);
  amx::dot_bf16<1, 4, 7>();
  amx::load<5>(low, f.a_row);
  store_of<2>(pending);
  start_of<2, kAdd>(to);
  amx::dot_bf16<2, 5, 6>();
  store_of<3>(pending);
  start_of<3, kAdd>(to);
  amx::dot_bf16<3, 5, 7>();
  meanwhile.step();
  for (int64_t k = 1; k < f.steps; ++k) {
    load_once<6>(b + k * kTileBytes);
    amx::load<4>(a + k * 64, f.a_row);
    load_once<7>(right + k * kTileBytes);
    amx::load<5>(low + k * 64, f.a_row);
    amx::dot_bf16<0, 4, 6>();
    amx::dot_bf16<1, 4, 7>();
    amx::dot_bf16<2, 5, 6>();
    amx::dot_bf16<3, 5, 7>();
    meanwhile.step();
  }
  pending = to;
}

// The scores of one block of keys.
template <class Meanwhile>
void score(const Strip& s, int64_t block, Square& pending, Meanwhile& meanwhile) {
  const int64_t steps = s.b.words / kStepWords;
  const auto* keys =
      static_cast<const char*>(s.b.keys) + block * (kKeyBlock / kSide) * steps * kTileBytes;
  auto* at = reinterpret_cast<char*>(s.scores[block % 3].at);
  for (int64_t j = 0; j < s.steps(block); ++j) {
    multiply<false>({reinterpret_cast<const char*>(s.q), s.b.words * 4,
                     keys + j * 2 * steps * kTileBytes, steps * kTileBytes, steps},
                    {at + j * 128, kRowBytes, kSide * kRowBytes}, pending, meanwhile);
  }
}

// Where there are no keys, there is no weight.
void hide_missing(const Strip& s, int64_t block) {
  for (int64_t j = s.b.n - block * kKeyBlock; j < kKeyBlock; ++j) {
    for (int64_t r = 0; r < kRows; ++r) s.scores[block % 3].at[r * kKeyBlock + j] = -kInfinity;
  }
}

void rescale(const Strip& s, const Scores& scores) {
  if (!scores.rescale) return;
  for (int64_t r = 0; r < s.rows; ++r) {
    const float factor = scores.factor[r];
    if (factor == 1) continue;
    float* row = s.out + r * s.width;
    for (int64_t d = 0; d < s.b.head_dim; d += kLanes) store(row + d, load(row + d) * factor);
  }
}

// out += weights . values of one block of keys.
template <class Meanwhile>
void add_values(const Strip& s, int64_t block, Square& pending, Meanwhile& meanwhile) {
  const int64_t column = s.b.room / kStepInputs * kTileBytes, row = s.width * 4;
  const auto* values =
      static_cast<const char*>(s.b.values) + block * (kKeyBlock / kStepInputs) * kTileBytes;
  const auto* weights = reinterpret_cast<const char*>(s.scores[block % 3].at);
  for (int64_t d = 0; d < s.b.head_dim; d += 2 * kSide) {
    multiply<true>({weights, kRowBytes, values + d / kSide * column, column, s.steps(block)},
                   {reinterpret_cast<char*>(s.out + d), row, kSide * row}, pending, meanwhile);
  }
}

void attend_strip(Strip& s, const Square& nowhere) {
  const int64_t blocks = s.blocks(), q_steps = s.b.words / kStepWords;
  const int64_t out_steps = (s.b.head_dim + kStepInputs - 1) / kStepInputs;
  Nothing nothing;
  Square pending = nowhere;
  const auto flush = [&] {
    store_all(pending);
    pending = nowhere;
  };
  const auto finish_scores = [&](int64_t block) {
    if (block + 1 == blocks) hide_missing(s, block);
    find_largest(s, s.scores[block % 3]);
  };
  score(s, 0, pending, nothing);
  flush();
  finish_scores(0);
  for (int64_t i = 0; i < blocks; ++i) {
    const bool more = i + 1 < blocks;
    Softmaxing softmaxing(
        s, s.scores[i % 3],
        (more ? s.steps(i + 1) * q_steps : 0) + (i > 0 ? s.steps(i - 1) * out_steps : 0));
    if (more) score(s, i + 1, pending, softmaxing);
    if (!more || i == 0) flush();  // sums that are rescaled next, or scores that are looked at
    if (i > 0) {
      rescale(s, s.scores[(i - 1) % 3]);
      add_values(s, i - 1, pending, softmaxing);
    }
    if (more) finish_scores(i + 1);
    softmaxing.finish();
  }
  flush();
  rescale(s, s.scores[(blocks - 1) % 3]);
  add_values(s, blocks - 1, pending, nothing);
  flush();
}

// Attention::attend, strip by strip: while tiles add the values of block i - 1 and make the scores
// of block i + 1, those of block i become weights.
void attend(const AttentionBlock& b) {
  const amx::Tiles configured;
  const int64_t width = (b.head_dim + 63) / 64 * 64;
  const Square nowhere{reinterpret_cast<char*>(b.scratch + 3 * kRows * kKeyBlock), 64, 0};
  for (int64_t first = 0; first < b.rows; first += kRows) {
    const int64_t left = b.rows - first;
    Strip s{.b = b,
            .q = b.q + first * b.words,
            .out = b.out + first * width,
            .rows = left < kRows ? left : kRows,
            .width = width,
            .scores = {},
            .step = b.scale * kLog2e,
            .largest = {},
            .sums = {}};
    for (int64_t i = 0; i < 3; ++i) s.scores[i].at = b.scratch + i * kRows * kKeyBlock;
    for (int64_t r = 0; r < s.rows; ++r) {
      s.largest[r] = b.state[first + r].max;
      s.sums[r][0] = b.state[first + r].sum;
    }
    attend_strip(s, nowhere);
    for (int64_t r = 0; r < s.rows; ++r) b.state[first + r] = {s.largest[r], sum_lanes(s.sums[r])};
  }
}

}  // namespace

extern const Attention kAttention;
const Attention kAttention = {.form = Form::bf16_pairs,
                              .word_step = kStepWords,
                              .row_step = kRows,
                              .scratch_rows = 4 * kRows,
                              .speed = 4,
                              .pack = pack_pairs<kSide>,
                              .attend = attend};

}  // namespace bicache::amx_attention
