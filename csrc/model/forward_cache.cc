// What a forward pass reads from and writes to caches: rows chosen by value drift, prefix entries
// that are made, lent or compared with.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "model/forward.h"

namespace bicache {

// The residuals that observed rows begin with.
void Forward::start_observed(int64_t pass, int l) {
  const RequestState& r = request(pass);
  for (int64_t j = 0; j < static_cast<int64_t>(observed_[pass].size()); ++j) {
    const int64_t row = observed_[pass][j];
    float* x = residual({pass, r.n() + j});
    if (l == 0) {
      model_.weights().embed(r.tokens[row], c_.dim, x);
    } else {
      require(r.entry != nullptr && r.entry->has_h(l), "[plan] observe layer ", l,
              ": expected a prefix entry with the residual entering this layer, got none");
      r.entry->get_h(l, row, x);
    }
  }
}

RowRefs Forward::observed(int l) const {
  RowRefs rows;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    const Observe& look = batch_[b].plan->observe;
    if (l < look.first || l >= look.end) continue;
    const int64_t n = batch_[b].request->n();
    for (int64_t j = 0; j < static_cast<int64_t>(observed_[b].size()); ++j)
      rows.push_back({b, n + j});
  }
  return rows;
}

// V of every candidate overwrites the cached V; returns the rows whose V moved most.
RowRefs Forward::select(int l) {
  const LayerWeights& w = model_.weights().layers[l];
  RowRefs chosen;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    std::vector<int64_t> picks;
    for (const Select& s : plan(b, l).select) {
      if (s.rows.empty()) continue;
      RowRefs rows;
      s.rows.for_each([&](int64_t row) { rows.push_back({b, row}); });
      const int64_t at = total_ - static_cast<int64_t>(rows.size());  // behind the fresh rows
      norm(rows, w.attention_norm, at);
      multiply(w.v, ws_.normed, ws_.v, at, rows, l, Op::v);
      const auto some = choose(l, b, s.rows.list(), at, s.count);
      picks.insert(picks.end(), some.begin(), some.end());
    }
    std::sort(picks.begin(), picks.end());
    for (const int64_t row : picks) chosen.push_back({b, row});
  }
  return chosen;
}

// The `count` of `rows` with the lowest cosine between their new V (compact rows from `at`) and the
// cached one.
std::vector<int64_t> Forward::choose(int l, int64_t pass, const std::vector<int64_t>& rows,
                                     int64_t at, int64_t count) {
  const int64_t width = c_.kv_width();
  LayerCache& cache = request(pass).cache;
  std::vector<std::pair<float, int64_t>> order(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    require(cache.own(l, rows[i]), "[plan] layer ", l,
            " select: expected rows with a cached V, got row ", rows[i]);
    const float* fresh = ws_.v.data() + (at + static_cast<int64_t>(i)) * width;
    float* cached = cache.v(l, rows[i]);
    const float norms =
        std::sqrt(k_.dot(fresh, fresh, width)) * std::sqrt(k_.dot(cached, cached, width));
    const float cosine = k_.dot(fresh, cached, width) / std::max(norms, 1e-8f);
    order[i] = {std::isnan(cosine) ? -2.0f : cosine, rows[i]};  // NaN: recomputed first
    std::memcpy(cached, fresh, static_cast<size_t>(width) * sizeof(float));
  }
  std::sort(order.begin(), order.end());
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) chosen.push_back(order[i].second);
  return chosen;
}

// What a prefix entry keeps of this layer.
void Forward::record(int l) {
  for (size_t b = 0; b < batch_.size(); ++b) {
    PrefixEntry* entry = batch_[b].record;
    if (entry == nullptr) continue;
    LayerCache& cache = batch_[b].request->cache;
    for (int64_t row = 0; row < entry->rows(); ++row) {
      if (l < entry->kv_layers()) entry->put_kv(l, row, cache.k(l, row), cache.v(l, row));
      if (entry->has_h(l)) entry->put_h(l, row, residual({static_cast<int64_t>(b), row}));
    }
  }
}

// K and V of one layer of `entry` [p, 2, G, D]: in place, or, where it holds bf16, widened once for
// all requests of the pass.
const float* Forward::lend(int l, const PrefixEntry* entry) {
  if (const float* in_place = entry->kv(l)) return in_place;
  for (const auto& [done, kv] : lent_here_) {
    if (done == entry) return kv;
  }
  if (ws_.lent.size() <= lent_here_.size()) ws_.lent.emplace_back();
  Buffer<float>& out = ws_.lent[lent_here_.size()];
  const int64_t width = 2 * c_.kv_width();
  out.reserve(checked_mul(entry->rows(), width, "workspace"));
  for_rows(entry->rows(), width,
           [&](int64_t row) { entry->get_kv(l, row, out.data() + row * width); });
  lent_here_.emplace_back(entry, out.data());
  return out.data();
}

// keys_ of every request that has rows in this layer. After all K/V writes of the layer.
void Forward::find_keys(int l, const RowRefs& rows) {
  std::fill(keys_.begin(), keys_.end(), Keys{});
  lent_here_.clear();
  int64_t used = 0;
  for (const RowRef& ref : rows) {
    Keys& keys = keys_[ref.pass];
    if (keys.k != nullptr) continue;
    RequestState& r = request(ref.pass);
    keys = {ws_.key_rows.data() + used, ws_.key_rows.data() + used + r.n()};
    used += 2 * r.n();
    const PrefixEntry* entry = r.entry.get();
    const bool lends = entry != nullptr && l < entry->kv_layers() && r.cache.borrows(l, r.p);
    r.cache.key_rows(l, lends ? lend(l, entry) : nullptr, lends ? entry->rows() : 0, keys.k,
                     keys.v);
  }
}

// Pass::similarity of this layer: of the observed rows' K and V (compact rows from `at` on) and
// residuals to what stands in their place.
void Forward::compare(int l, const RowRefs& rows, int64_t at) {
  if (rows.empty()) return;
  const int64_t width = c_.kv_width();
  std::vector<float> kv(static_cast<size_t>(2 * width)), h(static_cast<size_t>(c_.dim));
  const auto cosine = [&](const float* a, const float* b, int64_t n) {
    const double norms = std::sqrt(static_cast<double>(k_.dot(a, a, n)) * k_.dot(b, b, n));
    return static_cast<double>(k_.dot(a, b, n)) / std::max(norms, 1e-30);
  };
  for (size_t i = 0; i < rows.size();) {
    const int64_t b = rows[i].pass;
    const StepPlan& plan = *batch_[b].plan;
    const PrefixEntry* entry = request(b).entry.get();
    const bool with_entry = plan.observe.to_entry && entry != nullptr;
    if (plan.observe.to_entry)
      require(with_entry && l < entry->kv_layers(), "[plan] observe layer ", l,
              ": expected a prefix entry that holds its K/V, got none");
    const bool with_h = with_entry && entry->has_h(l);
    const auto count = static_cast<double>(observed_[b].size());
    Similarity sum{0, 0, with_h ? 0 : std::numeric_limits<double>::quiet_NaN()};
    for (; i < rows.size() && rows[i].pass == b; ++i) {
      const int64_t row = position(rows[i]), compact = (at + static_cast<int64_t>(i)) * width;
      if (with_entry) entry->get_kv(l, row, kv.data());
      sum.k += cosine(ws_.k.data() + compact, with_entry ? kv.data() : keys_[b].k[row], width);
      sum.v +=
          cosine(ws_.v.data() + compact, with_entry ? kv.data() + width : keys_[b].v[row], width);
      if (!with_h) continue;
      entry->get_h(l, row, h.data());
      sum.residual += cosine(residual(rows[i]), h.data(), c_.dim);
    }
    batch_[b].similarity[l] = {sum.k / count, sum.v / count, sum.residual / count};
  }
}

}  // namespace bicache
