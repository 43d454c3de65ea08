// A 64-bit hash of bytes: fast and well mixed, not cryptographic.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

namespace bicache {

// Spreads every bit of x over all 64 (Stafford's variant 13 of MurmurHash3's finaliser).
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline uint64_t hash_bytes(std::span<const std::byte> bytes, uint64_t seed = 0) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
  // Four lanes, so that the multiplications overlap.
  uint64_t lane[4] = {seed, seed + kOdd, seed + 2 * kOdd, seed + 3 * kOdd};
  const std::byte* at = bytes.data();
  size_t left = bytes.size();
  const auto take = [&](uint64_t& h, size_t count) {
    uint64_t word = 0;
    std::memcpy(&word, at, count);
    h = (h ^ word) * kOdd;
    h ^= h >> 29;
    at += count;
    left -= count;
  };
  while (left >= 32) {
    for (uint64_t& h : lane) take(h, 8);
  }
  for (size_t i = 0; left > 0; ++i) take(lane[i], left < 8 ? left : 8);
  uint64_t all = mix(bytes.size() + seed);
  for (const uint64_t h : lane) all = mix(all ^ h) * kOdd;
  return mix(all);
}

}  // namespace bicache
