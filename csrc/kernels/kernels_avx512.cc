#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx512 {
namespace {

constexpr const char* kIsa = "avx512";
// Of 32 registers a tile takes 24 for sums, 4 for weights, 1 for an activation.
constexpr int kLanes = 16, kTileRows = 6, kTileVectors = 4;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

Floats load(const bf16* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // (GCC 12 warns of its own unmasked form.)
  return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(0xffff, v) << 16);
}

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::avx512
