// Naive twins of the kernels, in double, and how far from them float32 may be: error bounds of the
// arithmetic (unit roundoff times additions times the sum of magnitudes), not measured margins.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/kernels.h"

namespace bicache::oracle {

constexpr double kUnit = 0x1p-24;  // half an ulp of 1

struct Value {
  double value, tolerance;
};

// sum_k a[k] b[k], with products rounded or not.
inline Value dot(const float* a, const float* b, int64_t n) {
  double sum = 0, magnitude = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double product = static_cast<double>(a[k]) * static_cast<double>(b[k]);
    sum += product;
    magnitude += std::abs(product);
  }
  return {sum, magnitude * static_cast<double>(n + 1) * kUnit};
}

// A row of activations as int8, with scale = max|x| / 127.
struct Quantised {
  float scale = 0;
  std::vector<int64_t> q;
};

inline Quantised quantize(const float* x, int64_t n) {
  Quantised row;
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  row.scale = most / 127;
  const float inverse = 127 / most;
  for (int64_t i = 0; i < n; ++i)
    row.q.push_back(most > 0 ? static_cast<int64_t>(std::nearbyint(x[i] * inverse)) : 0);
  return row;
}

// a [R, K], w [N, K]: [R, N].
inline std::vector<Value> gemm(const std::vector<float>& a, const std::vector<float>& w,
                               int64_t rows, int64_t inputs, int64_t outputs) {
  std::vector<Value> c;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < outputs; ++j) c.push_back(dot(&a[r * inputs], &w[j * inputs], inputs));
  }
  return c;
}

inline std::vector<double> rms_norm(const std::vector<float>& x, const std::vector<float>& weight,
                                    float eps) {
  double squares = 0;
  for (float v : x) squares += static_cast<double>(v) * v;
  const double rms = std::sqrt(squares / static_cast<double>(x.size()) + eps);
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(static_cast<double>(weight[i]) * x[i] / rms);
  return y;
}

inline std::vector<Value> rope(const std::vector<float>& x, const std::vector<float>& cos,
                               const std::vector<float>& sin) {
  const size_t half = x.size() / 2;
  std::vector<Value> y(x.size());
  for (size_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[half + i], c = cos[i], s = sin[i];
    y[i] = {a * c - b * s, (std::abs(a * c) + std::abs(b * s)) * 2 * kUnit};
    y[half + i] = {a * s + b * c, (std::abs(a * s) + std::abs(b * c)) * 2 * kUnit};
  }
  return y;
}

inline double silu_mul(double gate, double up) { return gate / (1 + std::exp(-gate)) * up; }

struct Stats {
  int64_t argmax = 0;
  double max = -std::numeric_limits<double>::infinity(), sum_exp = 0;
};

inline Stats row_stats(const std::vector<float>& x) {
  Stats s;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] > s.max) s = {static_cast<int64_t>(i), x[i], 0};
  }
  for (float v : x) s.sum_exp += std::exp(v - s.max);
  return s;
}

// One query row of one head: q [D], k and v by key row [N] -> [D]. `rounded`: weights are rounded
// to bfloat16, above and below the line.
inline std::vector<Value> attention(const float* q, const std::vector<const float*>& k,
                                    const std::vector<const float*>& v, int64_t head_dim,
                                    bool rounded) {
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  std::vector<double> p;
  double score_error = 0, max = -std::numeric_limits<double>::infinity(), sum = 0, largest = 0;
  for (const float* key : k) {
    const Value score = dot(q, key, head_dim);
    p.push_back(score.value * scale);
    max = std::max(max, p.back());
    score_error = std::max(score_error, score.tolerance * scale + 2 * kUnit * std::abs(p.back()));
  }
  for (double& x : p) sum += x = std::exp(x - max);
  std::vector<Value> out(static_cast<size_t>(head_dim), {0, 0});
  for (size_t j = 0; j < v.size(); ++j) {
    for (int64_t d = 0; d < head_dim; ++d) {
      out[d].value += p[j] * v[j][d] / sum;
      largest = std::max(largest, std::abs(static_cast<double>(v[j][d])));
    }
  }
  // Errors of scores act as factors on weights, above and below the line; so do those of the sums.
  const double steps = static_cast<double>(k.size() + 16);
  for (Value& x : out) x.tolerance = largest * (4 * score_error + 2 * steps * kUnit);
  // The factors of rounding (and of an exp that is made for it) are the same above and below: they
  // count as far as values differ from their mean.
  const double unit = 0x1p-8 + 0x1p-17;
  for (size_t j = 0; j < v.size() && rounded; ++j) {
    for (int64_t d = 0; d < head_dim; ++d)
      out[d].tolerance += unit / (1 - unit) * p[j] / sum * std::abs(v[j][d] - out[d].value);
  }
  return out;
}

}  // namespace bicache::oracle
