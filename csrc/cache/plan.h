// The seam: a policy decides which rows are recomputed in which layer, as data; the model executes
// it.
//
// What a layer does, in this order (docs/architecture.md section 3):
//   1. join       a row live here and not in the layer below takes its residual from its embedding
//   (layer 0) or from the
//                 prefix entry (later layers; prefix rows only). A row that stops being live just
//                 stops.
//   2. fresh      these rows write K and V.
//   3. select     V of all its rows is computed and overwrites the cached V; the chosen rows then
//   write K too.
//   4. attention  of the recomputed rows (fresh + chosen) over all N keys; a row that is not
//   recomputed lends the K/V it last
//                 wrote in this layer, or the prefix entry's.
//   5. residual   recomputed: delta = attention + FFN; all live rows: x += delta, the cached one
//   where the row was not recomputed.
// Observed rows run beside all this: they read what the other rows read and write nothing, so they
// change nothing. What they would have written is compared with what is lent in their place.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/rows.h"

namespace bicache {

// Since when V moved: since the last pass (dLLM-Cache), or since the row was last recomputed, so
// that slow drift adds up.
enum class Since : uint8_t { last_pass, recompute };

// Of `rows` (a subset of live - fresh) recompute the `count` whose V moved most: lowest cosine, all
// KV heads as one vector; ties: the lower row.
struct Select {
  RowSet rows;
  int64_t count = 0;
  Since since = Since::last_pass;
  bool operator==(const Select&) const = default;
};

struct LayerPlan {
  RowSet live;                 // rows whose residual flows through this layer
  RowSet fresh;                // subset of live: recomputed in full
  std::vector<Select> select;  // disjoint subsets of live - fresh
  bool operator==(const LayerPlan&) const = default;
};

struct LayerSpan {
  int first = 0;  // this plan holds from layer `first` to the next span's
  LayerPlan plan;
};

// Prefix rows that run in layers [first, end) in order to be looked at.
struct Observe {
  RowSet rows;
  int first = 0;  // from their embeddings (0) or from the prefix entry's residual
  int end = 0;
  bool to_entry = false;  // compare with the prefix entry; otherwise with what the rows lend
};

struct StepPlan {
  std::vector<LayerSpan> layers;  // ascending, the first at layer 0
  RowSet logits;                  // positions to predict; empty: a pass that only fills caches
  bool from_entry = false;  // first forget the request's own prefix K/V: lend the entry's again
  Observe observe = {};

  const LayerPlan& at(int layer) const;

  // Every layer: `rows`, all fresh.
  static StepPlan uniform(RowSet rows, RowSet logits);
};

// Rows a plan makes a layer work on: exactly what the forward pass will count.
struct RowCount {
  int64_t recomputed = 0;  // projected, attended, FFN; observed rows too
  int64_t value_only = 0;  // candidates of select that were not chosen: V alone
  bool operator==(const RowCount&) const = default;
};
RowCount predicted_rows(const StepPlan& plan, int layer);

// std::invalid_argument if the plan breaks the rules above: for a request of `n` rows of which `p`
// are shared prefix, on a model with `layers` layers that predicts position i from row i - shift.
void check_plan(const StepPlan& plan, int layers, int64_t n, int64_t p, int shift);

}  // namespace bicache
