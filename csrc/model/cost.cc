#include "model/cost.h"

#include <algorithm>

#include "base/check.h"
#include "model/weights.h"

namespace bicache {
namespace {

// The products of one layer, or the head.
class Counter {
 public:
  Counter(const ModelShape& shape, int64_t requests, Work& work)
      : shape_(shape), requests_(requests), work_(work) {}

  void product(Op op, int64_t rows, int64_t outputs, int64_t inputs) {
    const bool biased = shape_.config.qkv_bias && (op == Op::q || op == Op::k || op == Op::v);
    const int64_t biases = biased ? outputs * static_cast<int64_t>(sizeof(float)) : 0;
    const DType dtype = op == Op::head     ? head_type(shape_.dtype)
                        : op == Op::router ? DType::f32
                                           : shape_.dtype;
    add(op, rows, 1, dtype, outputs, inputs, biases);
  }

  // The FFN of every row, or, by experts, of every row and expert that runs it.
  void ffn(int64_t rows) {
    const ModelConfig& c = shape_.config;
    int64_t matrices = 1;
    if (c.experts > 0) {
      product(Op::router, rows, c.experts, c.dim);
      rows *= c.experts_per_row;
      matrices = std::min(c.experts, requests_ * rows);
    }
    add(Op::gate, rows, matrices, shape_.dtype, c.ffn, c.dim, 0);
    add(Op::up, rows, matrices, shape_.dtype, c.ffn, c.dim, 0);
    add(Op::down, rows, matrices, shape_.dtype, c.dim, c.ffn, 0);
  }

  void attention(int64_t rows, int64_t keys) {
    if (rows == 0) return;
    const ModelConfig& c = shape_.config;
    work_.rows_of(Op::attention) += requests_ * rows;
    work_.flops += 4 * requests_ * rows * keys * c.q_width();
    work_.bytes += 2 * requests_ * keys * c.kv_width() * bicache::size_bytes(shape_.kv_dtype);
  }

  // Rows that are projected together.
  void project(int64_t rows, int64_t keys, bool with_value) {
    const ModelConfig& c = shape_.config;
    product(Op::q, rows, c.q_width(), c.dim);
    product(Op::k, rows, c.kv_width(), c.dim);
    if (with_value) product(Op::v, rows, c.kv_width(), c.dim);
    attention(rows, keys);
  }

 private:
  void add(Op op, int64_t rows, int64_t matrices, DType dtype, int64_t outputs, int64_t inputs,
           int64_t biases) {
    if (rows == 0) return;
    work_.rows_of(op) += requests_ * rows;
    work_.flops += 2 * requests_ * rows * outputs * inputs;
    work_.bytes +=
        matrices * Matrix::size_bytes(*shape_.kernels, shape_.backend, dtype, outputs, inputs) +
        biases;
  }

  const ModelShape& shape_;
  int64_t requests_;
  Work& work_;
};

}  // namespace

int64_t ModelShape::weight_bytes() const {
  const ModelConfig& c = config;
  const auto matrix = [&](int64_t outputs, int64_t inputs, DType kept) {
    return Matrix::size_bytes(*kernels, backend, kept, outputs, inputs);
  };
  const int64_t ffn = 2 * matrix(c.ffn, c.dim, dtype) + matrix(c.dim, c.ffn, dtype);
  const int64_t router = c.experts > 0 ? matrix(c.experts, c.dim, DType::f32) : 0;
  const int64_t layer = 2 * matrix(c.kv_width(), c.dim, dtype) + matrix(c.q_width(), c.dim, dtype) +
                        matrix(c.dim, c.q_width(), dtype) + router +
                        checked_mul(std::max<int64_t>(c.experts, 1), ffn, "weights");
  const int64_t biases = c.qkv_bias ? c.q_width() + 2 * c.kv_width() : 0;
  const int64_t norms = c.layers * (2 * c.dim + (c.qk_norm ? 2 * c.head_dim : 0)) + c.dim;
  checked_mul(checked_mul(c.layers, layer, "weights"), 2, "weights");  // twice: room for the rest
  return c.layers * layer + matrix(c.vocab, c.dim, head_type(dtype)) +
         c.embeddings * c.dim *
             bicache::size_bytes(dtype == DType::f32 ? DType::f32 : DType::bf16) +
         (norms + c.layers * biases) * static_cast<int64_t>(sizeof(float));
}

std::vector<Work> predicted_work(const ModelShape& shape, const StepPlan& plan, int64_t n,
                                 int64_t requests) {
  const ModelConfig& c = shape.config;
  std::vector<Work> work(static_cast<size_t>(c.layers) + 1);
  for (int l = 0; l < c.layers; ++l) {
    Counter count(shape, requests, work[l]);
    const LayerPlan& lp = plan.at(l);
    int64_t candidates = 0, chosen = 0, observed = 0;
    for (const Select& s : lp.select) {
      candidates += s.rows.size();
      chosen += s.count;
    }
    if (plan.observe.first <= l && l < plan.observe.end) observed = plan.observe.rows.size();
    count.project(lp.fresh.size(), n, true);
    count.product(Op::v, candidates, c.kv_width(), c.dim);
    count.project(chosen, n, false);
    count.project(observed, n, true);
    const int64_t rows = lp.fresh.size() + chosen + observed;
    count.product(Op::attention_out, rows, c.dim, c.q_width());
    count.ffn(rows);
  }
  Counter(shape, requests, work.back()).product(Op::head, plan.logits.size(), c.vocab, c.dim);
  return work;
}

}  // namespace bicache
