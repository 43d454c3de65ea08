#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx512 {
namespace {

constexpr const char* kIsa = "avx512";

#include "kernels/lanes_avx512.h"

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::avx512
