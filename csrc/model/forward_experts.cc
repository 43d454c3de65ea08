// The FFN of a mixture of experts: rows are routed, gathered expert by expert, and their results
// added up.
#include <algorithm>

#include "model/forward.h"
#include "model/routing.h"

namespace bicache {

void Forward::reserve_experts() {
  if (c_.experts == 0) return;
  const DType dtype = model_.weights().dtype;
  ws_.routed.reserve(k_, model_.backend(), DType::f32, total_, c_.dim);
  ws_.gathered.reserve(k_, model_.backend(), dtype, total_, c_.dim);
  ws_.router.reserve(checked_mul(total_, c_.experts, "workspace"));
  ws_.expert.reserve(checked_mul(total_, c_.dim, "workspace"));
}

// ws_.ffn of `rows` from ws_.normed and ws_.routed: a row adds up its experts' outputs times their
// weights in the order of the experts, so that its bits depend on nothing but itself.
void Forward::run_experts(int l, const RowRefs& rows) {
  const LayerWeights& w = model_.weights().layers[l];
  const auto n = static_cast<int64_t>(rows.size());
  const int64_t e = c_.dim;
  multiply(w.router, ws_.routed, ws_.router, 0, rows, l, Op::router);
  const Routing routing(View<const float>(ws_.router.data(), n, c_.experts), c_.experts_per_row);
  std::fill_n(ws_.ffn.data(), n * e, 0.0f);
  RowRefs some;
  for (int64_t x = 0; x < c_.experts; ++x) {
    const auto routed = routing.rows_of(x);
    const auto count = static_cast<int64_t>(routed.size());
    if (count == 0) continue;
    some.clear();
    for (const RoutedRow& r : routed) some.push_back(rows[r.row]);
    for_rows(count, e, [&](int64_t i) { ws_.gathered.copy(i, ws_.normed, routed[i].row); });
    const Ffn& ffn = w.ffn[x];
    gemm_silu_mul(k_, ws_.gathered, ffn.gate, ffn.up, count, ws_.gated,
                  View<float>(ws_.gate.data(), count, c_.ffn), threads_, shares(some, l));
    multiply(ffn.down, ws_.gated, ws_.expert, 0, some, l, Op::down);
    for_rows(count, e, [&](int64_t i) {
      float* y = ws_.ffn.data() + routed[i].row * e;
      const float* add = ws_.expert.data() + i * e;
      for (int64_t j = 0; j < e; ++j) y[j] += routed[i].weight * add[j];
    });
  }
}

}  // namespace bicache
