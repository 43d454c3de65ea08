// For any CPU: vectors of 4, and no fused multiply-add, because the baseline has none.
#include "kernels/kernels.h"

namespace bicache::generic {
namespace {

constexpr const char* kIsa = "generic";
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Sums __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));

Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // two roundings: -ffp-contract=off

Floats larger(Floats a, Floats b) { return a > b ? a : b; }
Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));
HalfDoubles low_doubles(Floats v) { return HalfDoubles{v[0], v[1]}; }
HalfDoubles high_doubles(Floats v) { return HalfDoubles{v[2], v[3]}; }

void stream(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
void drain() {}

Floats widen(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  Halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

// Bytes, each in 32 or in 16 bits.
Words quads(const uint8_t* p) { return Words{p[0], p[1], p[2], p[3]}; }

Words pairs(const uint8_t* p) {
  const Words even = {p[0], p[2], p[4], p[6]}, odd = {p[1], p[3], p[5], p[7]};
  return even | odd << 16;
}

struct DotInt8Wide {
  using Scalar = int32_t;
  using Sums = generic::Sums;
  using Weight = int8_t;
  static constexpr int kInputs = 2;
  struct Pair {
    Shorts first, second;
  };
  static Pair word(const int32_t* p) {
    int16_t x[2];
    __builtin_memcpy(x, p, sizeof x);
    return {x[0] - Shorts{}, x[1] - Shorts{}};
  }
  static Pair load(const int8_t* p) {
    Shorts w;
    __builtin_memcpy(&w, p, sizeof w);
    return {static_cast<Shorts>(w << 8) >> 8, w >> 8};
  }
  static Sums dot(const Pair& x, const Pair& w, Sums sum) {  // at most 2 * 127 * 128: fits int16
    return sum + __builtin_convertvector(x.first * w.first + x.second * w.second, Sums);
  }
};

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::generic
