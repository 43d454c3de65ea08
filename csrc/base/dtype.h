// Element types of weights and caches.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace bicache {

// int8, int4: of matrices only, with scales (kernels/gemm.h).
enum class DType : uint8_t { f32, bf16, int8, int4 };

// Of f32 and bf16.
constexpr int64_t size_bytes(DType t) { return t == DType::f32 ? 4 : 2; }
constexpr std::string_view name(DType t) {
  constexpr std::string_view kNames[] = {"f32", "bf16", "int8", "int4"};
  return kNames[static_cast<size_t>(t)];
}
constexpr bool is_quantised(DType t) { return t == DType::int8 || t == DType::int4; }

// The upper half of a float32.
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
