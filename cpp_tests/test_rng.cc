#include <cmath>
#include <limits>
#include <set>

#include "base/dtype.h"
#include "base/rng.h"
#include "gtest/gtest.h"

namespace bicache {
namespace {

using Block = std::array<uint32_t, 4>;

// Known answers published with Random123 (kat_vectors, philox4x32 10 rounds).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox(0, {0, 0, 0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~uint64_t{0}, {~0u, ~0u, ~0u, ~0u}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, EveryBitOfKeyAndCounterMatters) {
  const Block base = philox(0, {0, 0, 0, 0});
  for (int bit = 0; bit < 64; ++bit)
    EXPECT_NE(philox(uint64_t{1} << bit, {0, 0, 0, 0}), base) << bit;
  for (int bit = 0; bit < 128; ++bit) {
    Block counter = {};
    counter[static_cast<size_t>(bit / 32)] = 1u << (bit % 32);
    EXPECT_NE(philox(0, counter), base) << bit;
  }
}

TEST(Uniform, LiesInTheUnitIntervalEvenly) {
  constexpr int kCount = 20000, kBins = 10;
  int bins[kBins] = {};
  double sum = 0;
  for (int i = 0; i < kCount; ++i) {
    const double u = uniform(7, Stream::token, 3, 11, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<int>(u * kBins)];
    sum += u;
  }
  // Six standard deviations.
  EXPECT_NEAR(sum / kCount, 0.5, 6 / std::sqrt(12.0 * kCount));
  for (int n : bins) EXPECT_NEAR(n, kCount / kBins, 6 * std::sqrt(kCount / kBins * 0.9));
}

TEST(Uniform, EveryArgumentGivesAnotherNumber) {
  std::set<double> seen;
  int count = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (Stream stream : {Stream::token, Stream::confidence}) {
      for (int64_t step : {0, 1, 2, 1000}) {
        for (int64_t position : {0, 1, 2, 4095}) {
          for (int64_t index : {0, 1, 2, 3, 151935}) {
            seen.insert(uniform(seed, stream, step, position, index));
            ++count;
          }
        }
      }
    }
  }
  EXPECT_EQ(static_cast<int>(seen.size()), count);
}

TEST(Uniform, StreamsAreUncorrelated) {
  constexpr int kCount = 20000;
  double product = 0;
  for (int i = 0; i < kCount; ++i) {
    product += (uniform(1, Stream::token, 0, i, 0) - 0.5) *
               (uniform(1, Stream::confidence, 0, i, 0) - 0.5);
  }
  EXPECT_NEAR(product / kCount * 12, 0, 6 / std::sqrt(kCount));
}

TEST(Uniform, DependsOnNothingElse) {
  const double u = uniform(5, Stream::confidence, 1, 2, 3);
  uniform(6, Stream::token, 9, 9, 9);
  EXPECT_EQ(uniform(5, Stream::confidence, 1, 2, 3), u);
}

float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

TEST(Bf16, WideningIsExact) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const bf16 x{static_cast<uint16_t>(bits)};
    EXPECT_EQ(std::bit_cast<uint32_t>(to_float(x)), bits << 16);
    if (std::isnan(to_float(x))) continue;
    EXPECT_EQ(to_bf16(to_float(x)).bits, bits);
  }
}

TEST(Bf16, RoundsToNearest) {
  EXPECT_EQ(to_bf16(float_of(0x3f807fff)).bits, 0x3f80);
  EXPECT_EQ(to_bf16(float_of(0x3f808001)).bits, 0x3f81);
  EXPECT_EQ(to_bf16(float_of(0xbf807fff)).bits, 0xbf80);
  EXPECT_EQ(to_bf16(float_of(0xbf808001)).bits, 0xbf81);
  EXPECT_EQ(to_bf16(float_of(0x00000001)).bits, 0x0000);  // the smallest subnormal
}

TEST(Bf16, TiesGoToEven) {
  EXPECT_EQ(to_bf16(float_of(0x3f808000)).bits, 0x3f80);
  EXPECT_EQ(to_bf16(float_of(0x3f818000)).bits, 0x3f82);
  EXPECT_EQ(to_bf16(float_of(0xbf808000)).bits, 0xbf80);
  EXPECT_EQ(to_bf16(float_of(0xbf818000)).bits, 0xbf82);
  EXPECT_EQ(to_bf16(float_of(0x3fff8000)).bits, 0x4000);  // carries into the exponent
}

TEST(Bf16, NanAndInfinityStayWhatTheyAre) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_bf16(kInf).bits, 0x7f80);
  EXPECT_EQ(to_bf16(-kInf).bits, 0xff80);
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()).bits, 0x7f80);  // nearer to 2^128
  // Payloads that only the lower half holds, and one that rounding up would carry out of.
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    const bf16 x = to_bf16(float_of(bits));
    EXPECT_TRUE(std::isnan(to_float(x))) << std::hex << bits;
    EXPECT_EQ(x.bits >> 15, bits >> 31);
  }
}

TEST(DType, NamesAndSizes) {
  EXPECT_EQ(size_bytes(DType::f32), 4);
  EXPECT_EQ(size_bytes(DType::bf16), 2);
  EXPECT_EQ(name(DType::f32), "f32");
  EXPECT_EQ(name(DType::bf16), "bf16");
}

}  // namespace
}  // namespace bicache
