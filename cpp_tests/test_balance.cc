// Outliers moved from activations into weights: which channels, by how much, and that the function
// stays what it was.
#include <cmath>

#include "kernels/gemm.h"
#include "model/balance.h"
#include "support.h"

namespace bicache {
namespace {

constexpr int64_t kDim = 64, kFfn = 96, kVocab = 80;

// A model of one layer; its matrices may be changed before they are balanced.
struct Stored {
  std::vector<float> embedding = random_floats(kVocab * kDim, 1),
                     head = random_floats(kVocab * kDim, 2), q = random_floats(kDim * kDim, 3),
                     k = random_floats(kDim * kDim, 4), v = random_floats(kDim * kDim, 5),
                     out = random_floats(kDim * kDim, 6), gate = random_floats(kFfn * kDim, 7),
                     up = random_floats(kFfn * kDim, 8), down = random_floats(kDim * kFfn, 9);
  std::vector<float> attention_norm = std::vector<float>(kDim, 1), ffn_norm = attention_norm,
                     final_norm = attention_norm;

  static StoredMatrix matrix(const std::vector<float>& w, int64_t cols) {
    return {reinterpret_cast<const std::byte*>(w.data()), DType::f32,
            static_cast<int64_t>(w.size()) / cols, cols};
  }
  Balance balanced(int threads = 2) const {
    const StoredFfn ffn = {matrix(gate, kDim), matrix(up, kDim), matrix(down, kFfn)};
    const StoredLayer layer = {
        attention_norm,    ffn_norm, matrix(q, kDim), matrix(k, kDim), matrix(v, kDim),
        matrix(out, kDim), {ffn}};
    return balance(matrix(embedding, kDim), {layer}, final_norm, matrix(head, kDim), threads);
  }
};

void expect_ones_but(const std::vector<float>& s, int64_t channel) {
  for (size_t j = 0; j < s.size(); ++j) {
    if (static_cast<int64_t>(j) != channel) {
      EXPECT_EQ(s[j], 1) << j;
    }
  }
}

TEST(Balance, LeavesAModelWithoutOutliersAlone) {
  const Balance b = Stored().balanced();
  expect_ones_but(b.layers[0].attention, -1);
  expect_ones_but(b.layers[0].ffn, -1);
  expect_ones_but(b.layers[0].inner[0], -1);
  expect_ones_but(b.final, -1);
}

TEST(Balance, TakesOnlyTheChannelThatStandsOutByAPowerOfTwo) {
  Stored m;
  m.attention_norm[3] = 64;
  m.final_norm[9] = -100;
  for (int64_t i = 0; i < kDim; ++i) m.down[i * kFfn + 5] /= 100;
  const Balance b = m.balanced();
  expect_ones_but(b.layers[0].attention, 3);
  expect_ones_but(b.layers[0].ffn, -1);
  expect_ones_but(b.layers[0].inner[0], 5);
  expect_ones_but(b.final, 9);
  for (const float s : {b.layers[0].attention[3], b.layers[0].inner[0][5], b.final[9]}) {
    int exponent = 0;
    EXPECT_EQ(std::frexp(s, &exponent), 0.5f);
    EXPECT_GE(s, 4);
    EXPECT_LE(s, 16);
  }
  const Balance again = m.balanced(1);
  EXPECT_EQ(again.layers[0].attention, b.layers[0].attention);
  EXPECT_EQ(again.layers[0].inner, b.layers[0].inner);
  EXPECT_EQ(again.final, b.final);
}

// A large norm weight over a small residual makes no large activation.
TEST(Balance, KnowsTheResidualsSize) {
  Stored m;
  m.attention_norm[3] = 64;
  for (int64_t i = 0; i < kVocab; ++i) m.embedding[i * kDim + 3] /= 64;
  const Balance b = m.balanced();
  expect_ones_but(b.layers[0].attention, -1);
}

TEST(Balance, ZerosAreNotTouched) {
  Stored m;
  m.attention_norm.assign(kDim, 0);
  m.down.assign(kDim * kFfn, 0);
  const Balance b = m.balanced();
  expect_ones_but(b.layers[0].attention, -1);
  expect_ones_but(b.layers[0].inner[0], -1);
}

// Channels that carry nothing say nothing about the others' size, be that large or small.
TEST(Balance, DeadChannelsDoNotMoveTheMedian) {
  for (const float size : {1e4f, 1e-6f}) {
    Stored m;
    for (int64_t j = 0; j < kDim; ++j) m.attention_norm[j] = j < kDim / 2 + 8 ? 0 : size;
    for (int64_t j = 0; j < kFfn; ++j) {
      for (int64_t i = 0; i < kDim; ++i) m.down[i * kFfn + j] = j < kFfn / 2 + 8 ? 0 : size;
    }
    m.attention_norm[kDim - 1] *= 100;
    const Balance b = m.balanced();
    expect_ones_but(b.layers[0].attention, kDim - 1);
    EXPECT_GT(b.layers[0].attention[kDim - 1], 1);
    expect_ones_but(b.layers[0].inner[0], -1);
  }
}

// What it is for: the product of a row with one huge channel.
TEST(Balance, AnOutlierCostsAnInt8ProductNothing) {
  const Kernels& table = kernels();
  constexpr int64_t kOutputs = 40;
  auto x = random_floats(kDim, 10), w = random_floats(kOutputs * kDim, 11);
  x[7] *= 100;
  for (int64_t j = 0; j < kOutputs; ++j) w[j * kDim + 7] /= 100;
  std::vector<float> factors(kDim, 1);
  factors[7] = 128;
  const auto error = [&](bool balanced) {
    auto row = x;
    if (balanced) row[7] /= factors[7];
    const Matrix m(table, Backend::packed, reinterpret_cast<const std::byte*>(w.data()), DType::f32,
                   DType::int8, kOutputs, kDim, 1, {nullptr, balanced ? factors.data() : nullptr});
    std::vector<float> c(kOutputs);
    gemm(table, {row.data(), 1, kDim}, m, {c.data(), 1, kOutputs}, 1, Op::q, {});
    double off = 0, all = 0;
    for (int64_t j = 0; j < kOutputs; ++j) {
      double exact = 0;
      for (int64_t k = 0; k < kDim; ++k) exact += static_cast<double>(x[k]) * w[j * kDim + k];
      off += (c[j] - exact) * (c[j] - exact);
      all += exact * exact;
    }
    return std::sqrt(off / all);
  };
  EXPECT_LT(error(true), 0.02);
  EXPECT_GT(error(false), 5 * error(true));
}

}  // namespace
}  // namespace bicache
