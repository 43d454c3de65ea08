// Attention: values, row stability, keys scattered in memory, bad numbers, work.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

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
};

// One request's q, k and v, and pointers to its key rows.
struct Request {
  Request(const Shape& s, uint32_t seed, float scale = 2)
      : shape(s),
        q(random_floats(s.rows * s.heads * s.head_dim, seed, scale)),
        k(random_floats(s.keys * s.kv_heads * s.head_dim, seed + 1)),
        v(random_floats(s.keys * s.kv_heads * s.head_dim, seed + 2)) {
    for (int64_t j = 0; j < s.keys; ++j) {
      k_rows.push_back(&k[j * s.kv_heads * s.head_dim]);
      v_rows.push_back(&v[j * s.kv_heads * s.head_dim]);
    }
  }

  AttentionJob job(float* out, Work* work = nullptr) const {
    return {q.data(), out, shape.rows, k_rows.data(), v_rows.data(), shape.keys, work};
  }

  Shape shape;
  std::vector<float> q, k, v;
  std::vector<const float*> k_rows, v_rows;
};

class AttentionTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& table = *GetParam();

  std::vector<float> run(const Request& r, int threads = 1) const {
    const Shape& s = r.shape;
    Guarded out(s.rows * s.heads * s.head_dim);
    const AttentionJob job = r.job(out.data());
    attention(table, {&job, 1}, s.heads, s.kv_heads, s.head_dim, threads);
    EXPECT_TRUE(out.intact());
    return out.values();
  }

  void expect_twin(const Request& r) const {
    const Shape& s = r.shape;
    const auto out = run(r, 2);
    for (int64_t i = 0; i < s.rows * s.heads; ++i) {
      const int64_t offset = i % s.heads * s.kv_heads / s.heads * s.head_dim;
      std::vector<const float*> k = r.k_rows, v = r.v_rows;
      for (const float*& p : k) p += offset;
      for (const float*& p : v) p += offset;
      const auto expected = oracle::attention(&r.q[i * s.head_dim], k, v, s.head_dim);
      for (int64_t d = 0; d < s.head_dim; ++d) {
        ASSERT_NEAR(out[i * s.head_dim + d], expected[d].value, expected[d].tolerance)
            << s.rows << " rows, " << s.keys << " keys, D " << s.head_dim << ": " << i << " " << d;
      }
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, testing::ValuesIn(available_kernels()), isa_name);

TEST_P(AttentionTest, EqualsTwinForAllKeyCounts) {
  for (int64_t keys : kSizes) expect_twin(Request({3, keys, 2, 1, 20}, 1));
  expect_twin(Request({2, 300, 1, 1, 32}, 2));
}

TEST_P(AttentionTest, EqualsTwinForAllHeadDims) {
  for (int64_t dim : {2, 6, 8, 20, 32, 64, 80, 128}) {
    expect_twin(Request({2, 70, 2, 2, dim}, 3));
    expect_twin(Request({1, 131, 4, 2, dim}, 4, 10));
  }
}

TEST_P(AttentionTest, EqualsTwinForAllRowCounts) {
  for (int64_t rows : {1, 2, 5, 6, 7, 13, 47, 48, 49, 100})
    expect_twin(Request({rows, 67, 2, 1, 8}, 5));
}

TEST_P(AttentionTest, KernelStaysInsideItsRows) {
  constexpr int64_t kDim = 20, kRows = 5, kKeys = 66;
  const Request r({kRows, kKeys, 1, 1, kDim}, 6);
  Guarded out(kDim, kRows, 7), scratch(attention_scratch(kDim));
  table.attention(r.q.data(), kDim, r.k_rows.data(), r.v_rows.data(), 0, kKeys, kDim, 0.3f,
                  out.data(), out.stride(), kRows, scratch.data());
  EXPECT_TRUE(out.intact() && scratch.intact());
  for (int64_t dim : {2, 64, 66, 128}) {  // most of the scratch there is
    const Request full({kAttentionRows, 64, 1, 1, dim}, 7);
    Guarded exact(attention_scratch(dim)), full_out(dim, kAttentionRows);
    table.attention(full.q.data(), dim, full.k_rows.data(), full.v_rows.data(), 0, 64, dim, 0.3f,
                    full_out.data(), dim, kAttentionRows, exact.data());
    EXPECT_TRUE(exact.intact() && full_out.intact());
  }
}

TEST_P(AttentionTest, OneKeyGivesItsValue) {
  for (int64_t dim : {2, 8, 20, 64, 80}) {
    const Request r({4, 1, 2, 2, dim}, 8);
    const auto out = run(r);
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], r.v[i % r.v.size()]);
  }
}

TEST_P(AttentionTest, EqualKeysGiveTheMean) {
  Request r({2, 128, 1, 1, 8}, 9);
  for (int64_t j = 0; j < 128; ++j) {
    std::copy_n(&r.k[0], 8, &r.k[j * 8]);
    for (int64_t d = 0; d < 8; ++d) r.v[j * 8 + d] = static_cast<float>(j * (d + 1));
  }
  const auto out = run(r);  // sums of integers below 2^24 and a division by 128: exact
  for (int64_t i = 0; i < 16; ++i) EXPECT_EQ(out[i], 63.5f * static_cast<float>(i % 8 + 1));
}

TEST_P(AttentionTest, AKeyThatOutweighsTheOthersWins) {
  for (int64_t winner : {0, 5, 63, 64, 100, 129}) {
    Request r({1, 130, 1, 1, 4}, 10);
    for (float& x : r.q) x = 100;
    for (int64_t d = 0; d < 4; ++d) r.k[winner * 4 + d] = 50;
    const auto out = run(r);
    for (int64_t d = 0; d < 4; ++d) EXPECT_EQ(out[d], r.v[winner * 4 + d]) << winner;
  }
}

TEST_P(AttentionTest, ARowsBitsDependOnTheRowAlone) {
  constexpr int64_t kHeads = 4, kDim = 20, kKeys = 250, kRows = 60, kWidth = kHeads * kDim;
  ASSERT_GE(worth_threads(4, 4 * kRows * kKeys * kWidth), 4);
  const Request r({kRows, kKeys, kHeads, 2, kDim}, 11);
  std::vector<float> alone;
  const auto part_of = [&](int64_t begin, int64_t rows, int threads) {
    Request part = r;
    part.q.assign(r.q.begin() + begin * kWidth, r.q.begin() + (begin + rows) * kWidth);
    part.k_rows = r.k_rows;
    part.v_rows = r.v_rows;
    part.shape.rows = rows;
    return run(part, threads);
  };
  for (int64_t i = 0; i < kRows; ++i) {
    const auto out = part_of(i, 1, 1);
    alone.insert(alone.end(), out.begin(), out.end());
  }
  for (int64_t rows :
       {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 49, 60}) {
    for (int64_t begin : {int64_t{0}, (kRows - rows) / 2, kRows - rows}) {
      for (int threads : {1, 2, 4}) {
        const auto out = part_of(begin, rows, threads);
        ASSERT_TRUE(same_bits(out.data(), &alone[begin * kWidth], rows * kWidth))
            << rows << " rows from " << begin << ", " << threads << " threads";
      }
    }
  }
}

TEST_P(AttentionTest, ARequestsBitsDoNotDependOnItsCompany) {
  std::vector<Request> requests;
  for (int64_t keys : {1, 64, 65, 200}) {
    requests.emplace_back(Shape{keys / 2, keys, 4, 2, 16}, static_cast<uint32_t>(20 + keys));
  }
  std::vector<std::vector<float>> out;
  std::vector<AttentionJob> jobs;
  for (const Request& r : requests) out.emplace_back(r.q.size());
  for (size_t i = 0; i < out.size(); ++i) jobs.push_back(requests[i].job(out[i].data()));
  for (int threads : {1, 2, 4}) {
    for (auto& o : out) std::fill(o.begin(), o.end(), kNan);
    attention(table, jobs, 4, 2, 16, threads);
    for (size_t i = 0; i < out.size(); ++i) {
      EXPECT_TRUE(same_bits(out[i], run(requests[i]))) << i << " " << threads;
    }
  }
}

TEST_P(AttentionTest, KeysMayLieAnywhere) {
  const Request r({5, 130, 2, 2, 20}, 12);
  Request scattered = r;
  std::vector<std::vector<float>> rows;  // exactly as long as a row, for AddressSanitizer
  for (int64_t j = 0; j < 130; ++j) {
    const int64_t at = j * 37 % 130;  // allocated out of order
    rows.emplace_back(r.k_rows[at], r.k_rows[at] + 40);
    rows.emplace_back(r.v_rows[at], r.v_rows[at] + 40);
  }
  for (int64_t j = 0; j < 130; ++j) {
    scattered.k_rows[j * 37 % 130] = rows[2 * j].data();
    scattered.v_rows[j * 37 % 130] = rows[2 * j + 1].data();
  }
  EXPECT_TRUE(same_bits(run(r), run(scattered)));
}

TEST_P(AttentionTest, BadNumbersReachTheOutput) {
  constexpr int64_t kDim = 8, kKeys = 70;
  for (float bad : {kNan, kInf, -kInf}) {
    Request r({3, kKeys, 1, 1, kDim}, 13);
    r.q[kDim] = bad;  // all scores of row 1
    const auto out = run(r);
    for (int64_t i = 0; i < 3 * kDim; ++i) EXPECT_EQ(std::isnan(out[i]), i / kDim == 1) << bad;
  }
  for (int64_t at : {0, 3, 63, 64, 69}) {
    Request r({3, kKeys, 1, 1, kDim}, 14);
    r.k[at * kDim] = kNan;  // one score of every row
    for (float x : run(r)) EXPECT_TRUE(std::isnan(x)) << at;
    Request w({3, kKeys, 1, 1, kDim}, 15);
    w.v[at * kDim + 2] = kNan;  // one column of v
    const auto out = run(w);
    for (int64_t i = 0; i < 3 * kDim; ++i) EXPECT_EQ(std::isnan(out[i]), i % kDim == 2) << at;
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

TEST_P(AttentionTest, ChargesWhatTheShapesCost) {
  const Request a({3, 70, 4, 2, 8}, 17), b({5, 9, 4, 2, 8}, 18), none({0, 9, 4, 2, 8}, 19);
  std::vector<float> out_a(a.q.size()), out_b(b.q.size());
  Work first, second, third;
  first.bytes = 7;  // is added to
  const AttentionJob jobs[] = {a.job(out_a.data(), &first), b.job(out_b.data(), &second),
                               none.job(nullptr, &third), b.job(out_b.data(), nullptr)};
  attention(table, jobs, 4, 2, 8, 2);
  EXPECT_EQ(first.rows_of(Op::attention), 3);
  EXPECT_EQ(first.flops, 4 * 3 * 70 * 4 * 8);
  EXPECT_EQ(first.bytes, 7 + 2 * 70 * 2 * 8 * 4);
  EXPECT_EQ(second.rows_of(Op::attention), 5);
  EXPECT_EQ(second.flops, 4 * 5 * 9 * 4 * 8);
  EXPECT_EQ(second.bytes, 2 * 9 * 2 * 8 * 4);
  EXPECT_EQ(third.rows_of(Op::attention) + third.flops + third.bytes, 0);
}

TEST_P(AttentionTest, RejectsWhatDoesNotFit) {
  const Request r({3, 5, 4, 2, 8}, 20);
  std::vector<float> out(r.q.size());
  Work work;
  AttentionJob job = r.job(out.data(), &work);
  EXPECT_THROW(attention(table, {&job, 1}, 4, 3, 8, 1), std::logic_error);
  EXPECT_THROW(attention(table, {&job, 1}, 0, 0, 8, 1), std::logic_error);
  EXPECT_THROW(attention(table, {&job, 1}, 4, 2, 0, 1), std::logic_error);
  job.keys = 0;
  EXPECT_THROW(attention(table, {&job, 1}, 4, 2, 8, 1), std::logic_error);
  EXPECT_EQ(work.rows_of(Op::attention) + work.flops + work.bytes, 0);
  EXPECT_NO_THROW(attention(table, {}, 4, 2, 8, 1));
}

}  // namespace
}  // namespace bicache
