#include "kernels/quantize.h"

#include <algorithm>
#include <cmath>

namespace bicache {
namespace {

constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, ties to even

float rounded(float x) { return (x + kRound) - kRound; }

float largest(const float* w, int64_t n) {
  float most = 0;
  for (int64_t k = 0; k < n; ++k) most = std::max(most, std::abs(w[k]));
  return most;
}

// Sets the scale and returns its inverse; 0 where all weights are as good as 0.
float set_scale(const float* w, int64_t n, QuantisedChannel& out) {
  const float most = largest(w, n), inverse = most > 0 ? 127 / most : 0;
  const bool usable = inverse > 0 && inverse <= 0x1p120f;
  out.scale = usable ? most / 127 : 0;
  out.sum = 0;
  return usable ? inverse : 0;
}

// q = round((y + z) / m), clamped; the sum of squares of m q - z - y.
float try_group(const float* y, float m, float z, float* q) {
  const float r = 1 / m;
  float sum = 0;
  for (int64_t i = 0; i < kInt4Group; ++i) {
    q[i] = std::clamp(rounded((y[i] + z) * r), 0.0f, 15.0f);
    const float off = (m * q[i] - z) - y[i];
    sum += off * off;
  }
  return sum;
}

// y: whole sixteenths in [-127, 127]; a short group repeats its last value.
void best_group(const float* y, uint8_t& m_out, int8_t& z_out, uint8_t* q_out) {
  const auto [lo, hi] = std::minmax_element(y, y + kInt4Group);
  const float top = std::min(16.0f, std::ceil((*hi - *lo) * (1.0f / 15)));
  float least = INFINITY;
  for (const float m : {std::max(top, 1.0f), std::max(top - 1, 1.0f)}) {
    for (const float middle : {7.5f, 7.3f, 7.7f, 7.1f, 7.9f}) {  // of q: where the group's is put
      const float centred = rounded(middle * m - (*lo + *hi) * 0.5f);
      const float z = std::min(std::max(centred, 15 * m - 127), 127.0f);
      float q[kInt4Group];
      const float error = try_group(y, m, z, q);
      if (!(error < least)) continue;
      least = error;
      m_out = static_cast<uint8_t>(m);
      z_out = static_cast<int8_t>(z);
      for (int64_t i = 0; i < kInt4Group; ++i) q_out[i] = static_cast<uint8_t>(q[i]);
    }
  }
}

}  // namespace

QuantisedChannel::QuantisedChannel(int64_t padded_inputs, bool int4)
    : q(static_cast<size_t>(padded_inputs)),
      m(static_cast<size_t>(int4 ? padded_inputs / kInt4Group : 0)),
      z(m.size()) {}

void quantize_int8(const float* w, int64_t inputs, QuantisedChannel& out) {
  const float inverse = set_scale(w, inputs, out);
  std::fill(out.q.begin(), out.q.end(), uint8_t{0});
  for (int64_t k = 0; k < inputs && inverse > 0; ++k) {
    const auto q = static_cast<int32_t>(rounded(w[k] * inverse));
    out.q[k] = static_cast<uint8_t>(q);
    out.sum += q;
  }
}

void quantize_int4(const float* w, int64_t inputs, QuantisedChannel& out) {
  const float inverse = set_scale(w, inputs, out);
  std::fill(out.m.begin(), out.m.end(), uint8_t{0});
  std::fill(out.z.begin(), out.z.end(), int8_t{0});
  std::fill(out.q.begin(), out.q.end(), uint8_t{0});
  if (inverse == 0) return;
  for (int64_t begin = 0, g = 0; begin < inputs; begin += kInt4Group, ++g) {
    float y[kInt4Group];
    for (int64_t i = 0; i < kInt4Group; ++i)
      y[i] = rounded(w[std::min(begin + i, inputs - 1)] * inverse * 16) * 0.0625f;
    best_group(y, out.m[g], out.z[g], &out.q[begin]);
    for (int64_t i = 0; i < kInt4Group; ++i) out.sum += out.m[g] * out.q[begin + i] - out.z[g];
  }
}

}  // namespace bicache
