// Weights of one output channel as small integers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace bicache {

// w = scale * value, where value = q (int8), or m * q - z (int4; m in 1..16, q in 0..15).
struct QuantisedChannel {
  float scale = 0;         // 0: every value is 0
  int32_t sum = 0;         // of all values, those of padding included
  std::vector<uint8_t> q;  // [padded inputs]; int8: as bytes
  std::vector<uint8_t> m;  // [padded inputs / kInt4Group]
  std::vector<int8_t> z;

  QuantisedChannel(int64_t padded_inputs, bool int4);
};

// scale = max|w| / 127, q = round(w * (127 / max|w|)), ties to even.
void quantize_int8(const float* w, int64_t inputs, QuantisedChannel& out);

// The same scale; m and z of each group by a search for the least squared error among ten. The
// errors are whole multiples of 2^-8 that float32 holds exactly, so the order of summation does not
// matter and every build finds the same. `inputs` of padding take m = z = q = 0 or what their group
// has.
void quantize_int4(const float* w, int64_t inputs, QuantisedChannel& out);

}  // namespace bicache
