// What the kernel tests share: reproducible numbers, comparison by bits, memory that notices stray
// writes.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "gtest/gtest.h"
#include "kernels/kernels.h"

namespace bicache {

// Sanitizers watch accesses, not values, and are slow: under them loops over sizes and threads are
// `thinned`, and some tests run on fewer tables (`tables_under_test`).
#ifdef __SANITIZE_THREAD__
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif
#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = kThreadSanitizer;
#endif

// The list itself; under a sanitizer every `step`-th of it, from the first on. Of successive sizes,
// a step prime to the widths of vectors still meets every remainder.
template <class T>
std::vector<T> thinned(const std::vector<T>& list, size_t step = 3) {
  std::vector<T> kept;
  for (size_t i = 0; i < list.size(); i += kSanitized ? step : 1) kept.push_back(list[i]);
  return kept;
}

// Sizes around the widths of vectors, tiles and blocks.
inline const std::vector<int64_t> kSizes =
    thinned<int64_t>({1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 130}, 2);

// 1..last, thinned.
inline std::vector<int64_t> up_to(int64_t last, size_t step = 7) {
  std::vector<int64_t> all;
  for (int64_t n = 1; n <= last; ++n) all.push_back(n);
  return thinned(all, step);
}

// All tables; with `few`, the last one and one without tiles. Races do not depend on the
// instructions but on how products are cut, for which those two stand.
inline std::vector<const Kernels*> tables_under_test(bool few = kThreadSanitizer) {
  const auto all = available_kernels();
  if (!few || all.size() <= 2) return all;
  return {all[1], all.back()};
}

// n numbers of U(-1, 1) * scale.
inline std::vector<float> random_floats(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 bits(seed);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = (static_cast<float>(bits() >> 8) * 0x1p-23f - 1) * scale;
  return x;
}

inline std::vector<bf16> to_bf16(const std::vector<float>& x) {
  std::vector<bf16> y;
  for (float v : x) y.push_back(to_bf16(v));
  return y;
}

inline std::vector<float> to_float(const std::vector<bf16>& x) {
  std::vector<float> y;
  for (bf16 v : x) y.push_back(to_float(v));
  return y;
}

inline bool same_bits(const float* a, const float* b, int64_t n) {
  return n == 0 || std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), static_cast<int64_t>(a.size()));
}

// A [rows, cols] matrix whose rows lie `gap` apart, with a guard before, between and behind them.
class Guarded {
 public:
  explicit Guarded(int64_t cols, int64_t rows = 1, int64_t gap = 0)
      : rows_(rows), cols_(cols), stride_(cols + gap) {
    memory_.resize(static_cast<size_t>(kGuard + rows * stride_ + kGuard));
    for (size_t i = 0; i < memory_.size(); ++i) memory_[i] = guard(i);
  }
  Guarded(const std::vector<float>& values) : Guarded(static_cast<int64_t>(values.size())) {
    std::memcpy(data(), values.data(), values.size() * sizeof(float));
  }

  float* data() { return memory_.data() + kGuard; }
  float* row(int64_t r) { return data() + r * stride_; }
  int64_t stride() const { return stride_; }
  std::vector<float> values() {
    std::vector<float> v;
    for (int64_t r = 0; r < rows_; ++r) v.insert(v.end(), row(r), row(r) + cols_);
    return v;
  }

  // Whether nothing outside the matrix was written.
  bool intact() const {
    for (size_t i = 0; i < memory_.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) - kGuard;
      const bool inside = at >= 0 && at < rows_ * stride_ && at % stride_ < cols_;
      const float expected = guard(i);
      if (!inside && !same_bits(&memory_[i], &expected, 1)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 80;  // more than a panel
  static float guard(size_t i) { return -1e30f - static_cast<float>(i) * 1e24f; }

  int64_t rows_, cols_, stride_;
  std::vector<float> memory_;
};

inline std::string isa_name(const testing::TestParamInfo<const Kernels*>& info) {
  return info.param->isa;
}

}  // namespace bicache
