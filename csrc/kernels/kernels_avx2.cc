#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx2 {
namespace {

constexpr const char* kIsa = "avx2";
// Of 16 registers a tile takes 12 for sums, 2 for weights, 1 for an activation.
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

Floats load(const bf16* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)((Words)_mm256_cvtepu16_epi32(v) << 16);
}

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::avx2
