// Products with packed weights: values, row stability, packing, work; and the BLAS backend's
// values.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/parallel.h"
#include "kernels/gemm.h"
#include "kernels/quantize.h"
#include "oracle.h"
#include "support.h"

namespace bicache {
namespace {

// `w` [outputs, inputs] stored as `type`, at an odd address.
class Stored {
 public:
  Stored(const std::vector<float>& w, DType type) : type_(type) {
    bytes_.resize(w.size() * static_cast<size_t>(size_bytes(type)) + 1);
    const auto half = to_bf16(w);
    const void* from = type == DType::f32 ? static_cast<const void*>(w.data()) : half.data();
    std::memcpy(bytes_.data() + 1, from, bytes_.size() - 1);
  }
  const std::byte* data() const { return bytes_.data() + 1; }
  DType type() const { return type_; }

 private:
  DType type_;
  std::vector<std::byte> bytes_;
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::int8, DType::int4};

// Where one input of one column of a panel stands, in elements: as Product and Matrix say.
int64_t place(const Kernels& table, const Matrix& m, int64_t column, int64_t input) {
  const Product& product = product_of(table, m.dtype());
  const int64_t group = inputs_per_word(product.form), word = input / group;
  int64_t at = word * m.panel() + column;
  if (product.chunk > 0) {
    int64_t chunk = 0, chunk_words = 0;  // that the word is in
    for (int64_t block = word / 1024 * 1024; block + chunk + chunk_words <= word;) {
      const int64_t words = std::min<int64_t>(1024, m.words() - block);
      const int64_t chunks = (words - 1) / product.chunk + 1, tiles = words / 16;
      chunk += chunk_words;
      chunk_words = std::min((tiles + chunks - 1) / chunks * 16, words - chunk);
    }
    chunk += word / 1024 * 1024;
    const int64_t in_chunk = word - chunk;
    const int64_t strip = chunk * m.panel() + column / 32 * chunk_words * 32;
    const int64_t tile = strip + (in_chunk / 16 * 2 + column % 32 / 16) * 256;
    at = tile + in_chunk % 16 * 16 + column % 16;
  }
  return at * group + input % group;
}

// The int8 values of a quantised matrix [outputs, inputs], read from its bytes as Matrix describes
// them.
std::vector<int> whole_values(const Kernels& table, const Matrix& m) {
  const int64_t group = inputs_per_word(table.int8.form), panel = m.panel(), n = table.vector_bytes;
  const int64_t groups = m.words() * group / kInt4Group;
  std::vector<int> values;
  for (int64_t j = 0; j < m.outputs(); ++j) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(m.data()) + j / panel * m.panel_bytes();
    for (int64_t k = 0; k < m.inputs(); ++k) {
      const int64_t at = place(table, m, j % panel, k);
      if (m.dtype() == DType::int8) {
        values.push_back(static_cast<int8_t>(bytes[at]));
        continue;
      }
      const uint8_t both = bytes[at / (2 * n) * n + at % n];
      const int q = at / n % 2 == 0 ? both & 15 : both >> 4;
      const uint8_t* mz =
          m.groups() + ((j / panel * groups + k / kInt4Group) * 2) * panel + j % panel;
      values.push_back(mz[0] * q - static_cast<int8_t>(mz[panel]));
    }
  }
  return values;
}

// a w^T as it must come out: of rounded numbers in double, or, quantised, to the bit.
std::vector<oracle::Value> expected_product(const Kernels& table, const std::vector<float>& a,
                                            const std::vector<float>& w, const Matrix& m) {
  const int64_t inputs = m.inputs(), rows = static_cast<int64_t>(a.size()) / inputs;
  if (m.dtype() == DType::f32) return oracle::gemm(a, w, rows, inputs, m.outputs());
  if (m.dtype() == DType::bf16)
    return oracle::gemm(to_float(to_bf16(a)), to_float(to_bf16(w)), rows, inputs, m.outputs());
  const std::vector<int> values = whole_values(table, m);
  std::vector<oracle::Value> c;
  for (int64_t r = 0; r < rows; ++r) {
    const oracle::Quantised row = oracle::quantize(&a[r * inputs], inputs);
    for (int64_t j = 0; j < m.outputs(); ++j) {
      int64_t sum = 0;
      for (int64_t k = 0; k < inputs; ++k) sum += row.q[k] * values[j * inputs + k];
      c.push_back({static_cast<float>(sum) * (row.scale * m.scale()[j]), 0});
    }
  }
  return c;
}

class GemmTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& table = *GetParam();

  Matrix pack(const std::vector<float>& w, DType kept, int64_t outputs, int64_t inputs,
              int threads = 1) const {
    const Stored stored(w, DType::f32);
    return Matrix(table, Backend::packed, stored.data(), DType::f32, kept, outputs, inputs,
                  threads);
  }

  std::vector<float> run(const std::vector<float>& a, const Matrix& w, int threads = 1) const {
    const int64_t rows = static_cast<int64_t>(a.size()) / w.inputs();
    std::vector<float> c(static_cast<size_t>(rows * w.outputs()));
    gemm(table, {a.data(), rows, w.inputs()}, w, {c.data(), rows, w.outputs()}, threads, Op::q, {});
    return c;
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, GemmTest, testing::ValuesIn(tables_under_test()), isa_name);

void expect_near(const std::vector<float>& c, const std::vector<oracle::Value>& expected) {
  ASSERT_EQ(c.size(), expected.size());
  for (size_t i = 0; i < c.size(); ++i) {
    ASSERT_NEAR(c[i], expected[i].value, expected[i].tolerance) << i;
  }
}

TEST_P(GemmTest, EqualsTwinAndStaysInside) {
  std::vector<int64_t> widths = kSizes;
  widths.push_back(2 * table.panel);
  for (int64_t outputs : widths) {
    for (int64_t inputs : {1, 3, 16, 31, 65}) {
      const auto w = random_floats(outputs * inputs, 2);
      for (const DType kept : kTypes) {
        const Matrix m = pack(w, kept, outputs, inputs);
        for (int64_t rows :
             thinned<int64_t>({1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 31, 32, 33})) {
          if (outputs > 20 && rows % 2 == 0) continue;
          const auto a = random_floats(rows * inputs, 1);
          Guarded c(outputs, rows, 3);
          gemm(table, {a.data(), rows, inputs}, m, {c.data(), rows, outputs, c.stride()}, 1, Op::q,
               {});
          EXPECT_TRUE(c.intact()) << outputs << " " << rows;
          expect_near(c.values(), expected_product(table, a, w, m));
        }
      }
    }
  }
}

TEST_P(GemmTest, SumsCutIntoPiecesHaveTheBitsOfTheWhole) {
  constexpr int64_t kInputs = 2400, kRows = 8;
  const int64_t cols = table.panel - 1;
  const auto a = random_floats(kRows * kInputs, 3), w = random_floats(cols * kInputs, 4);
  for (const DType kept : {DType::f32, DType::bf16, DType::int8}) {
    const Product& product = product_of(table, kept);
    if (product.chunk > 0) continue;  // are never cut but into kBlockWords
    const Matrix m = pack(w, kept, cols, kInputs);
    Activations rows;
    rows.reserve(table, Backend::packed, kept, kRows, kInputs);
    for (int64_t r = 0; r < kRows; ++r) rows.set(r, &a[r * kInputs]);
    const int64_t step = product.word_step;
    const auto word_bytes = m.panel_bytes() / m.words();
    const auto sum = [&](int64_t cut) {
      std::vector<float> c(static_cast<size_t>(kRows * table.panel));
      for (int64_t k = 0; k < m.words(); k += cut) {
        const int64_t n = std::min(cut, m.words() - k);
        product.run({rows.row(0) + k, rows.stride(), m.data() + k * word_bytes, n, c.data(),
                     table.panel, kRows, cols, k > 0});
      }
      std::vector<float> values;
      for (int64_t r = 0; r < kRows; ++r)
        values.insert(values.end(), &c[r * table.panel], &c[r * table.panel + cols]);
      return values;
    };
    const auto whole = sum(m.words());
    for (int64_t cut : {1, 3, 5}) EXPECT_TRUE(same_bits(sum(cut * step), whole)) << cut;
  }
}

TEST_P(GemmTest, EqualsTwinForAllTypesAndShapes) {
  constexpr int64_t kMany = kSanitized ? 40 : 300;
  const int64_t shapes[][3] = {{1, 1, 1},      {2, 7, 5},     {5, 64, 33},       {13, 65, 100},
                               {3, 130, 1023}, {2, 9, 1024},  {4, 17, 1025},     {7, 70, 2100},
                               {200, 20, 12},  {3, 33, 9000}, {kMany, 65, 4200}, {3, 1030, 4200}};
  for (const auto& [rows, outputs, inputs] : shapes) {
    const auto a = random_floats(rows * inputs, 5), w = random_floats(outputs * inputs, 6);
    const auto rounded = to_float(to_bf16(w));
    for (DType from : {DType::f32, DType::bf16}) {
      const Stored stored(w, from);
      for (const DType kept : kTypes) {
        const Matrix m(table, Backend::packed, stored.data(), from, kept, outputs, inputs, 2);
        Guarded c(outputs, rows, 5);
        gemm(table, {a.data(), rows, inputs}, m, {c.data(), rows, outputs, c.stride()}, 2, Op::q,
             {});
        EXPECT_TRUE(c.intact());
        expect_near(c.values(), expected_product(table, a, from == DType::f32 ? w : rounded, m));
      }
    }
  }
}

TEST_P(GemmTest, PacksIntoZeroPaddedPanels) {
  const int64_t outputs = table.panel + 3, inputs = 2381;  // several chunks of tiles
  const auto w = random_floats(outputs * inputs, 7);
  for (int threads : {1, 4}) {
    for (const DType kept : {DType::f32, DType::bf16}) {
      const Matrix m = pack(w, kept, outputs, inputs, threads);
      const int64_t group = inputs_per_word(product_of(table, kept).form), panel = table.panel;
      EXPECT_EQ(m.panel(), panel);
      ASSERT_GE(m.words() * group, inputs);
      ASSERT_EQ(m.panel_bytes(), m.words() * group * panel * size_bytes(kept));
      ASSERT_EQ(m.size_bytes(), 2 * m.panel_bytes());
      const int64_t inside = m.words() * group;
      std::vector<bool> seen(static_cast<size_t>(inside * panel));
      for (int64_t i = 0; i < 2 * panel * inside; ++i) {
        const int64_t j = i / inside, k = i % inside, at = place(table, m, j % panel, k);
        const std::byte* from = m.data() + j / panel * m.panel_bytes() + at * size_bytes(kept);
        const float expected = j < outputs && k < inputs ? w[j * inputs + k] : 0;
        ASSERT_TRUE(0 <= at && at < inside * panel && seen[at] == (j >= panel)) << at;
        seen[at] = true;
        if (kept == DType::f32) {
          ASSERT_TRUE(same_bits(reinterpret_cast<const float*>(from), &expected, 1)) << i;
        } else {
          ASSERT_EQ(reinterpret_cast<const bf16*>(from)->bits, to_bf16(expected).bits) << i;
        }
      }
    }
  }
}

TEST_P(GemmTest, QuantisedWeightsAreNearTheirOriginals) {
  const int64_t outputs = table.panel + 3, inputs = 200;
  auto w = random_floats(outputs * inputs, 7);
  for (int64_t k = 0; k < inputs; ++k) w[2 * inputs + k] = 0;       // a column of zeros
  for (int64_t k = 32; k < 64; ++k) w[3 * inputs + k] *= 0.01f;     // a small group
  for (int64_t k = 0; k < inputs; ++k) w[4 * inputs + k] = 1e-44f;  // too small for a scale
  w[5 * inputs + 7] = 50;                                           // an outlier
  for (const DType kept : {DType::int8, DType::int4}) {
    const Matrix m = pack(w, kept, outputs, inputs), again = pack(w, kept, outputs, inputs, 4);
    EXPECT_EQ(std::memcmp(m.data(), again.data(), static_cast<size_t>(2 * m.panel_bytes())), 0);
    EXPECT_EQ(m.size_bytes(), Matrix::size_bytes(table, Backend::packed, kept, outputs, inputs));
    const auto values = whole_values(table, m);
    for (int64_t j = 0; j < outputs; ++j) {
      float most = 0;
      for (int64_t k = 0; k < inputs; ++k) most = std::max(most, std::abs(w[j * inputs + k]));
      const float scale = m.scale()[j];
      if (most < 1e-30f) {
        EXPECT_EQ(scale, 0);
        continue;
      }
      double error = 0, sum = 0;
      for (int64_t k = 0; k < inputs; ++k) {
        const float x = w[j * inputs + k];
        const int q = values[j * inputs + k];
        EXPECT_TRUE(-127 <= q && q <= 127) << q;
        const double off = static_cast<double>(scale) * q - x;
        // Half a step: of the column's scale, or of the group's m (at most 16 of them, and z).
        EXPECT_LE(std::abs(off), scale * (kept == DType::int8 ? 0.5001 : 17)) << j << " " << k;
        error += off * off;
        sum += static_cast<double>(x) * x;
      }
      if (j == 5) continue;  // the outlier's column is coarse
      EXPECT_LE(std::sqrt(error / sum), kept == DType::int8 ? 0.01 : 0.12) << j;
    }
  }
}

TEST_P(GemmTest, ARowsBitsDependOnTheRowAlone) {
  constexpr int64_t kRows = 20, kInputs = 1100;
  const int64_t outputs = table.panel + 133;  // with all rows, enough work for 4 threads
  ASSERT_GE(worth_threads(4, 2 * kRows * kInputs * outputs), 4);
  const auto a = random_floats(kRows * kInputs, 8), w = random_floats(outputs * kInputs, 9);
  for (const DType kept : kTypes) {
    const Matrix m = pack(w, kept, outputs, kInputs);
    std::vector<float> alone;
    for (int64_t r = 0; r < kRows; ++r) {
      const auto c = run({a.begin() + r * kInputs, a.begin() + (r + 1) * kInputs}, m);
      alone.insert(alone.end(), c.begin(), c.end());
    }
    for (int64_t rows :
         thinned<int64_t>({20, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19})) {
      for (int64_t begin : {int64_t{0}, kRows - rows, (kRows - rows) / 2}) {
        const std::vector<float> part(a.begin() + begin * kInputs,
                                      a.begin() + (begin + rows) * kInputs);
        for (int threads : thinned<int>({4, 2, 1})) {
          const auto c = run(part, m, threads);
          ASSERT_TRUE(same_bits(c.data(), &alone[begin * outputs], rows * outputs))
              << rows << " rows from " << begin << ", " << threads << " threads";
        }
      }
    }
  }
}

TEST_P(GemmTest, LargeResultsAreWrittenPastTheCachesToTheSameValues) {
  constexpr int64_t kRows = 300, kInputs = 40, kStride = 2064;  // a multiple of a cache line
  const int64_t outputs = 2048 - 3;                             // the last panel is not whole
  ASSERT_GE(kRows * outputs * 4, int64_t{2} << 20);
  const auto a = random_floats(kRows * kInputs, 8), w = random_floats(outputs * kInputs, 9);
  const auto bias = random_floats(outputs, 10);
  for (const DType kept : kTypes) {
    Matrix m = pack(w, kept, outputs, kInputs);
    Buffer<float> held(outputs), aligned(kRows * kStride);
    std::copy(bias.begin(), bias.end(), held.data());
    m.set_bias(std::move(held));
    std::fill_n(aligned.data(), aligned.size(), 7.0f);
    std::vector<float> c(static_cast<size_t>(kRows * (outputs + 1)));  // of an odd stride
    gemm(table, {a.data(), kRows, kInputs}, m, {c.data(), kRows, outputs, outputs + 1}, 2, Op::q,
         {});
    gemm(table, {a.data(), kRows, kInputs}, m, {aligned.data(), kRows, outputs, kStride}, 2, Op::q,
         {});
    for (int64_t r = 0; r < kRows; ++r) {
      const float* row = aligned.data() + r * kStride;
      ASSERT_TRUE(same_bits(row, &c[r * (outputs + 1)], outputs)) << r;
      for (int64_t j = outputs; j < kStride; ++j) ASSERT_EQ(row[j], 7);
    }
  }
}

TEST_P(GemmTest, QuantisedSumsAreTheSameOnEveryIsa) {
  constexpr int64_t kRows = 40, kInputs = 333, kOutputs = 70;
  const auto a = random_floats(kRows * kInputs, 8), w = random_floats(kOutputs * kInputs, 9);
  for (const DType kept : {DType::int8, DType::int4}) {
    const Kernels& generic = *available_kernels().front();
    const Stored stored(w, DType::f32);
    const Matrix first(generic, Backend::packed, stored.data(), DType::f32, kept, kOutputs, kInputs,
                       1);
    std::vector<float> expected(kRows * kOutputs);
    gemm(generic, {a.data(), kRows, kInputs}, first, {expected.data(), kRows, kOutputs}, 1, Op::q,
         {});
    EXPECT_TRUE(same_bits(run(a, pack(w, kept, kOutputs, kInputs)), expected));
  }
}

TEST_P(GemmTest, TheLargestQuantisedSumsAreExact) {
  constexpr int64_t kInputs = 65536;
  const std::vector<float> ones(kInputs, 1), minus(kInputs, -1);
  for (const DType kept : {DType::int8, DType::int4}) {
    EXPECT_NEAR(run(ones, pack(ones, kept, 1, kInputs))[0], kInputs, 0.1);
    EXPECT_NEAR(run(minus, pack(ones, kept, 1, kInputs))[0], -kInputs, 0.1);
  }
}

TEST_P(GemmTest, AddsAndBiases) {
  constexpr int64_t kRows = 5, kInputs = 40;
  const int64_t outputs = table.panel + 7;
  const auto a = random_floats(kRows * kInputs, 8), w = random_floats(outputs * kInputs, 9);
  const auto bias = random_floats(outputs, 10), before = random_floats(kRows * outputs, 11);
  for (const DType kept : kTypes) {
    Matrix m = pack(w, kept, outputs, kInputs);
    const auto plain = run(a, m);
    Buffer<float> held(outputs);
    std::copy(bias.begin(), bias.end(), held.data());
    m.set_bias(std::move(held));
    const auto biased = run(a, m);
    Activations rows;
    rows.reserve(table, Backend::packed, kept, kRows, kInputs);
    for (int64_t r = 0; r < kRows; ++r) rows.set(r, &a[r * kInputs]);
    auto sum = before;
    gemm(table, rows, 0, m, {sum.data(), kRows, outputs}, Write::add, 2, Op::q, {});
    for (int64_t i = 0; i < kRows * outputs; ++i) {
      ASSERT_EQ(biased[i], plain[i] + bias[i % outputs]) << i;
      ASSERT_EQ(sum[i], before[i] + biased[i]) << i;
    }
    Buffer<float> wrong(outputs - 1);
    EXPECT_THROW(m.set_bias(std::move(wrong)), std::logic_error);
  }
}

TEST_P(GemmTest, SiluMulEqualsItsSteps) {
  for (const int64_t rows : {1, 5, 40}) {
    for (const int64_t outputs : {int64_t{3}, table.panel, 2 * table.panel + 5}) {
      constexpr int64_t kInputs = 70, kNext = 9;
      const auto a = random_floats(rows * kInputs, 8), g = random_floats(outputs * kInputs, 9),
                 u = random_floats(outputs * kInputs, 10), d = random_floats(kNext * outputs, 12);
      for (const DType kept : kTypes) {
        const Matrix gate = pack(g, kept, outputs, kInputs), up = pack(u, kept, outputs, kInputs),
                     down = pack(d, kept, kNext, outputs);
        Activations in, next;
        in.reserve(table, Backend::packed, kept, rows, kInputs);
        next.reserve(table, Backend::packed, kept, rows, outputs);
        for (int64_t r = 0; r < rows; ++r) in.set(r, &a[r * kInputs]);
        std::vector<float> scratch(static_cast<size_t>(rows * outputs)), c(rows * kNext);
        Work work;
        const Share share = {&work, rows};
        gemm_silu_mul(table, in, gate, up, rows, next, {scratch.data(), rows, outputs}, 2,
                      {&share, 1});
        EXPECT_EQ(work.rows_of(Op::gate), rows);
        EXPECT_EQ(work.rows_of(Op::up), rows);
        EXPECT_EQ(work.flops, 4 * rows * outputs * kInputs);
        EXPECT_EQ(work.bytes, gate.size_bytes() + up.size_bytes());
        gemm(table, next, 0, down, {c.data(), rows, kNext}, Write::set, 1, Op::down, {});
        auto gates = run(a, gate);
        const auto ups = run(a, up);
        for (int64_t r = 0; r < rows; ++r)
          table.silu_mul(&gates[r * outputs], &ups[r * outputs], outputs);
        EXPECT_TRUE(same_bits(c, run(gates, down))) << rows << " " << outputs;
      }
    }
  }
}

// What the scheduling must not show: many rows (several tasks, or few), chunks of inputs, blocks of
// words.
TEST_P(GemmTest, ManyRowsAreCutWithoutATrace) {
  constexpr int64_t kInputs = 4200;     // more than a block of words, of any type
  for (const int64_t full : {8, 16}) {  // panels: in chunks of inputs; several to a task
    const int64_t rows = full == 8 ? 260 : kSanitized ? 35 : 550, outputs = full * table.panel + 1;
    const auto row = random_floats(kInputs, 10), w = random_floats(outputs * kInputs, 11);
    std::vector<float> a;
    for (int64_t r = 0; r < rows; ++r) a.insert(a.end(), row.begin(), row.end());
    for (const DType kept : kTypes) {
      const Matrix m = pack(w, kept, outputs, kInputs);
      const auto alone = run(row, m);
      for (int threads : full == 8 ? thinned<int>({4, 2, 1}) : std::vector<int>{2}) {
        const auto c = run(a, m, threads);
        for (int64_t r = 0; r < rows; ++r) {
          ASSERT_TRUE(same_bits(&c[r * outputs], alone.data(), outputs)) << r << " " << threads;
        }
      }
    }
  }
}

TEST_P(GemmTest, ANanStaysInItsRow) {
  constexpr int64_t kRows = 7, kInputs = 9, kOutputs = 5;
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto a = random_floats(kRows * kInputs, 12);
    for (const DType kept : kTypes) {
      const Matrix m = pack(random_floats(kOutputs * kInputs, 13), kept, kOutputs, kInputs);
      a[3 * kInputs + 2] = 0.5f;
      const auto clean = run(a, m);
      a[3 * kInputs + 2] = bad;
      const auto c = run(a, m);
      for (int64_t i = 0; i < kRows * kOutputs; ++i) {
        EXPECT_EQ(std::isfinite(c[i]), i / kOutputs != 3) << name(kept);
        if (i / kOutputs != 3) {
          EXPECT_EQ(c[i], clean[i]);
        }
      }
    }
  }
}

TEST_P(GemmTest, ChargesWhatTheShapesCost) {
  constexpr int64_t kRows = 7, kInputs = 12, kOutputs = 10;
  const auto a = random_floats(kRows * kInputs, 14);
  const Matrix m = pack(random_floats(kOutputs * kInputs, 15), DType::bf16, kOutputs, kInputs);
  std::vector<float> c(kRows * kOutputs);
  Work first, second, third;
  first.flops = 5;  // is added to
  const std::vector<Share> shares = {{&first, 3}, {nullptr, 1}, {&second, 0}, {&third, 3}};
  gemm(table, {a.data(), kRows, kInputs}, m, {c.data(), kRows, kOutputs}, 2, Op::gate, shares);
  EXPECT_EQ(first.rows_of(Op::gate), 3);
  EXPECT_EQ(second.rows_of(Op::gate), 0);
  EXPECT_EQ(third.rows_of(Op::gate), 3);
  EXPECT_EQ(first.rows_of(Op::up), 0);
  EXPECT_EQ(first.flops, 5 + 2 * 3 * kInputs * kOutputs);
  EXPECT_EQ(second.flops + second.bytes, 0);
  EXPECT_EQ(first.bytes, m.size_bytes() * 3 / 7);
  EXPECT_EQ(third.bytes, m.size_bytes() - m.size_bytes() * 4 / 7);

  Work all;
  for (int64_t rows : {1, 2, 3, 5, 7}) {  // shares of one row each add up to the whole
    std::vector<Work> works(static_cast<size_t>(rows));
    std::vector<Share> singles;
    for (Work& w : works) singles.push_back({&w, 1});
    gemm(table, {a.data(), rows, kInputs}, m, {c.data(), rows, kOutputs}, 1, Op::head, singles);
    all = {};
    for (const Work& w : works) all += w;
    EXPECT_EQ(all.rows_of(Op::head), rows);
    EXPECT_EQ(all.flops, 2 * rows * kInputs * kOutputs);
    EXPECT_EQ(all.bytes, m.size_bytes());
  }
}

TEST_P(GemmTest, NoRowsNoWork) {
  const Matrix m = pack(random_floats(12, 16), DType::f32, 3, 4);
  Work work;
  const Share share = {&work, 0};
  gemm(table, {nullptr, 0, 4}, m, {nullptr, 0, 3}, 2, Op::q, {&share, 1});
  EXPECT_EQ(work.rows_of(Op::q) + work.flops + work.bytes, 0);
}

TEST_P(GemmTest, RejectsWhatDoesNotFit) {
  const Matrix m = pack(random_floats(12, 17), DType::f32, 3, 4);
  std::vector<float> a(8), c(6);
  Work work;
  const Share share = {&work, 1};
  const auto call = [&](View<const float> x, View<float> y, std::span<const Share> shares) {
    gemm(table, x, m, y, 1, Op::q, shares);
  };
  EXPECT_THROW(call({a.data(), 2, 3}, {c.data(), 2, 3}, {}), std::logic_error);
  EXPECT_THROW(call({a.data(), 2, 4}, {c.data(), 2, 2}, {}), std::logic_error);
  EXPECT_THROW(call({a.data(), 2, 4}, {c.data(), 1, 3}, {}), std::logic_error);
  Activations other_type;
  other_type.reserve(table, Backend::packed, DType::bf16, 2, 4);
  EXPECT_THROW(gemm(table, other_type, 0, m, {c.data(), 2, 3}, Write::set, 1, Op::q, {}),
               std::logic_error);
  EXPECT_THROW(call({a.data(), 2, 4}, {c.data(), 2, 3}, {&share, 1}), std::logic_error);
  EXPECT_EQ(work.rows_of(Op::q) + work.flops + work.bytes, 0);
  EXPECT_NO_THROW(call({a.data(), 2, 4}, {c.data(), 2, 3}, {}));
  for (const Kernels* other : available_kernels()) {
    if (other->panel == table.panel) continue;
    EXPECT_THROW(gemm(*other, {a.data(), 2, 4}, m, {c.data(), 2, 3}, 1, Op::q, {}),
                 std::logic_error);
  }
  const std::byte* none = nullptr;
  EXPECT_THROW(Matrix(table, Backend::packed, none, DType::f32, DType::f32, 0, 4, 1),
               std::logic_error);
  EXPECT_THROW(Matrix(table, Backend::packed, none, DType::f32, DType::f32, 4, 0, 1),
               std::logic_error);
  EXPECT_THROW(Matrix(table, Backend::packed, none, DType::f32, DType::int8, 1, 65537, 1),
               std::invalid_argument);
  EXPECT_THROW(Matrix(table, Backend::blas, none, DType::f32, DType::bf16, 4, 4, 1),
               std::logic_error);
  EXPECT_THROW(Matrix(table, Backend::packed, none, DType::f32, DType::f32, int64_t{1} << 40,
                      int64_t{1} << 40, 1),
               std::invalid_argument);
}

TEST(BlasGemm, EqualsTwin) {
  const Kernels& table = kernels();
  for (const auto& [rows, outputs, inputs] :
       {std::array<int64_t, 3>{1, 1, 1}, {3, 17, 33}, {64, 65, 100}, {5, 130, 1100}}) {
    const auto a = random_floats(rows * inputs, 18), w = random_floats(outputs * inputs, 19);
    for (DType from : {DType::f32, DType::bf16}) {
      const Stored stored(w, from);
      const Matrix m(table, Backend::blas, stored.data(), from, DType::f32, outputs, inputs, 2);
      EXPECT_EQ(m.size_bytes(), outputs * inputs * 4);
      const auto held = from == DType::f32 ? w : to_float(to_bf16(w));
      for (int threads : {1, 2}) {
        Guarded c(outputs, rows, 4);
        Work work;
        const Share share = {&work, rows};
        gemm(table, {a.data(), rows, inputs}, m, {c.data(), rows, outputs, c.stride()}, threads,
             Op::up, {&share, 1});
        EXPECT_TRUE(c.intact());
        expect_near(c.values(), oracle::gemm(a, held, rows, inputs, outputs));
        EXPECT_EQ(work.rows_of(Op::up), rows);
        EXPECT_EQ(work.flops, 2 * rows * inputs * outputs);
        EXPECT_EQ(work.bytes, m.size_bytes());
      }
    }
  }
  EXPECT_NE(blas_config().find("OpenBLAS"), std::string::npos);
}

}  // namespace
}  // namespace bicache
