// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011). A value depends on (seed, step,
// position, index) and on nothing else, so sampling does not depend on batch, threads or order.
#pragma once

#include <array>
#include <cstdint>

namespace bicache {

inline std::array<uint32_t, 4> philox(uint64_t key, std::array<uint32_t, 4> counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// What a random number is for; different streams of one (seed, step, position) are independent.
enum class Stream : uint32_t { token, confidence };

// U[0, 1), 53 bits.
inline double uniform(uint64_t seed, Stream stream, int64_t step, int64_t position, int64_t index) {
  const auto x = philox(seed, {static_cast<uint32_t>(index >> 1), static_cast<uint32_t>(position),
                               static_cast<uint32_t>(step), static_cast<uint32_t>(stream)});
  const int half = static_cast<int>(index & 1) * 2;
  const uint64_t bits = (uint64_t{x[half]} << 32) | x[half + 1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace bicache
