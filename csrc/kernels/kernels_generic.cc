// For any CPU: vectors of 4, and no fused multiply-add, because the baseline has none.
#include "kernels/kernels.h"

namespace bicache::generic {
namespace {

constexpr const char* kIsa = "generic";
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // two roundings: -ffp-contract=off

Floats load(const bf16* p) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  Halves v;
  __builtin_memcpy(&v, p, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::generic
