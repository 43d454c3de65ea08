#include "files/ggml_types.h"

#include <cmath>

namespace bicache {
namespace {

// IEEE half precision, little-endian.
float half(const uint8_t* at) {
  const uint32_t bits = at[0] | uint32_t{at[1]} << 8;
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

void widen_f16(const std::byte* from, int64_t blocks, float* out) {
  const auto* at = reinterpret_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < blocks; ++i) out[i] = half(at + 2 * i);
}

// Block formats: f(block, out) for each.
template <int64_t kBlock, int64_t kBytes, class F>
void for_blocks(const std::byte* from, int64_t blocks, float* out, F&& f) {
  const auto* at = reinterpret_cast<const uint8_t*>(from);
  for (int64_t i = 0; i < blocks; ++i) f(at + i * kBytes, out + i * kBlock);
}

constexpr int64_t kSmall = 32, kLarge = 256;  // numbers of a block

// Two bytes of scale, 32 bytes.
void widen_q8_0(const std::byte* from, int64_t blocks, float* out) {
  for_blocks<kSmall, 34>(from, blocks, out, [](const uint8_t* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 32; ++i) y[i] = static_cast<float>(static_cast<int8_t>(b[2 + i])) * d;
  });
}

// Numbers i and i + 16 of a block of 32 share byte i of `nibbles`; their fifth bits are bits i and
// i + 16 of `high`. f(number's place, its bits).
template <class F>
void for_nibbles(const uint8_t* nibbles, uint32_t high, F&& f) {
  for (int i = 0; i < 16; ++i) {
    f(i, (nibbles[i] & 15) | (high >> i & 1) << 4);
    f(i + 16, nibbles[i] >> 4 | (high >> (i + 16) & 1) << 4);
  }
}

uint32_t word(const uint8_t* at) {
  return at[0] | uint32_t{at[1]} << 8 | uint32_t{at[2]} << 16 | uint32_t{at[3]} << 24;
}

// d (q - 2^(bits - 1)): scale, for 5 bits the fifth ones, nibbles.
template <int kBits>
void widen_centred(const std::byte* from, int64_t blocks, float* out) {
  constexpr int kHigh = kBits == 5 ? 4 : 0;
  for_blocks<kSmall, 18 + kHigh>(from, blocks, out, [](const uint8_t* b, float* y) {
    const float d = half(b);
    for_nibbles(b + 2 + kHigh, kHigh > 0 ? word(b + 2) : 0, [&](int i, uint32_t q) {
      y[i] = static_cast<float>(static_cast<int>(q) - (1 << (kBits - 1))) * d;
    });
  });
}

// d q + m: scale, minimum, for 5 bits the fifth ones, nibbles.
template <int kBits>
void widen_from_minimum(const std::byte* from, int64_t blocks, float* out) {
  constexpr int kHigh = kBits == 5 ? 4 : 0;
  for_blocks<kSmall, 20 + kHigh>(from, blocks, out, [](const uint8_t* b, float* y) {
    const float d = half(b), m = half(b + 2);
    for_nibbles(b + 4 + kHigh, kHigh > 0 ? word(b + 4) : 0,
                [&](int i, uint32_t q) { y[i] = static_cast<float>(q) * d + m; });
  });
}

// Scale and minimum, 6 bits each, of the eighth `j` of a large block: 12 bytes hold the low (j < 4)
// or the split ones (j >= 4, whose upper two bits are those the first four leave free).
struct ScaleMinimum {
  float scale, minimum;
  ScaleMinimum(const uint8_t* s, int j) {
    const int low = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    const int high = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
    scale = static_cast<float>(low);
    minimum = static_cast<float>(high);
  }
};

// d scale q - dmin minimum: d, dmin, 12 bytes of scales and minima, for 5 bits 32 bytes of the
// fifth ones (bit j of byte i: number i of eighth j), 128 bytes of nibbles (eighths in pairs).
template <int kBits>
void widen_k(const std::byte* from, int64_t blocks, float* out) {
  constexpr int kHigh = kBits == 5 ? 32 : 0;
  for_blocks<kLarge, 144 + kHigh>(from, blocks, out, [](const uint8_t* b, float* y) {
    const float d = half(b), dmin = half(b + 2);
    for (int j = 0; j < 8; ++j) {
      const ScaleMinimum s(b + 4, j);
      const float scale = d * s.scale, minimum = dmin * s.minimum;
      const uint8_t* nibbles = b + 16 + kHigh + j / 2 * 32;
      for (int i = 0; i < 32; ++i) {
        const int high = kHigh > 0 ? (b[16 + i] >> j & 1) << 4 : 0;
        const int q = (j % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4) | high;
        y[j * 32 + i] = scale * static_cast<float>(q) - minimum;
      }
    }
  });
}

// d scale (q - 32): 128 bytes of nibbles, 64 of upper two bits, 16 int8 scales of 16 numbers each,
// d. Of either half of the block, quarter j of 32 numbers: nibbles of bytes 32 (j % 2) .. (low ones
// for j < 2), upper bits 2 j.
void widen_q6_k(const std::byte* from, int64_t blocks, float* out) {
  for_blocks<kLarge, 210>(from, blocks, out, [](const uint8_t* b, float* y) {
    const float d = half(b + 208);
    for (int at = 0; at < 256; ++at) {
      const int side = at / 128, j = at / 32 % 4, i = at % 32;
      const int nibbles = b[side * 64 + j % 2 * 32 + i];
      const int high = b[128 + side * 32 + i] >> (2 * j) & 3;
      const int q = (j < 2 ? nibbles & 15 : nibbles >> 4) | high << 4;
      const float scale = static_cast<float>(static_cast<int8_t>(b[192 + at / 16]));
      y[at] = d * scale * static_cast<float>(q - 32);
    }
  });
}

// A type we do not read.
constexpr Format sized(const char* name, int64_t block, int64_t block_bytes) {
  return {name, DType::f32, block, block_bytes, nullptr};
}

// Weights in half precision were bfloat16 before they were converted.
constexpr Format kF16 = {"f16", DType::bf16, 1, 2, widen_f16};

struct Type {
  uint32_t id;
  Format format;
};

constexpr Type kTypes[] = {
    {2, {"Q4_0", DType::int8, kSmall, 18, widen_centred<4>}},
    {3, {"Q4_1", DType::int8, kSmall, 20, widen_from_minimum<4>}},
    {6, {"Q5_0", DType::int8, kSmall, 22, widen_centred<5>}},
    {7, {"Q5_1", DType::int8, kSmall, 24, widen_from_minimum<5>}},
    {8, {"Q8_0", DType::int8, kSmall, 34, widen_q8_0}},
    {12, {"Q4_K", DType::int8, kLarge, 144, widen_k<4>}},
    {13, {"Q5_K", DType::int8, kLarge, 176, widen_k<5>}},
    {14, {"Q6_K", DType::int8, kLarge, 210, widen_q6_k}},
    {9, sized("Q8_1", 32, 36)},
    {10, sized("Q2_K", 256, 84)},
    {11, sized("Q3_K", 256, 110)},
    {15, sized("Q8_K", 256, 292)},
    {16, sized("IQ2_XXS", 256, 66)},
    {17, sized("IQ2_XS", 256, 74)},
    {18, sized("IQ3_XXS", 256, 98)},
    {19, sized("IQ1_S", 256, 50)},
    {20, sized("IQ4_NL", 32, 18)},
    {21, sized("IQ3_S", 256, 110)},
    {22, sized("IQ2_S", 256, 82)},
    {23, sized("IQ4_XS", 256, 136)},
    {24, sized("I8", 1, 1)},
    {25, sized("I16", 1, 2)},
    {26, sized("I32", 1, 4)},
    {27, sized("I64", 1, 8)},
    {28, sized("F64", 1, 8)},
    {29, sized("IQ1_M", 256, 56)},
    {34, sized("TQ1_0", 256, 54)},
    {35, sized("TQ2_0", 256, 66)},
    {39, sized("MXFP4", 32, 17)},
    {40, sized("NVFP4", 64, 36)},
    {41, sized("Q1_0", 128, 18)},
    {42, sized("Q2_0", 64, 18)},
};

}  // namespace

const Format* ggml_format(uint32_t id) {
  if (id == 0) return &kStoredF32;
  if (id == 1) return &kF16;
  if (id == 30) return &kStoredBf16;
  for (const Type& type : kTypes) {
    if (type.id == id) return &type.format;
  }
  return nullptr;
}

std::string readable_ggml_types() {
  std::string names = "f32, f16, bf16";
  for (const Type& type : kTypes) {
    if (type.format.widen != nullptr) names += cat(", ", type.format.name);
  }
  return names;
}

}  // namespace bicache
