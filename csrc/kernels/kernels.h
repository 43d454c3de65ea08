// The kernel table: one set of function pointers per instruction set. Chosen once from CPUID,
// forced with BICACHE_ISA.
//
//   generic, avx2, avx512   the same source (kernels_body.h), compiled once each
//   avx_vnni                avx2 with int8 dot products
//   avx512_vnni             avx512 with int8 dot products
//   avx512_bf16             ... and bf16 dot products
//   amx                     ... on tiles
//
// Row-stable: within one ISA, the bits of an output row depend on that row's inputs alone, never on
// how many rows are computed together, on which thread, or on where in a tile the row falls. Sums
// run in a fixed order: over k ascending (one multiply-add each, fused where the ISA has it, or one
// dot product of neighbours); attention over key blocks of kKeyBlock aligned to absolute positions.
// int8 sums are integers: the same bits on every ISA. Kernels never throw, and read and write
// nothing but what their shapes say.
#pragma once

#include <cstdint>
#include <vector>

#include "base/dtype.h"

namespace bicache {

constexpr int64_t kKeyBlock = 64;   // keys per step of the online softmax
constexpr int64_t kMaxPanel = 64;   // no table's panel is wider
constexpr int64_t kInt4Group = 32;  // inputs of int4 weights that share m and z

// The largest of n logits (ties: the lowest index), and sum(exp(x - max)). NaN anywhere: `argmax`
// is the first NaN, `max` and `sum_exp` are NaN. An infinite `max` makes `sum_exp` NaN.
struct RowStats {
  int64_t argmax = 0;
  float max = 0;
  double sum_exp = 0;
};

// How activations stand in memory as 4-byte words: a float; two bfloat16; two int16; or four bytes
// that hold int8 + 128.
enum class Form : uint8_t { f32, bf16_pairs, s16_pairs, u8_quads };

constexpr int64_t inputs_per_word(Form form) {
  return form == Form::f32 ? 1 : form == Form::u8_quads ? 4 : 2;
}

// What becomes of sums [rows, cols] when the last words are in: y = sum, or of int8 weights
// float(sum - correction) * (row_scale * scale); y += bias; out = y or out += y.
struct Finish {
  const int32_t* correction;  // [cols]; int8 weights only, as the scales
  const float* scale;         // [cols]
  const float* row_scale;     // [rows]
  const float* bias;          // [cols]; null: none
  float* out;                 // may be Block::c
  int64_t out_stride;
  bool add;
  bool stream;  // written past the caches: whole vectors on their boundaries, not `add`
};

// Some rows times one panel, or a part of its words: c[r, j] (+)= sum_w a[r, w] . panel[w, j].
struct Block {
  const int32_t* a;   // [rows, words], in the product's Form
  int64_t a_stride;   // in words
  const void* panel;  // [words, Kernels::panel, inputs_per_word] of the weights' type
  int64_t words;      // a multiple of Product::word_step
  void* c;            // [rows, cols] of float, or int32 for int8 weights
  int64_t c_stride;
  int64_t rows, cols;           // cols <= Kernels::panel
  bool accumulate;              // starts from c, so a sum cut into pieces has the bits of the whole
  const void* ahead = nullptr;  // what comes next: is fetched into the L2 cache meanwhile
  int64_t ahead_bytes = 0;
  const Finish* finish = nullptr;  // null: sums stay in c, which is scratch otherwise
  bool near = false;               // the panel is in the L2 cache already
};

// A product with weights of one type. Panels and rows of activations are padded with zeros to a
// multiple of word_step words; what stands behind the last of a multiple of row_step rows is read
// as well.
struct Product {
  Form form = Form::f32;  // of the activations
  void (*run)(const Block& block) = nullptr;
  // int8 products: the panel [words, panel, inputs_per_word] = m * q - z, with q the nibbles of
  // `packed` and `groups` [words * inputs_per_word / kInt4Group, (m, z), panel], see Matrix.
  void (*expand)(const uint8_t* packed, const uint8_t* groups, int64_t words,
                 int8_t* out) = nullptr;
  int64_t word_step = 1, row_step = 1;
  int64_t row_block = 96;  // rows of one task
  int64_t speed = 1;       // about how many times that of multiply-adds of floats
  // Not 0: every kBlockWords words of a panel are cut into even chunks of at most so many, each of
  // them into strips of 32 columns, and these into tiles [words / 16, 2][16 words, 16 columns,
  // inputs_per_word]. What a chunk adds to a sum is summed from 0; a Block is such kBlockWords.
  int64_t chunk = 0;
};

constexpr int64_t kBlockWords = 1024;  // of one panel: stays in L2 while the rows of a task pass

// Words of the chunks, but for the last, of a block of `words`.
constexpr int64_t even_chunk(int64_t words, int64_t most) {
  constexpr int64_t kTile = 16;
  const int64_t chunks = (words + most - 1) / most;
  return (words / kTile + chunks - 1) / chunks * kTile;
}

// What online softmax knows of a query row: the largest score, and the sum of the weights
// exp((score - largest) * scale).
struct Softmax {
  float max, sum;
};

// Some query rows against some keys.
struct AttentionBlock {
  const int32_t* q;           // [rows, words]
  int64_t words;              // of D inputs, zero-padded to a multiple of Attention::word_step
  const void *keys, *values;  // as Attention::pack leaves them
  int64_t room;               // keys there is room for in `keys` and `values`
  int64_t n;                  // keys in them
  int64_t head_dim;
  float scale;  // of scores, > 0
  int64_t rows;
  Softmax* state;  // [rows]; before the first keys: -infinity, 0
  float* out;      // [rows, D in whole panels]: sums of weights times values; at first 0
  float* scratch;  // [Attention::scratch_rows, kKeyBlock]
};

// Softmax attention over K and V of one type, some keys at a time. q and out end behind a multiple
// of row_step rows; those behind `rows` are read and written at will.
struct Attention {
  Form form;  // of q; f32 (of bf16 K/V: rounded to it) or bf16_pairs
  int64_t word_step = 1, row_step = 1, scratch_rows = 48;
  int64_t speed = 1;  // as in Product
  // Columns [offset, offset + D) of n rows of K and V, in panels of p columns; `room` is a multiple
  // of kKeyBlock and no less than n. What n lacks to kKeyBlock is 0 as far as `attend` reads it.
  //   keys: [room / p, words, p, inputs_per_word]
  //   values: [panels of D, room / inputs_per_word, p, inputs_per_word]
  void (*pack)(const void* const* k, const void* const* v, int64_t offset, int64_t n, int64_t room,
               int64_t head_dim, void* keys, void* values);
  // `n` is a multiple of kKeyBlock, except for a request's last keys.
  void (*attend)(const AttentionBlock& block);
};

struct Kernels {
  const char* isa;
  int64_t panel;         // output columns of one packed panel, zero-padded
  int64_t vector_bytes;  // of the packing of int4

  // Activations meet bf16 weights rounded to bfloat16: as floats (Form::f32) or in pairs. u8_quads
  // make sums that are too large by 128 times the sum of a column's weights.
  Product f32, bf16, int8;

  // Rounds n floats to bfloat16, as floats or as such; halves and floats may be the same memory.
  void (*round_to_floats)(const float* x, int64_t n, float* y);
  void (*round_to_halves)(const float* x, int64_t n, uint16_t* y);
  // q = round(x * (127 / max|x|)), ties to even, of n floats; returns the scale, max|x| / 127. What
  // is not finite makes it NaN (and q = 0).
  float (*quantize_s16)(const float* x, int64_t n, int16_t* q);
  float (*quantize_u8)(const float* x, int64_t n, uint8_t* q);  // q + 128
  // y[j] = float(sum[j] - correction[j]) * (row_scale * scale[j]), [n]; y may be sum's memory.
  void (*dequantize)(const int32_t* sum, const int32_t* correction, const float* scale,
                     float row_scale, int64_t n, float* y);

  // y = weight * x / sqrt(mean(x^2) + eps); [n]. y may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // Rotates the halves of one head in place: (a, b) -> (a cos - b sin, b cos + a sin); cos, sin
  // [head_dim / 2].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t head_dim);
  // gate = silu(gate) * up; [n].
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // x += y; [n].
  void (*add)(float* x, const float* y, int64_t n);
  // Dot product of two vectors; [n].
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*dot_bf16)(const bicache::bf16* a, const bicache::bf16* b, int64_t n);
  // y = x / divisor; [n].
  void (*divide)(const float* x, float divisor, int64_t n, float* y);
  // Of f32 and of bf16 K/V. With bf16, queries and weights are rounded to it as well.
  Attention attention_f32, attention_bf16;
  RowStats (*row_stats)(const float* x, int64_t n);
};

// Every table this build has and this CPU can run, slowest first (generic is always there).
std::vector<const Kernels*> available_kernels();

// The table `forced` names (nullptr or "": the best one). std::invalid_argument lists what there is
// when the build or the CPU lacks it.
const Kernels& choose_kernels(const char* forced);

// The table in use: choose_kernels(BICACHE_ISA), decided at the first call.
const Kernels& kernels();

// Whether `isa` (a table's name) runs on this CPU, be it in this build or not.
bool cpu_has(const char* isa);

}  // namespace bicache
