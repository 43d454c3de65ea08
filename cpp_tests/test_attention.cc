// Attention: values, row stability, keys scattered in memory, bad numbers, work; of both K/V types.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "base/parallel.h"
#include "kernels/attention.h"
#include "oracle.h"
#include "support.h"

namespace bicache {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t rows, keys, heads, kv_heads, head_dim;
  int64_t kv_width() const { return kv_heads * head_dim; }
};

// K or V: what they are as floats, and row by row in memory of their type.
struct Values {
  Values(std::vector<float> x, const Shape& s, DType type) : floats(std::move(x)) {
    if (type == DType::bf16) floats = to_float(halves = to_bf16(floats));
    for (int64_t j = 0; j < s.keys; ++j) {
      const int64_t at = j * s.kv_width();
      rows.push_back(type == DType::f32 ? static_cast<const void*>(&floats[at]) : &halves[at]);
    }
  }

  std::vector<float> floats;
  std::vector<bf16> halves;
  std::vector<const void*> rows;
};

// One request's q, k and v. They are changed before they are used.
struct Request {
  Request(const Shape& s, uint32_t seed, float scale = 2)
      : shape(s),
        q(random_floats(s.rows * s.heads * s.head_dim, seed, scale)),
        k(random_floats(s.keys * s.kv_width(), seed + 1)),
        v(random_floats(s.keys * s.kv_width(), seed + 2)) {}

  Shape shape;
  std::vector<float> q, k, v;
};

using Case = std::tuple<const Kernels*, DType>;

class AttentionTest : public testing::TestWithParam<Case> {
 protected:
  const Kernels& table = *std::get<0>(GetParam());
  const DType kv = std::get<1>(GetParam());
  const Attention& kernel = kv == DType::f32 ? table.attention_f32 : table.attention_bf16;

  Values held(const Request& r, const std::vector<float>& x) const { return {x, r.shape, kv}; }

  static AttentionJob job(const Request& r, const Values& k, const Values& v, float* out,
                          Work* work = nullptr) {
    return {r.q.data(), out, r.shape.rows, k.rows.data(), v.rows.data(), r.shape.keys, work};
  }

  void run(std::span<const AttentionJob> jobs, const Shape& s, int threads) const {
    attention(table, jobs, s.heads, s.kv_heads, s.head_dim, kv, threads);
  }

  std::vector<float> run(const Request& r, const Values& k, const Values& v, int threads) const {
    Guarded out(static_cast<int64_t>(r.q.size()));
    const AttentionJob one = job(r, k, v, out.data());
    run({&one, 1}, r.shape, threads);
    EXPECT_TRUE(out.intact());
    return out.values();
  }

  std::vector<float> run(const Request& r, int threads = 1) const {
    return run(r, held(r, r.k), held(r, r.v), threads);
  }

  void expect_twin(const Request& r) const {
    const Shape& s = r.shape;
    const Values k = held(r, r.k), v = held(r, r.v);
    const auto out = run(r, k, v, 2);
    const auto q = kv == DType::f32 ? r.q : to_float(to_bf16(r.q));
    for (int64_t i = 0; i < s.rows * s.heads; ++i) {
      const int64_t offset = i % s.heads * s.kv_heads / s.heads * s.head_dim;
      std::vector<const float*> k_rows, v_rows;
      for (int64_t j = 0; j < s.keys; ++j) {
        k_rows.push_back(&k.floats[j * s.kv_width() + offset]);
        v_rows.push_back(&v.floats[j * s.kv_width() + offset]);
      }
      const auto expected =
          oracle::attention(&q[i * s.head_dim], k_rows, v_rows, s.head_dim, kv == DType::bf16);
      for (int64_t d = 0; d < s.head_dim; ++d) {
        ASSERT_NEAR(out[i * s.head_dim + d], expected[d].value, expected[d].tolerance)
            << s.rows << " rows, " << s.keys << " keys, D " << s.head_dim << ": " << i << " " << d;
      }
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest,
                         testing::Combine(testing::ValuesIn(tables_under_test()),
                                          testing::Values(DType::f32, DType::bf16)),
                         [](const testing::TestParamInfo<Case>& info) {
                           return std::string(std::get<0>(info.param)->isa) + "_" +
                                  std::string(name(std::get<1>(info.param)));
                         });

TEST_P(AttentionTest, EqualsTwinForAllKeyCounts) {
  for (int64_t keys : up_to(200)) expect_twin(Request({2, keys, 2, 1, 20}, 1));
  for (int64_t keys : thinned<int64_t>({257, 255, 256, 800, 300, 511, 513, 512}))
    expect_twin(Request({2, keys, 1, 1, 32}, 2));
}

TEST_P(AttentionTest, EqualsTwinForAllHeadDims) {
  for (int64_t dim : up_to(132)) {
    expect_twin(Request({2, 70, 2, 2, dim}, 3));
    expect_twin(Request({1, 131, 4, 2, dim}, 4, 10));
  }
}

TEST_P(AttentionTest, EqualsTwinForAllRowCounts) {
  for (int64_t rows : up_to(70)) expect_twin(Request({rows, 67, 2, 1, 8}, 5));
  expect_twin(Request({300, 5, 4, 2, 128}, 6));  // more than one task per KV head
}

TEST_P(AttentionTest, KernelStaysInsideItsMemory) {
  const int64_t inputs = inputs_per_word(kernel.form), panel = table.panel;
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step * step; };
  for (int64_t dim : {2, 20, 64, 66, 128}) {
    for (int64_t n : {1, 33, 66, 128}) {
      for (int64_t rows : {1, 5, 32, 70}) {
        const Request r({rows, n, 1, 1, dim}, 7);
        const Values k = held(r, r.k), v = held(r, r.v);
        const int64_t words = up(up(dim, inputs) / inputs, kernel.word_step);
        const int64_t width = up(dim, panel), padded = up(rows, kernel.row_step);
        const int64_t room = up(n, kKeyBlock);
        Guarded keys(room * words), values(room / inputs * width);
        kernel.pack(k.rows.data(), v.rows.data(), 0, n, room, dim, keys.data(), values.data());
        EXPECT_TRUE(keys.intact() && values.intact());
        const std::vector<int32_t> q(static_cast<size_t>(padded * words));
        Guarded out(std::vector<float>(static_cast<size_t>(padded * width))),
            scratch(kernel.scratch_rows * kKeyBlock);
        std::vector<Softmax> state(static_cast<size_t>(rows), {-kInf, 0});
        kernel.attend({q.data(), words, keys.data(), values.data(), room, n, dim, 0.3f, rows,
                       state.data(), out.data(), scratch.data()});
        EXPECT_TRUE(out.intact() && scratch.intact()) << dim << " " << n << " " << rows;
        for (const Softmax& s : state) EXPECT_EQ(s.sum, n);  // of equal scores
      }
    }
  }
}

TEST_P(AttentionTest, OneKeyGivesItsValue) {
  for (int64_t dim : {2, 8, 20, 64, 80}) {
    const Request r({4, 1, 2, 2, dim}, 8);
    const auto out = run(r);
    const Values v = held(r, r.v);
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], v.floats[i % v.floats.size()]);
  }
}

TEST_P(AttentionTest, EqualKeysGiveTheMean) {
  constexpr int64_t kKeys = 1024;
  Request r({2, kKeys, 1, 1, 8}, 9);
  for (int64_t j = 0; j < kKeys; ++j) {
    std::copy_n(&r.k[0], 8, &r.k[j * 8]);
    for (int64_t d = 0; d < 8; ++d) r.v[j * 8 + d] = static_cast<float>(j % 32 * (d + 1));
  }
  const auto out = run(r);  // sums of integers below 2^24 and a division by 1024: exact
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(out[i], 15.5f * static_cast<float>(i % 8 + 1));
}

TEST_P(AttentionTest, AKeyThatOutweighsTheOthersWins) {
  for (int64_t winner : {0, 5, 63, 64, 129, 255, 256, 299}) {
    Request r({1, 300, 1, 1, 4}, 10);
    for (float& x : r.q) x = 100;
    for (int64_t d = 0; d < 4; ++d) r.k[winner * 4 + d] = 50;
    const auto out = run(r);
    const Values v = held(r, r.v);
    for (int64_t d = 0; d < 4; ++d) EXPECT_EQ(out[d], v.floats[winner * 4 + d]) << winner;
  }
}

TEST_P(AttentionTest, ARowsBitsDependOnTheRowAlone) {
  constexpr int64_t kHeads = 4, kDim = 20, kKeys = 300, kRows = 60, kWidth = kHeads * kDim;
  ASSERT_GE(worth_threads(4, 4 * kRows * kKeys * kWidth), 4);
  const Request r({kRows, kKeys, kHeads, 2, kDim}, 11);
  const Values k = held(r, r.k), v = held(r, r.v);
  std::vector<float> alone;
  const auto part_of = [&](int64_t begin, int64_t rows, int threads) {
    Request part = r;
    part.q.assign(r.q.begin() + begin * kWidth, r.q.begin() + (begin + rows) * kWidth);
    part.shape.rows = rows;
    return run(part, k, v, threads);
  };
  for (int64_t i = 0; i < kRows; ++i) {
    const auto out = part_of(i, 1, 1);
    alone.insert(alone.end(), out.begin(), out.end());
  }
  for (int64_t rows : thinned<int64_t>(
           {60, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 49})) {
    for (int64_t begin : {int64_t{0}, (kRows - rows) / 2, kRows - rows}) {
      for (int threads : thinned<int>({4, 2, 1})) {
        const auto out = part_of(begin, rows, threads);
        ASSERT_TRUE(same_bits(out.data(), &alone[begin * kWidth], rows * kWidth))
            << rows << " rows from " << begin << ", " << threads << " threads";
      }
    }
  }
}

// Keys that do not fit a task's memory at once; scores so wide that the order of sums shows.
TEST_P(AttentionTest, TheNumberOfRowsDoesNotShowInManyKeys) {
  constexpr int64_t kDim = 128, kKeys = 1200, kRows = 300, kWidth = 2 * kDim;
  Request r({kRows, kKeys, 2, 1, kDim}, 13);
  for (float& x : r.q) x *= 4;
  const Values k = held(r, r.k), v = held(r, r.v);
  const auto first = [&](int64_t rows, int threads) {
    Request part = r;
    part.q.resize(static_cast<size_t>(rows * kWidth));
    part.shape.rows = rows;
    return run(part, k, v, threads);
  };
  const auto all = first(kRows, 1);
  for (int64_t rows : thinned<int64_t>({1, 8, 31, 32, 33, 64, 65, 128, 299, 300})) {
    const auto out = first(rows, rows % 2 == 0 ? 2 : 1);
    ASSERT_TRUE(same_bits(out.data(), all.data(), rows * kWidth)) << rows;
  }
}

TEST_P(AttentionTest, ARequestsBitsDoNotDependOnItsCompany) {
  std::vector<Request> requests;
  for (int64_t keys : {1, 64, 65, 200, 300}) {
    requests.emplace_back(Shape{keys / 2, keys, 4, 2, 16}, static_cast<uint32_t>(20 + keys));
  }
  std::vector<std::vector<float>> out;
  std::vector<Values> k, v;
  std::vector<AttentionJob> jobs;
  for (const Request& r : requests) {
    out.emplace_back(r.q.size());
    k.push_back(held(r, r.k));
    v.push_back(held(r, r.v));
  }
  for (size_t i = 0; i < out.size(); ++i)
    jobs.push_back(job(requests[i], k[i], v[i], out[i].data()));
  for (int threads : thinned<int>({4, 2, 1})) {
    for (auto& o : out) std::fill(o.begin(), o.end(), kNan);
    run(jobs, requests[0].shape, threads);
    for (size_t i = 0; i < out.size(); ++i) {
      EXPECT_TRUE(same_bits(out[i], run(requests[i]))) << i << " " << threads;
    }
  }
}

TEST_P(AttentionTest, KeysMayLieAnywhere) {
  constexpr int64_t kKeys = 130;
  const Request r({5, kKeys, 2, 2, 21}, 12);
  const Values k = held(r, r.k), v = held(r, r.v);
  Values k_scattered = k, v_scattered = v;
  const size_t row_bytes = static_cast<size_t>(r.shape.kv_width() * size_bytes(kv));
  std::vector<std::vector<char>> rows;  // exactly as long as a row, for AddressSanitizer
  for (int64_t j = 0; j < kKeys; ++j) {
    const int64_t at = j * 37 % kKeys;  // allocated out of order
    for (auto [from, to] : {std::pair(&k, &k_scattered), std::pair(&v, &v_scattered)}) {
      const char* row = static_cast<const char*>(from->rows[at]);
      rows.emplace_back(row, row + row_bytes);
      to->rows[at] = rows.back().data();
    }
  }
  EXPECT_TRUE(same_bits(run(r, k, v, 1), run(r, k_scattered, v_scattered, 1)));
}

TEST_P(AttentionTest, BadNumbersReachTheOutput) {
  constexpr int64_t kDim = 8, kKeys = 300;
  const float full_nan = std::bit_cast<float>(0x7fffffffu);  // rounded carelessly, it is -0
  for (float bad : {kNan, -kNan, full_nan, kInf, -kInf}) {
    Request r({3, kKeys, 1, 1, kDim}, 13);
    r.q[kDim] = bad;  // all scores of row 1
    const auto out = run(r);
    for (int64_t i = 0; i < 3 * kDim; ++i) EXPECT_EQ(std::isnan(out[i]), i / kDim == 1) << bad;
  }
  for (int64_t at : {0, 3, 63, 64, 255, 256, 299}) {
    for (float bad : {kNan, full_nan}) {
      Request r({3, kKeys, 1, 1, kDim}, 14);
      r.k[at * kDim] = bad;  // one score of every row
      for (float x : run(r)) EXPECT_TRUE(std::isnan(x)) << at;
      Request w({3, kKeys, 1, 1, kDim}, 15);
      w.v[at * kDim + 2] = bad;  // one column of v
      const auto out = run(w);
      for (int64_t i = 0; i < 3 * kDim; ++i) EXPECT_EQ(std::isnan(out[i]), i % kDim == 2) << at;
    }
  }
}

TEST_P(AttentionTest, AScoreOfMinusInfinityHidesAKey) {
  constexpr int64_t kDim = 4;
  Request r({1, 66, 1, 1, kDim}, 16), shorter({1, 65, 1, 1, kDim}, 16);
  for (float& x : r.q) x = 1;
  shorter.q = r.q;
  std::copy_n(r.k.begin(), shorter.k.size(), shorter.k.begin());
  std::copy_n(r.v.begin(), shorter.v.size(), shorter.v.begin());
  r.k[65 * kDim] = -kInf;
  EXPECT_TRUE(same_bits(run(r), run(shorter)));
}

TEST_P(AttentionTest, WholeBlocksOfKeysMayBeHidden) {
  constexpr int64_t kDim = 4, kKeys = 3 * kKeyBlock;
  for (int64_t seen : {int64_t{0}, kKeyBlock + 3, kKeys - 1}) {
    Request r({1, kKeys, 1, 1, kDim}, 17);
    for (float& x : r.q) x = 1;
    for (int64_t j = 0; j < kKeys; ++j) r.k[j * kDim] = j == seen ? 1 : -kInf;
    const auto out = run(r);
    const Values v = held(r, r.v);
    for (int64_t d = 0; d < kDim; ++d) EXPECT_EQ(out[d], v.floats[seen * kDim + d]) << seen;
  }
}

TEST_P(AttentionTest, ChargesWhatTheShapesCost) {
  const Request a({3, 70, 4, 2, 8}, 17), b({5, 9, 4, 2, 8}, 18), none({0, 9, 4, 2, 8}, 19);
  const Values k_a = held(a, a.k), v_a = held(a, a.v), k_b = held(b, b.k), v_b = held(b, b.v);
  std::vector<float> out_a(a.q.size()), out_b(b.q.size());
  Work first, second, third;
  first.bytes = 7;  // is added to
  const AttentionJob jobs[] = {
      job(a, k_a, v_a, out_a.data(), &first), job(b, k_b, v_b, out_b.data(), &second),
      job(none, k_b, v_b, nullptr, &third), job(b, k_b, v_b, out_b.data(), nullptr)};
  run(jobs, a.shape, 2);
  EXPECT_EQ(first.rows_of(Op::attention), 3);
  EXPECT_EQ(first.flops, 4 * 3 * 70 * 4 * 8);
  EXPECT_EQ(first.bytes, 7 + 2 * 70 * 2 * 8 * size_bytes(kv));
  EXPECT_EQ(second.rows_of(Op::attention), 5);
  EXPECT_EQ(second.flops, 4 * 5 * 9 * 4 * 8);
  EXPECT_EQ(second.bytes, 2 * 9 * 2 * 8 * size_bytes(kv));
  EXPECT_EQ(third.rows_of(Op::attention) + third.flops + third.bytes, 0);
}

TEST_P(AttentionTest, RejectsWhatDoesNotFit) {
  const Request r({3, 5, 4, 2, 8}, 20);
  const Values k = held(r, r.k), v = held(r, r.v);
  std::vector<float> out(r.q.size());
  Work work;
  AttentionJob bad = job(r, k, v, out.data(), &work);
  EXPECT_THROW(attention(table, {&bad, 1}, 4, 3, 8, kv, 1), std::logic_error);
  EXPECT_THROW(attention(table, {&bad, 1}, 0, 0, 8, kv, 1), std::logic_error);
  EXPECT_THROW(attention(table, {&bad, 1}, 4, 2, 0, kv, 1), std::logic_error);
  EXPECT_THROW(attention(table, {&bad, 1}, 4, 2, 8, DType::int8, 1), std::logic_error);
  bad.keys = 0;
  EXPECT_THROW(attention(table, {&bad, 1}, 4, 2, 8, kv, 1), std::logic_error);
  EXPECT_EQ(work.rows_of(Op::attention) + work.flops + work.bytes, 0);
  EXPECT_NO_THROW(attention(table, {}, 4, 2, 8, kv, 1));
}

}  // namespace
}  // namespace bicache
