// avx2, and int8 dot products of 4 inputs a lane (VEX-coded VNNI, on CPUs without AVX-512).
#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx_vnni {
namespace {

#include "kernels/lanes_avx2.h"

}  // namespace

#include "kernels/body_vector.h"
//
#include "kernels/body_gemm.h"

namespace {

struct DotInt8 {
  using Scalar = int32_t;
  using Sums = Ints;
  using Weight = int8_t;
  static constexpr int kInputs = 4;
  static __m256i word(const int32_t* p) { return _mm256_set1_epi32(*p); }
  static __m256i load(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Sums dot(__m256i x, __m256i w, Sums sum) {
    return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, x, w);
  }
};

}  // namespace

extern const Product kInt8;
const Product kInt8 = {
    .form = Form::u8_quads, .run = product<DotInt8>, .expand = expand<4>, .speed = 4};

}  // namespace bicache::avx_vnni
