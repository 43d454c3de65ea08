// The element-wise kernels, the reductions and the choice of the table; exp through what uses it.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "base/check.h"
#include "kernels/attention.h"
#include "kernels/kernels.h"
#include "oracle.h"
#include "support.h"

namespace bicache {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The distance of float32 numbers around x.
double ulp(double x) { return std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23); }

class KernelsTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& table = *GetParam();

  // e^-t as the table computes it: the second weight of a softmax over the scores {0, -t}, undone.
  double exp_of_minus(float t) const {
    const float q[1] = {1}, k0[1] = {0}, k1[1] = {-t}, v0[1] = {0}, v1[1] = {1};
    const void* const keys[] = {k0, k1};
    const void* const values[] = {v0, v1};
    float out[1] = {0};
    const AttentionJob job = {q, out, 1, keys, values, 2, nullptr};
    attention(table, {&job, 1}, 1, 1, 1, DType::f32, 1);
    return out[0] / (1 - static_cast<double>(out[0]));
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, KernelsTest, testing::ValuesIn(tables_under_test()), isa_name);

TEST_P(KernelsTest, RmsNormEqualsTwin) {
  for (int64_t n : kSizes) {
    for (float scale : {1e-3f, 1.0f, 1e3f}) {
      const auto x = random_floats(n, 1, scale), weight = random_floats(n, 2);
      Guarded y(n);
      table.rms_norm(x.data(), weight.data(), 1e-6f, n, y.data());
      EXPECT_TRUE(y.intact());
      const auto expected = oracle::rms_norm(x, weight, 1e-6f);
      const double tolerance = static_cast<double>(8 + n / 8) * oracle::kUnit;
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_NEAR(y.data()[i], expected[i], std::abs(expected[i]) * tolerance) << n << " " << i;
      }
      auto in_place = x;
      table.rms_norm(in_place.data(), weight.data(), 1e-6f, n, in_place.data());
      EXPECT_TRUE(same_bits(in_place, y.values()));
    }
  }
}

TEST_P(KernelsTest, RmsNormOfZerosIsZero) {
  std::vector<float> x(37, 0.0f), weight(37, 2.0f);
  table.rms_norm(x.data(), weight.data(), 1e-6f, 37, x.data());
  for (float v : x) EXPECT_EQ(v, 0.0f);
}

TEST_P(KernelsTest, RopeEqualsTwin) {
  for (int64_t dim : {2, 4, 6, 8, 20, 32, 34, 64, 80, 128}) {
    const auto x = random_floats(dim, 3);
    std::vector<float> cos, sin;
    for (float angle : random_floats(dim / 2, 4, 3)) {
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    Guarded y(x);
    table.rope(y.data(), cos.data(), sin.data(), dim);
    EXPECT_TRUE(y.intact());
    const auto expected = oracle::rope(x, cos, sin);
    for (int64_t i = 0; i < dim; ++i) {
      EXPECT_NEAR(y.data()[i], expected[i].value, expected[i].tolerance) << dim << " " << i;
    }
  }
}

TEST_P(KernelsTest, RopeOfAQuarterTurnSwapsTheHalves) {
  std::vector<float> x = {1, 2, 3, 4, 5, 6}, cos(3, 0.0f), sin(3, 1.0f);
  table.rope(x.data(), cos.data(), sin.data(), 6);
  EXPECT_EQ(x, (std::vector<float>{-4, -5, -6, 1, 2, 3}));
}

TEST_P(KernelsTest, SiluMulEqualsTwin) {
  for (int64_t n : kSizes) {
    for (float scale : {1.0f, 30.0f, 80.0f}) {
      const auto gate = random_floats(n, 5, scale), up = random_floats(n, 6);
      Guarded y(gate);
      table.silu_mul(y.data(), up.data(), n);
      EXPECT_TRUE(y.intact());
      for (int64_t i = 0; i < n; ++i) {
        const double expected = oracle::silu_mul(gate[i], up[i]);
        EXPECT_NEAR(y.data()[i], expected, std::abs(expected) * 8 * oracle::kUnit) << gate[i];
      }
    }
  }
}

TEST_P(KernelsTest, SiluMulAtTheEnds) {
  std::vector<float> x = {0.0f, 200.0f, -200.0f, kInf, kNan, -0.0f};
  const std::vector<float> up(x.size(), 1.0f);
  table.silu_mul(x.data(), up.data(), static_cast<int64_t>(x.size()));
  EXPECT_EQ(x[0], 0.0f);
  EXPECT_EQ(x[1], 200.0f);
  EXPECT_EQ(x[2], 0.0f);
  EXPECT_EQ(x[3], kInf);
  EXPECT_TRUE(std::isnan(x[4]));
  EXPECT_EQ(x[5], 0.0f);
}

TEST_P(KernelsTest, AddIsExact) {
  for (int64_t n : kSizes) {
    const auto x = random_floats(n, 7), y = random_floats(n, 8);
    Guarded sum(x);
    table.add(sum.data(), y.data(), n);
    EXPECT_TRUE(sum.intact());
    for (int64_t i = 0; i < n; ++i) EXPECT_EQ(sum.data()[i], x[i] + y[i]);
  }
}

TEST_P(KernelsTest, DotEqualsTwin) {
  for (int64_t n : kSizes) {
    const auto a = random_floats(n, 9), b = random_floats(n, 10);
    const oracle::Value expected = oracle::dot(a.data(), b.data(), n);
    EXPECT_NEAR(table.dot(a.data(), b.data(), n), expected.value, expected.tolerance) << n;
    // of bf16: the same sum of the values they hold, bit for bit
    const auto half_a = to_bf16(a), half_b = to_bf16(b);
    const auto wide_a = to_float(half_a), wide_b = to_float(half_b);
    const float half = table.dot_bf16(half_a.data(), half_b.data(), n);
    const float wide = table.dot(wide_a.data(), wide_b.data(), n);
    EXPECT_TRUE(same_bits(&half, &wide, 1)) << n;
  }
  EXPECT_EQ(table.dot(nullptr, nullptr, 0), 0.0f);
  EXPECT_EQ(table.dot_bf16(nullptr, nullptr, 0), 0.0f);
}

// Every upper half with lower halves on both sides of a tie; NaNs and infinities are among them.
TEST_P(KernelsTest, RoundsToNearestEven) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 1u << 16; ++high) {
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      x.push_back(std::bit_cast<float>(high << 16 | low));
  }
  const auto n = static_cast<int64_t>(x.size());
  std::vector<uint16_t> halves(x.size());
  std::vector<float> floats(x.size());
  table.round_to_halves(x.data(), n, halves.data());
  table.round_to_floats(x.data(), n, floats.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const bf16 expected = to_bf16(x[i]);
    ASSERT_EQ(halves[i], expected.bits) << x[i];
    ASSERT_EQ(std::bit_cast<uint32_t>(floats[i]), uint32_t{expected.bits} << 16) << x[i];
  }
}

TEST_P(KernelsTest, RoundingWritesNothingElse) {
  for (int64_t n : kSizes) {
    const auto x = random_floats(n, 30);
    std::vector<uint16_t> halves(static_cast<size_t>(n) + 64, 0x1234);
    Guarded floats(n);
    table.round_to_halves(x.data(), n, halves.data());
    table.round_to_floats(x.data(), n, floats.data());
    EXPECT_TRUE(floats.intact());
    for (int64_t i = 0; i < n + 64; ++i)
      ASSERT_EQ(halves[i], i < n ? to_bf16(x[i]).bits : 0x1234) << n << " " << i;
  }
}

TEST_P(KernelsTest, AnElementsBitsDoNotDependOnItsPlace) {
  constexpr int64_t kCount = 100;
  const auto x = random_floats(kCount, 11, 20), y = random_floats(kCount, 12, 3);
  for (auto kernel : {table.silu_mul, table.add}) {
    auto whole = x;
    kernel(whole.data(), y.data(), kCount);
    for (int64_t begin = 0; begin < kCount; ++begin) {
      for (int64_t n : {1, 2, 7, 16, 33}) {
        if (begin + n > kCount) continue;
        std::vector<float> part(x.begin() + begin, x.begin() + begin + n);
        kernel(part.data(), y.data() + begin, n);
        ASSERT_TRUE(same_bits(part.data(), whole.data() + begin, n)) << begin << " " << n;
      }
    }
  }
  const auto cos = random_floats(kCount / 2, 13), sin = random_floats(kCount / 2, 14);
  auto whole = x;
  table.rope(whole.data(), cos.data(), sin.data(), kCount);
  for (int64_t i = 0; i < kCount / 2; ++i) {
    float pair[2] = {x[i], x[i + kCount / 2]};
    table.rope(pair, &cos[i], &sin[i], 2);
    EXPECT_TRUE(same_bits(pair, &whole[i], 1) && same_bits(pair + 1, &whole[i + kCount / 2], 1))
        << i;
  }
}

TEST_P(KernelsTest, ReductionsDoNotDependOnTheAddress) {
  constexpr int64_t kCount = 101;
  const auto x = random_floats(kCount, 15), weight = random_floats(kCount, 16);
  std::vector<float> expected(kCount), y(kCount), moved(kCount + 16);
  const float dot = table.dot(x.data(), weight.data(), kCount);
  const double sum = table.row_stats(x.data(), kCount).sum_exp;
  table.rms_norm(x.data(), weight.data(), 1e-5f, kCount, expected.data());
  for (int64_t shift = 0; shift < 16; ++shift) {
    std::copy(x.begin(), x.end(), moved.begin() + shift);
    const float* at = moved.data() + shift;
    const float again = table.dot(at, weight.data(), kCount);
    EXPECT_TRUE(same_bits(&again, &dot, 1));
    EXPECT_EQ(table.row_stats(at, kCount).sum_exp, sum);
    table.rms_norm(at, weight.data(), 1e-5f, kCount, y.data());
    EXPECT_TRUE(same_bits(y, expected));
  }
}

TEST_P(KernelsTest, RowStatsEqualTwin) {
  for (int64_t n : kSizes) {
    for (float scale : {0.1f, 10.0f, 90.0f}) {
      auto x = random_floats(n, static_cast<uint32_t>(n), scale);
      if (n > 4) x[static_cast<size_t>(n / 3)] = -kInf;
      const RowStats stats = table.row_stats(x.data(), n);
      const oracle::Stats expected = oracle::row_stats(x);
      EXPECT_EQ(stats.argmax, expected.argmax);
      EXPECT_EQ(stats.max, expected.max);
      // x - max is rounded: a factor of up to 1 + |x - max| units.
      EXPECT_NEAR(stats.sum_exp, expected.sum_exp,
                  expected.sum_exp * (4 + 2 * scale) * oracle::kUnit);
    }
  }
}

TEST_P(KernelsTest, RowStatsTiesGoToTheLowestIndex) {
  for (int64_t first = 0; first < 70; ++first) {
    std::vector<float> x(70, -3.0f);
    for (size_t i = static_cast<size_t>(first); i < x.size(); i += 5) x[i] = 2.5f;
    EXPECT_EQ(table.row_stats(x.data(), 70).argmax, first);
  }
  const std::vector<float> equal(100, 0.25f);
  const RowStats stats = table.row_stats(equal.data(), 100);
  EXPECT_EQ(stats.argmax, 0);
  EXPECT_EQ(stats.sum_exp, 100.0);
}

TEST_P(KernelsTest, RowStatsOfBadLogits) {
  for (int64_t n : kSizes) {
    std::vector<float> x(static_cast<size_t>(n), -kInf);
    RowStats stats = table.row_stats(x.data(), n);
    EXPECT_EQ(stats.argmax, 0);
    EXPECT_EQ(stats.max, -kInf);
    EXPECT_TRUE(std::isnan(stats.sum_exp));

    x.back() = 1.0f;
    stats = table.row_stats(x.data(), n);
    EXPECT_EQ(stats.argmax, n - 1);
    EXPECT_EQ(stats.sum_exp, 1.0);

    x.back() = kInf;
    stats = table.row_stats(x.data(), n);
    EXPECT_EQ(stats.max, kInf);
    EXPECT_TRUE(std::isnan(stats.sum_exp));

    for (int64_t at : {int64_t{0}, n / 2, n - 1}) {
      auto y = random_floats(n, 17);
      y.back() = y[static_cast<size_t>(at)] = kNan;
      stats = table.row_stats(y.data(), n);
      EXPECT_EQ(stats.argmax, at);
      EXPECT_TRUE(std::isnan(stats.max));
      EXPECT_TRUE(std::isnan(stats.sum_exp));
    }
  }
}

TEST_P(KernelsTest, ExpOfNegativeNumbers) {
  EXPECT_EQ(exp_of_minus(kInf), 0.0);
  EXPECT_EQ(exp_of_minus(200.0f), 0.0);
  for (int i = 0; i < 20000; ++i) {
    const float t = 5 + static_cast<float>(i) * 0.005f;  // below 5 the undoing costs accuracy
    const double expected = std::exp(-static_cast<double>(t));
    EXPECT_NEAR(exp_of_minus(t), expected, 3 * ulp(expected)) << t;  // 2 of exp, 1 of sum, quotient
  }
}

TEST_P(KernelsTest, ExpThroughSilu) {
  // silu(x) / x = 1 / (1 + e^-x).
  std::vector<float> x, y;
  for (int i = 1; i <= 40000; ++i) x.push_back((static_cast<float>(i) - 20000.5f) * 0.0043f);
  y = x;
  const std::vector<float> up(x.size(), 1.0f);
  table.silu_mul(y.data(), up.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = oracle::silu_mul(x[i], 1);
    EXPECT_NEAR(y[i], expected, 3 * ulp(expected)) << x[i];  // 2 of exp, 1 of sum and quotient
  }
}

TEST(ChooseKernels, ListsTheTablesSlowestFirst) {
  const auto tables = available_kernels();
  ASSERT_FALSE(tables.empty());
  EXPECT_STREQ(tables.front()->isa, "generic");
  for (const Kernels* k : tables) {
    EXPECT_TRUE(cpu_has(k->isa));
    EXPECT_GT(k->panel, 0);
    EXPECT_LE(k->panel, kMaxPanel);
    EXPECT_EQ(&choose_kernels(k->isa), k);
  }
  EXPECT_EQ(&choose_kernels(nullptr), tables.back());
  EXPECT_EQ(&choose_kernels(""), tables.back());
  EXPECT_EQ(&kernels(), &choose_kernels(std::getenv("BICACHE_ISA")));
}

TEST(ChooseKernels, SaysWhatThereIs) {
  EXPECT_FALSE(cpu_has("sse9"));
  for (const char* isa : {"sse9", "avx2", "avx512", "AVX2", "generic "}) {
    bool available = false;
    for (const Kernels* k : available_kernels()) available |= std::string(k->isa) == isa;
    if (available) continue;
    try {
      choose_kernels(isa);
      ADD_FAILURE() << isa << " was accepted";
    } catch (const std::invalid_argument& e) {
      const std::string what = e.what();
      EXPECT_NE(what.find(cat("got ", isa)), std::string::npos) << what;
      EXPECT_EQ(what.find("[kernels] BICACHE_ISA: expected one of generic"), 0u) << what;
      const char* reason = std::string(isa).find("avx") != 0 ? "no such"
                           : cpu_has(isa)                    ? "build"
                                                             : "CPU";
      EXPECT_NE(what.find(reason), std::string::npos) << what;
    }
  }
}

}  // namespace
}  // namespace bicache
