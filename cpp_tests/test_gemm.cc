// Products with packed weights: values, row stability, packing, work; and the BLAS backend's
// values.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "base/parallel.h"
#include "kernels/gemm.h"
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

INSTANTIATE_TEST_SUITE_P(Isa, GemmTest, testing::ValuesIn(available_kernels()), isa_name);

void expect_near(const std::vector<float>& c, const std::vector<oracle::Value>& expected) {
  ASSERT_EQ(c.size(), expected.size());
  for (size_t i = 0; i < c.size(); ++i) {
    ASSERT_NEAR(c[i], expected[i].value, expected[i].tolerance) << i;
  }
}

// The weights as they are held: panel column j of input k.
template <class W>
std::vector<W> panel_of(const std::vector<W>& w, int64_t cols, int64_t inputs, int64_t panel) {
  std::vector<W> packed(static_cast<size_t>(inputs * panel), W{});
  for (int64_t k = 0; k < inputs; ++k) {
    for (int64_t j = 0; j < cols; ++j) packed[k * panel + j] = w[j * inputs + k];
  }
  return packed;
}

TEST_P(GemmTest, KernelEqualsTwinAndStaysInside) {
  std::vector<int64_t> widths = kSizes;
  widths.push_back(table.panel);
  for (int64_t cols : widths) {
    if (cols > table.panel) continue;
    for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 11, 12, 13}) {
      for (int64_t inputs : {1, 3, 16, 65}) {
        const auto a = random_floats(rows * inputs, 1), w = random_floats(cols * inputs, 2);
        const auto half = to_bf16(w);
        const auto panel = panel_of(w, cols, inputs, table.panel);
        const auto half_panel = panel_of(half, cols, inputs, table.panel);
        Guarded c(cols, rows, 3), half_c(cols, rows, 3);
        table.gemm_f32(a.data(), inputs, panel.data(), inputs, c.data(), c.stride(), rows, cols,
                       false);
        table.gemm_bf16(a.data(), inputs, half_panel.data(), inputs, half_c.data(), half_c.stride(),
                        rows, cols, false);
        EXPECT_TRUE(c.intact() && half_c.intact()) << cols << " " << rows;
        expect_near(c.values(), oracle::gemm(a, w, rows, inputs, cols));
        expect_near(half_c.values(), oracle::gemm(a, to_float(half), rows, inputs, cols));
      }
    }
  }
}

TEST_P(GemmTest, SumsCutIntoPiecesHaveTheBitsOfTheWhole) {
  constexpr int64_t kInputs = 100, kRows = 8;
  const int64_t cols = table.panel - 1, panel = table.panel;
  const auto a = random_floats(kRows * kInputs, 3), w = random_floats(cols * kInputs, 4);
  const auto packed = panel_of(w, cols, kInputs, panel);
  const auto half = to_bf16(packed);
  Guarded whole(cols, kRows), half_whole(cols, kRows);
  table.gemm_f32(a.data(), kInputs, packed.data(), kInputs, whole.data(), cols, kRows, cols, false);
  table.gemm_bf16(a.data(), kInputs, half.data(), kInputs, half_whole.data(), cols, kRows, cols,
                  false);
  for (int64_t cut : {1, 17, 64, 99}) {
    Guarded c(cols, kRows), half_c(cols, kRows);
    for (int64_t k = 0; k < kInputs; k += cut) {
      const int64_t n = std::min(cut, kInputs - k);
      table.gemm_f32(a.data() + k, kInputs, packed.data() + k * panel, n, c.data(), cols, kRows,
                     cols, k > 0);
      table.gemm_bf16(a.data() + k, kInputs, half.data() + k * panel, n, half_c.data(), cols, kRows,
                      cols, k > 0);
    }
    EXPECT_TRUE(c.intact() && half_c.intact());
    EXPECT_TRUE(same_bits(c.values(), whole.values())) << cut;
    EXPECT_TRUE(same_bits(half_c.values(), half_whole.values())) << cut;
  }
}

TEST_P(GemmTest, EqualsTwinForAllTypesAndShapes) {
  const int64_t shapes[][3] = {{1, 1, 1},     {2, 7, 5},      {5, 64, 33},
                               {13, 65, 100}, {3, 130, 1023}, {2, 9, 1024},
                               {4, 17, 1025}, {7, 70, 2100},  {200, 20, 12}};
  for (const auto& [rows, outputs, inputs] : shapes) {
    const auto a = random_floats(rows * inputs, 5), w = random_floats(outputs * inputs, 6);
    const auto rounded = to_float(to_bf16(w));
    for (DType from : {DType::f32, DType::bf16}) {
      const Stored stored(w, from);
      for (DType kept : {DType::f32, DType::bf16}) {
        const auto& held = from == DType::f32 && kept == DType::f32 ? w : rounded;
        const Matrix m(table, Backend::packed, stored.data(), from, kept, outputs, inputs, 2);
        Guarded c(outputs, rows, 5);
        gemm(table, {a.data(), rows, inputs}, m, {c.data(), rows, outputs, c.stride()}, 2, Op::q,
             {});
        EXPECT_TRUE(c.intact());
        expect_near(c.values(), oracle::gemm(a, held, rows, inputs, outputs));
      }
    }
  }
}

TEST_P(GemmTest, PacksIntoZeroPaddedPanels) {
  const int64_t outputs = table.panel + 3, inputs = 21;
  const auto w = random_floats(outputs * inputs, 7);
  for (int threads : {1, 4}) {
    const Matrix m = pack(w, DType::f32, outputs, inputs, threads);
    const Matrix half = pack(w, DType::bf16, outputs, inputs, threads);
    ASSERT_EQ(m.size_bytes(), 2 * table.panel * inputs * 4);
    ASSERT_EQ(half.size_bytes(), 2 * table.panel * inputs * 2);
    EXPECT_EQ(m.panel(), table.panel);
    for (int64_t i = 0; i < 2 * table.panel * inputs; ++i) {
      const int64_t j = i / (table.panel * inputs) * table.panel + i % table.panel;
      const int64_t k = i / table.panel % inputs;
      const float expected = j < outputs ? w[j * inputs + k] : 0;
      EXPECT_TRUE(same_bits(reinterpret_cast<const float*>(m.data()) + i, &expected, 1)) << i;
      EXPECT_EQ(reinterpret_cast<const bf16*>(half.data())[i].bits, to_bf16(expected).bits) << i;
    }
  }
}

TEST_P(GemmTest, ARowsBitsDependOnTheRowAlone) {
  constexpr int64_t kRows = 20, kInputs = 1100;
  const int64_t outputs = table.panel + 133;  // with all rows, enough work for 4 threads
  ASSERT_GE(worth_threads(4, 2 * kRows * kInputs * outputs), 4);
  const auto a = random_floats(kRows * kInputs, 8), w = random_floats(outputs * kInputs, 9);
  for (DType kept : {DType::f32, DType::bf16}) {
    const Matrix m = pack(w, kept, outputs, kInputs);
    std::vector<float> alone;
    for (int64_t r = 0; r < kRows; ++r) {
      const auto c = run({a.begin() + r * kInputs, a.begin() + (r + 1) * kInputs}, m);
      alone.insert(alone.end(), c.begin(), c.end());
    }
    for (int64_t rows = 2; rows <= kRows; ++rows) {
      for (int64_t begin : {int64_t{0}, kRows - rows, (kRows - rows) / 2}) {
        const std::vector<float> part(a.begin() + begin * kInputs,
                                      a.begin() + (begin + rows) * kInputs);
        for (int threads : {1, 2, 4}) {
          const auto c = run(part, m, threads);
          ASSERT_TRUE(same_bits(c.data(), &alone[begin * outputs], rows * outputs))
              << rows << " rows from " << begin << ", " << threads << " threads";
        }
      }
    }
  }
}

TEST_P(GemmTest, ManyRowsAreCutWithoutATrace) {
  constexpr int64_t kRows = 230, kInputs = 1100;
  const int64_t outputs = table.panel + 1;
  const auto row = random_floats(kInputs, 10), w = random_floats(outputs * kInputs, 11);
  std::vector<float> a;
  for (int64_t r = 0; r < kRows; ++r) a.insert(a.end(), row.begin(), row.end());
  const Matrix m = pack(w, DType::f32, outputs, kInputs);
  const auto alone = run(row, m);
  for (int threads : {1, 2, 4}) {
    const auto c = run(a, m, threads);
    for (int64_t r = 0; r < kRows; ++r) {
      ASSERT_TRUE(same_bits(&c[r * outputs], alone.data(), outputs)) << r << " " << threads;
    }
  }
}

TEST_P(GemmTest, ANanStaysInItsRow) {
  constexpr int64_t kRows = 7, kInputs = 9, kOutputs = 5;
  auto a = random_floats(kRows * kInputs, 12);
  const Matrix m = pack(random_floats(kOutputs * kInputs, 13), DType::f32, kOutputs, kInputs);
  const auto clean = run(a, m);
  a[3 * kInputs + 2] = std::numeric_limits<float>::quiet_NaN();
  const auto c = run(a, m);
  for (int64_t i = 0; i < kRows * kOutputs; ++i) {
    EXPECT_EQ(std::isnan(c[i]), i / kOutputs == 3);
    if (i / kOutputs != 3) {
      EXPECT_EQ(c[i], clean[i]);
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
