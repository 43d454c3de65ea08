// Element types of stored weights.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace bicache {

enum class DType : uint8_t { f32, bf16 };

constexpr int64_t size_bytes(DType t) { return t == DType::f32 ? 4 : 2; }
constexpr std::string_view name(DType t) { return t == DType::f32 ? "f32" : "bf16"; }

// The upper half of a float32; weights only, arithmetic is in float32.
struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

}  // namespace bicache
