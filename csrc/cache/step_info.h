// What a policy sees: the request, and one step of it.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cache/rows.h"

namespace bicache {

// Which rows count when the share of prefix rows is read off (BiCache sections 3.1 and 3.2): the
// published run time divides by p + u + g, the published profiler by p + u.
enum class RatioOf : uint8_t { request, prompt };

// What is known of a request before it runs.
struct RequestInfo {
  int layers = 0;  // L
  int64_t p = 0;   // shared-prefix rows
  int64_t u = 0;   // the request's own prompt rows
  int64_t g = 0;   // response rows
  int shift = 0;   // position i is predicted from row i - shift

  int64_t n() const { return p + u + g; }
  // round(100 p / (p + u + g)), or of p + u; half to even, as Python rounds. 0 without rows.
  int ratio(RatioOf of = RatioOf::request) const;
};

// How alike two states of the same prefix rows are in one layer: mean cosine over the rows, all KV
// heads as one vector. NaN: not measured.
struct Similarity {
  double k = std::numeric_limits<double>::quiet_NaN();
  double v = std::numeric_limits<double>::quiet_NaN();
  double residual = std::numeric_limits<double>::quiet_NaN();  // entering the layer

  double kv() const { return (k + v) / 2; }
};

struct StepInfo {
  RequestInfo request;
  int64_t step = 0;        // passes that committed so far, from the request's start, across blocks
  RowSpan block;           // current block: rows [begin, end)
  int64_t block_step = 0;  // the same, within this block
  RowSet wanted;           // positions to choose from: the block's masks, or those drawn (origin)
  int repeat = 0;          // passes already made at this step (after a pass without logits)
  RowSet committed;        // positions that the step before decided
  int64_t first_row =
      0;  // first row the policy speaks for: p when another one speaks for the shared prefix

  int depth = -1;               // b in force; -1: none was chosen yet
  int64_t refreshed_step = -1;  // the step at which it was chosen
  // Of the rows last observed, per layer (StepPlan::observe), NaN in those not looked at; empty:
  // none were.
  std::vector<Similarity> to_entry;  // their state in this request to the prefix entry's
  std::vector<Similarity> to_own;    // to what this request holds since it was last refreshed
};

}  // namespace bicache
