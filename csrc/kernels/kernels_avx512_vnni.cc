// avx512, and int8 dot products of 4 inputs a lane.
#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx512_vnni {
namespace {

#include "kernels/lanes_avx512.h"

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
  static __m512i word(const int32_t* p) { return _mm512_set1_epi32(*p); }
  static __m512i load(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Sums dot(__m512i x, __m512i w, Sums sum) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sum, x, w);
  }
};

}  // namespace

extern const Product kInt8;
const Product kInt8 = {
    .form = Form::u8_quads, .run = product<DotInt8>, .expand = expand<4>, .speed = 4};

}  // namespace bicache::avx512_vnni
