// AMX: eight tile registers of 16 rows of 64 bytes. GCC 12's own intrinsics tell the compiler
// nothing of the memory they touch (stores before a load may be moved behind it), so these do.
#pragma once

#include <cstdint>

namespace bicache::amx {
namespace {

// Configures the tiles of this thread; they are released where it ends, so that switching threads
// stays cheap.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config kConfig;
    __asm__ volatile("ldtilecfg %0" ::"m"(kConfig));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { __asm__ volatile("tilerelease"); }
};

// Tile t = 16 rows of 64 bytes at p + row * stride (bytes).
template <int t>
inline void load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}

// The same, past the L1 cache: what is there stays.
template <int t>
inline void load_past(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}

template <int t>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
}

// Tile c (float) += a [16, 16 pairs] . b [16 pairs, 16]; subnormal numbers count as 0.
template <int c, int a, int b>
inline void dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Tile c (int32) += a [16, 16 quads of uint8] . b [16 quads of int8, 16].
template <int c, int a, int b>
inline void dot_u8s8() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
}  // namespace bicache::amx
