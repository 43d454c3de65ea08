#include <immintrin.h>

#include "kernels/kernels.h"

namespace bicache::avx2 {
namespace {

constexpr const char* kIsa = "avx2";

#include "kernels/lanes_avx2.h"

}  // namespace

#include "kernels/kernels_body.h"

}  // namespace bicache::avx2
