// The forward pass: executes one StepPlan per request. See cache/plan.h for what a layer does, in
// order.
#include "model/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/attention.h"

namespace bicache {

void Forward::begin() {
  ws_.residual.resize(std::max(ws_.residual.size(), batch_.size()));
  keys_.resize(batch_.size());
  for (size_t b = 0; b < batch_.size(); ++b) {
    RequestState& r = *batch_[b].request;
    const StepPlan& plan = *batch_[b].plan;
    check_plan(plan, c_.layers, r.n(), r.p, c_.shift);
    observed_.push_back(plan.observe.rows.list());
    batch_[b].similarity.assign(observed_[b].empty() ? 0 : plan.observe.end, {});
    const int64_t rows = r.n() + static_cast<int64_t>(observed_[b].size());
    ws_.residual[b].reserve(rows * c_.dim);
    if (plan.from_entry) r.cache.forget_prefix(r.p);
    total_ += rows;
    prepare_rope(r.n());
  }
  for (Buffer<float>* b : {&ws_.attention, &ws_.ffn})
    b->reserve(checked_mul(total_, c_.dim, "workspace"));
  for (Buffer<float>* b : {&ws_.q, &ws_.mixed})
    b->reserve(checked_mul(total_, c_.q_width(), "workspace"));
  for (Buffer<float>* b : {&ws_.k, &ws_.v})
    b->reserve(checked_mul(total_, c_.kv_width(), "workspace"));
  const DType dtype = model_.weights().dtype;
  if (is_quantised(dtype) || model_.backend() == Backend::blas)
    ws_.gate.reserve(checked_mul(total_, c_.ffn, "workspace"));
  ws_.normed.reserve(k_, model_.backend(), dtype, total_, c_.dim);
  ws_.mixed_in.reserve(k_, model_.backend(), dtype, total_, c_.q_width());
  ws_.gated.reserve(k_, model_.backend(), dtype, total_, c_.ffn);
  reserve_experts();
  ws_.key_rows.resize(static_cast<size_t>(2 * total_));
}

// cos and sin of RoPE's angles for positions [0, rows). In float32, as LLaDA computes them.
void Forward::prepare_rope(int64_t rows) {
  if (rows <= ws_.rope_rows) return;
  rows = std::min(c_.context, std::max(rows, 2 * ws_.rope_rows));
  const int64_t half = c_.head_dim / 2, size = checked_mul(rows, half, "rope");
  ws_.cos.reserve(size);
  ws_.sin.reserve(size);
  for (int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(c_.head_dim);
    const float frequency = 1.0f / std::pow(static_cast<float>(c_.rope_theta), exponent);
    for (int64_t n = 0; n < rows; ++n) {
      const float angle = static_cast<float>(n) * frequency;
      ws_.cos[n * half + i] = std::cos(angle);
      ws_.sin[n * half + i] = std::sin(angle);
    }
  }
  ws_.rope_rows = rows;
}

void Forward::layer(int l) {
  for (Pass& pass : batch_) pass.request->cache.begin_layer(l);
  join(l);
  RowRefs rows;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    plan(b, l).fresh.for_each([&](int64_t row) { rows.push_back({b, row}); });
  }
  const auto fresh = static_cast<int64_t>(rows.size());
  project(l, rows, 0, true, true);
  const RowRefs chosen = select(l, fresh);
  project(l, chosen, fresh, false, true);
  record(l);
  rows.insert(rows.end(), chosen.begin(), chosen.end());
  const auto written = static_cast<int64_t>(rows.size());
  const RowRefs looked_at = observed(l);
  project(l, looked_at, written, true, false);
  rows.insert(rows.end(), looked_at.begin(), looked_at.end());
  find_keys(l, rows);
  compare(l, looked_at, written);
  const int64_t sections[] = {fresh, written, static_cast<int64_t>(rows.size())};
  attend(l, rows, sections);
  finish(l, rows, static_cast<int64_t>(looked_at.size()));
  carry(l, rows);
}

void Forward::join(int l) {
  RowRefs live;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    const RowSet& now = plan(b, l).live;
    const RequestState& r = request(b);
    (l == 0 ? now : now.minus(plan(b, l - 1).live)).for_each([&](int64_t row) {
      float* x = residual({b, row});
      if (l == 0) {
        model_.weights().embed(r.tokens[row], c_.dim, x);
      } else {
        require(r.entry != nullptr && r.entry->has_h(l) && row < r.entry->rows(), "[plan] layer ",
                l, " row ", row,
                ": joins late, expected a prefix entry with the residual entering this layer, got "
                "none");
        r.entry->get_h(l, row, x);
      }
    });
    if (l == batch_[b].plan->observe.first) start_observed(b, l);
    if (tap_) now.for_each([&](int64_t row) { live.push_back({b, row}); });
  }
  if (!tap_) return;
  for (size_t i = 0; i < live.size(); ++i) {
    std::memcpy(ws_.ffn.data() + i * c_.dim, residual(live[i]),
                static_cast<size_t>(c_.dim) * sizeof(float));
  }
  show(l, "residual", ws_.ffn.data(), static_cast<int64_t>(live.size()), c_.dim);
}

std::vector<Share> Forward::shares(const RowRefs& rows, int l) {
  std::vector<Share> shares;
  for (const RowRef& r : rows) {
    Work* work = &request(r.pass).work[l];
    if (shares.empty() || shares.back().work != work) shares.push_back({work, 0});
    ++shares.back().rows;
  }
  return shares;
}

void Forward::norm(const RowRefs& rows, const Buffer<float>& weight, int64_t at, Activations& out) {
  for_rows(static_cast<int64_t>(rows.size()), c_.dim,
           [&](int64_t i) { norm_row(residual(rows[i]), weight, out, at + i); });
}

void Forward::norm_row(const float* x, const Buffer<float>& weight, Activations& out, int64_t row,
                       Activations* also) {
  thread_local Buffer<float> y;
  y.reserve(c_.dim);
  k_.rms_norm(x, weight.data(), c_.norm_eps, c_.dim, y.data());
  out.set(row, y.data());
  if (also != nullptr) also->set(row, y.data());
}

void Forward::multiply(const Matrix& w, const Activations& in, Buffer<float>& out, int64_t at,
                       const RowRefs& rows, int l, Op op, Write write) {
  const auto n = static_cast<int64_t>(rows.size());
  gemm(k_, in, at, w, View<float>(out.data() + at * w.outputs(), n, w.outputs()), write, threads_,
       op, shares(rows, l));
}

// Q, K and V of `rows` into the compact matrices from row `at` on; if `keep`, K (and V) into the
// requests' caches.
void Forward::project(int l, const RowRefs& rows, int64_t at, bool with_value, bool keep) {
  if (rows.empty()) return;
  const LayerWeights& w = model_.weights().layers[l];
  const int64_t q_width = c_.q_width(), kv_width = c_.kv_width(), d = c_.head_dim;
  norm(rows, w.attention_norm, at, ws_.normed);
  multiply(w.q, ws_.normed, ws_.q, at, rows, l, Op::q);
  multiply(w.k, ws_.normed, ws_.k, at, rows, l, Op::k);
  if (with_value) multiply(w.v, ws_.normed, ws_.v, at, rows, l, Op::v);

  const auto heads = [&](float* x, int64_t count, const Buffer<float>& norm_weight, int64_t row) {
    for (int64_t h = 0; h < count; ++h, x += d) {
      if (c_.qk_norm) k_.rms_norm(x, norm_weight.data(), c_.norm_eps, d, x);
      k_.rope(x, ws_.cos.data() + row * d / 2, ws_.sin.data() + row * d / 2, d);
    }
  };
  for_rows(static_cast<int64_t>(rows.size()), q_width + kv_width, [&](int64_t i) {
    LayerCache& cache = request(rows[i].pass).cache;
    const int64_t row = position(rows[i]);
    float *q = ws_.q.data() + (at + i) * q_width, *k = ws_.k.data() + (at + i) * kv_width;
    heads(q, c_.heads, w.q_norm, row);
    heads(k, c_.kv_heads, w.k_norm, row);
    if (!keep) return;
    hold(k, cache.k(l, row));
    if (with_value) hold(ws_.v.data() + (at + i) * kv_width, cache.v(l, row));
    cache.recomputed(l, row);
    cache.wrote(l, row);
  });
  if (!keep) return;
  const auto n = static_cast<int64_t>(rows.size());
  show(l, "q", ws_.q.data() + at * q_width, n, q_width);
  show(l, "k", ws_.k.data() + at * kv_width, n, kv_width);
  if (with_value) show(l, "v", ws_.v.data() + at * kv_width, n, kv_width);
}

// mixed = attention of `rows` over all keys. Within a section (which ends at `sections`), rows
// stand in order of requests.
void Forward::attend(int l, const RowRefs& rows, std::span<const int64_t> sections) {
  std::vector<AttentionJob> jobs;
  int64_t end = 0;
  for (const int64_t limit : sections) {
    for (int64_t i = end; i < limit; i = end) {
      const int64_t b = rows[i].pass;
      while (end < limit && rows[end].pass == b) ++end;
      RequestState& r = request(b);
      jobs.push_back({ws_.q.data() + i * c_.q_width(), ws_.mixed.data() + i * c_.q_width(), end - i,
                      keys_[b].k, keys_[b].v, r.n(), &r.work[l]});
    }
  }
  attention(k_, jobs, c_.heads, c_.kv_heads, c_.head_dim, model_.kv_dtype(), threads_);
}

// Output projection, FFN and residual of the recomputed rows, the last `observed` of which are only
// looked at. A row takes the sum of both outputs in one step, so that a row which is not recomputed
// gets the same bits from its delta.
void Forward::finish(int l, const RowRefs& rows, int64_t observed) {
  if (rows.empty()) return;
  const LayerWeights& w = model_.weights().layers[l];
  const auto n = static_cast<int64_t>(rows.size());
  const int64_t e = c_.dim;
  for_rows(n, c_.q_width(),
           [&](int64_t i) { ws_.mixed_in.set(i, ws_.mixed.data() + i * c_.q_width()); });
  multiply(w.attention_out, ws_.mixed_in, ws_.attention, 0, rows, l, Op::attention_out);
  show(l, "attention", ws_.attention.data(), n - observed, e);
  for_rows(n, e, [&](int64_t i) {
    float* y = ws_.ffn.data() + i * e;  // x + attention
    std::memcpy(y, residual(rows[i]), static_cast<size_t>(e) * sizeof(float));
    k_.add(y, ws_.attention.data() + i * e, e);
    norm_row(y, w.ffn_norm, ws_.normed, i, c_.experts > 0 ? &ws_.routed : nullptr);
  });
  if (c_.experts > 0) {
    run_experts(l, rows);
  } else {
    const Ffn& ffn = w.ffn[0];
    gemm_silu_mul(k_, ws_.normed, ffn.gate, ffn.up, n, ws_.gated,
                  View<float>(ws_.gate.data(), n, c_.ffn), threads_, shares(rows, l));
    if (tap_) {
      multiply(ffn.down, ws_.gated, ws_.ffn, 0, rows, l, Op::down);
    } else {
      multiply(ffn.down, ws_.gated, ws_.attention, 0, rows, l, Op::down, Write::add);
    }
  }
  if (c_.experts > 0 || tap_) {
    show(l, "ffn", ws_.ffn.data(), n - observed, e);
    for_rows(n, e,
             [&](int64_t i) { k_.add(ws_.attention.data() + i * e, ws_.ffn.data() + i * e, e); });
  }
  for_rows(n, e, [&](int64_t i) {
    float* step = ws_.attention.data() + i * e;
    k_.add(residual(rows[i]), step, e);
    if (i >= n - observed) return;
    if (float* delta = request(rows[i].pass).cache.delta(l, rows[i].row))
      std::memcpy(delta, step, static_cast<size_t>(e) * sizeof(float));
  });
}

// Live rows that were not recomputed take their cached delta.
void Forward::carry(int l, const RowRefs& rows) {
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    const LayerPlan& lp = plan(b, l);
    if (lp.live == lp.fresh) continue;
    std::vector<int64_t> done;
    for (const RowRef& r : rows) {
      if (r.pass == b) done.push_back(r.row);
    }
    lp.live.minus(RowSet::of(std::move(done))).for_each([&](int64_t row) {
      const float* delta = request(b).cache.delta(l, row);
      require(delta != nullptr, "[plan] layer ", l, " row ", row,
              ": live but not recomputed, expected its policy to keep its delta, got none");
      k_.add(residual({b, row}), delta, c_.dim);
    });
  }
}

void Forward::predict() {
  RowRefs rows;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    batch_[b].plan->logits.for_each(
        [&](int64_t i) { rows.push_back({b, std::max<int64_t>(i - c_.shift, 0)}); });
  }
  const auto n = static_cast<int64_t>(rows.size());
  const Matrix& head = model_.weights().head;
  ws_.final_normed.reserve(k_, model_.backend(), head.dtype(), n, c_.dim);
  float* logits = batch_.size() == 1 ? batch_[0].logits_to : nullptr;
  if (logits == nullptr) {
    ws_.logits.reserve(checked_mul(n, c_.vocab, "logits"));
    logits = ws_.logits.data();
  }
  norm(rows, model_.weights().final_norm, 0, ws_.final_normed);
  gemm(k_, ws_.final_normed, 0, head, View<float>(logits, n, c_.vocab), Write::set, threads_,
       Op::head, shares(rows, c_.layers));
  show(c_.layers, "logits", logits, n, c_.vocab);
  int64_t at = 0;
  for (Pass& pass : batch_) {
    const int64_t count = pass.plan->logits.size();
    pass.logits = View<float>(logits + at * c_.vocab, count, c_.vocab);
    at += count;
  }
}

void Model::forward(std::span<Pass> batch, Workspace& workspace, int threads,
                    const Tap& tap) const {
  Forward(*this, batch, workspace, threads, tap).run();
}

}  // namespace bicache
