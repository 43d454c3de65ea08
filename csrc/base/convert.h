// Values of one floating-point type as another.
#pragma once

#include <cstring>

#include "base/check.h"
#include "base/dtype.h"

namespace bicache {

// y = x, [n] each and apart; float32 becomes bf16 by rounding to nearest, ties to even.
inline void convert(const void* x, DType from, int64_t n, void* y, DType to) {
  if (from == to) {
    std::memcpy(y, x, static_cast<size_t>(n * size_bytes(to)));
    return;
  }
  internal_check(from == DType::f32 ? to == DType::bf16 : from == DType::bf16 && to == DType::f32,
                 "[convert] types: expected f32 and bf16, got ", name(from), " and ", name(to));
  if (to == DType::bf16) {
    const auto* wide = static_cast<const float*>(x);
    auto* half = static_cast<bf16*>(y);
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(wide[i]);
  } else {
    const auto* half = static_cast<const bf16*>(x);
    auto* wide = static_cast<float*>(y);
    for (int64_t i = 0; i < n; ++i) wide[i] = to_float(half[i]);
  }
}

}  // namespace bicache
