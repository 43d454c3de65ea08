// RequestState: the canvas of one request and everything it keeps from pass to pass.
#pragma once

#include <memory>
#include <vector>

#include "cache/layer_cache.h"
#include "cache/prefix_entry.h"
#include "kernels/work.h"

namespace bicache {

struct RequestState {
  std::vector<int32_t> tokens;  // canvas [N]: prompt, then response
  int64_t p = 0;                // shared-prefix rows
  LayerCache cache;
  std::shared_ptr<const PrefixEntry> entry;  // may be null
  std::vector<Work> work;  // [L + 1] of all passes so far; the last: after the layers

  int64_t n() const { return static_cast<int64_t>(tokens.size()); }
};

}  // namespace bicache
