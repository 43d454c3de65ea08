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

// V of every candidate (compact rows from `at` on) overwrites the cached V; returns the rows whose
// V moved most.
RowRefs Forward::select(int l, int64_t at) {
  RowRefs candidates;
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    for (const Select& s : plan(b, l).select)
      s.rows.for_each([&](int64_t row) { candidates.push_back({b, row}); });
  }
  if (candidates.empty()) return {};
  const LayerWeights& w = model_.weights().layers[l];
  norm(candidates, w.attention_norm, at, ws_.normed);
  multiply(w.v, ws_.normed, ws_.v, at, candidates, l, Op::v);

  RowRefs chosen;
  auto begin = candidates.begin();
  for (int64_t b = 0; b < static_cast<int64_t>(batch_.size()); ++b) {
    const auto first = static_cast<int64_t>(chosen.size());
    for (const Select& s : plan(b, l).select) {
      const auto end = begin + s.rows.size();
      const RowRefs some = choose(l, {begin, end}, at + (begin - candidates.begin()), s);
      chosen.insert(chosen.end(), some.begin(), some.end());
      begin = end;
    }
    std::sort(chosen.begin() + first, chosen.end(),
              [](const RowRef& x, const RowRef& y) { return x.row < y.row; });
  }
  return chosen;
}

// The select.count of `rows` (of one request) with the lowest cosine between their new V (compact
// rows from `at`) and the one they are compared with.
RowRefs Forward::choose(int l, const RowRefs& rows, int64_t at, const Select& select) {
  if (rows.empty()) return {};
  const DType kv = model_.kv_dtype();
  const int64_t width = c_.kv_width();
  LayerCache& cache = request(rows[0].pass).cache;
  const auto past = [&](int64_t row) -> const void* {
    return select.since == Since::recompute ? cache.recomputed_v(l, row) : cache.v(l, row);
  };
  for (const RowRef& r : rows) {
    require(cache.own(l, r.row) && past(r.row) != nullptr, "[plan] layer ", l,
            " select: expected rows with a cached V, got row ", r.row);
  }
  std::vector<std::pair<double, int64_t>> order(rows.size());
  for_rows(static_cast<int64_t>(rows.size()), 4 * width, [&](int64_t i) {
    thread_local Buffer<bf16> scratch;
    const int64_t row = rows[i].row;
    const void* fresh = held(ws_.v.data() + (at + i) * width, kv, scratch);
    const double same = cosine(fresh, past(row), kv, width, 1e-16);
    order[i] = {std::isnan(same) ? -2.0 : same, row};  // NaN: recomputed first
    std::memcpy(cache.v(l, row), fresh, static_cast<size_t>(width * size_bytes(kv)));
  });
  std::sort(order.begin(), order.end());
  RowRefs chosen;
  for (int64_t i = 0; i < select.count; ++i) chosen.push_back({rows[0].pass, order[i].second});
  return chosen;
}

// What a prefix entry keeps of this layer.
void Forward::record(int l) {
  for (size_t b = 0; b < batch_.size(); ++b) {
    PrefixEntry* entry = batch_[b].record;
    if (entry == nullptr) continue;
    LayerCache& cache = batch_[b].request->cache;
    for (int64_t row = 0; row < entry->rows(); ++row) {
      if (l < entry->kv_layers())
        entry->put_kv(l, row, cache.k(l, row), cache.v(l, row), cache.kv_dtype());
      if (entry->has_h(l)) entry->put_h(l, row, residual({static_cast<int64_t>(b), row}));
    }
  }
}

// K and V of one layer of `entry` [p, 2, G, D]: in place, or, where the model has them in f32 and
// the entry in bf16, widened once for all requests of the pass.
const void* Forward::lend(int l, const PrefixEntry* entry) {
  if (entry->types().kv == model_.kv_dtype()) return entry->kv(l);
  internal_check(model_.kv_dtype() == DType::f32,
                 "[plan] prefix entry: expected K and V in bf16, as the model has them, got f32");
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

// y = x, a row of K or V [G, D], as the model holds it.
void Forward::hold(const float* x, void* y) const {
  const int64_t width = c_.kv_width();
  if (model_.kv_dtype() == DType::f32) {
    std::memcpy(y, x, static_cast<size_t>(width) * sizeof(float));
  } else {
    k_.round_to_halves(x, width, static_cast<uint16_t*>(y));
  }
}

// A row of K or V [G, D] as it is held: x itself, or rounded into `scratch`.
const void* Forward::held(const float* x, DType type, Buffer<bf16>& scratch) const {
  if (type == DType::f32) return x;
  scratch.reserve(c_.kv_width());
  k_.round_to_halves(x, c_.kv_width(), &scratch[0].bits);
  return scratch.data();
}

// Of two rows [n] of the same type; exactly 1 where they are equal and not smaller than `least`.
double Forward::cosine(const void* a, const void* b, DType type, int64_t n, double least) const {
  const auto dot = [&](const void* x, const void* y) {
    return static_cast<double>(
        type == DType::f32
            ? k_.dot(static_cast<const float*>(x), static_cast<const float*>(y), n)
            : k_.dot_bf16(static_cast<const bf16*>(x), static_cast<const bf16*>(y), n));
  };
  // The norms as a product in double, which has a root without rounding where both are equal.
  return dot(a, b) / std::max(std::sqrt(dot(a, a) * dot(b, b)), least);
}

// Pass::similarity of this layer: of the observed rows' K and V (compact rows from `at` on) and
// residuals to what stands in their place.
void Forward::compare(int l, const RowRefs& rows, int64_t at) {
  if (rows.empty()) return;
  const int64_t width = c_.kv_width();
  std::vector<float> h(static_cast<size_t>(c_.dim));
  Buffer<bf16> scratch;
  constexpr double kLeast = 1e-30;
  for (size_t i = 0; i < rows.size();) {
    const int64_t b = rows[i].pass;
    const StepPlan& plan = *batch_[b].plan;
    const PrefixEntry* entry = request(b).entry.get();
    const bool with_entry = plan.observe.to_entry && entry != nullptr;
    if (plan.observe.to_entry)
      require(with_entry && l < entry->kv_layers(), "[plan] observe layer ", l,
              ": expected a prefix entry that holds its K/V, got none");
    const DType type = with_entry ? entry->types().kv : model_.kv_dtype();
    const bool with_h = with_entry && entry->has_h(l);
    const auto count = static_cast<double>(observed_[b].size());
    Similarity sum{0, 0, with_h ? 0 : std::numeric_limits<double>::quiet_NaN()};
    for (; i < rows.size() && rows[i].pass == b; ++i) {
      const int64_t row = position(rows[i]), compact = (at + static_cast<int64_t>(i)) * width;
      const auto same = [&](const float* x, const void* there) {
        return cosine(held(x, type, scratch), there, type, width, kLeast);
      };
      sum.k += same(ws_.k.data() + compact, with_entry ? entry->k(l, row) : keys_[b].k[row]);
      sum.v += same(ws_.v.data() + compact, with_entry ? entry->v(l, row) : keys_[b].v[row]);
      if (!with_h) continue;
      entry->get_h(l, row, h.data());
      sum.residual += cosine(residual(rows[i]), h.data(), DType::f32, c_.dim, kLeast);
    }
    batch_[b].similarity[l] = {sum.k / count, sum.v / count, sum.residual / count};
  }
}

}  // namespace bicache
