#include "engine/progress.h"

#include <utility>

namespace bicache {

Progress::Progress(const RequestInfo& r, const GenerationOptions& o)
    : block_{r.p + r.u, r.p + r.u + *o.block_length},
      first_(r.p + r.u),
      end_(r.n()),
      steps_per_block_(o.steps_per_block()),
      dream_(o.dream()) {}

bool Progress::advance(const Sampler& sampler, const std::vector<int32_t>& canvas, int32_t mask) {
  for (;;) {
    std::vector<int64_t> masked;
    for (int64_t i = block_.begin; i < block_.end; ++i) {
      if (canvas[i] == mask) masked.push_back(i);
    }
    if (block_step_ == 0) masks_ = static_cast<int64_t>(masked.size());
    for (; !masked.empty() && block_step_ < steps_per_block_; ++block_step_) {
      std::vector<int64_t> some = sampler.drawn(decoding(), masked);
      quota = sampler.quota(decoding(), static_cast<int64_t>(some.size()));
      if (dream_ && quota == 0) continue;
      wanted_ = RowSet::of(std::move(some));
      return true;
    }
    if (block_.end == end_) return false;
    block_ = {block_.end, 2 * block_.end - block_.begin};
    block_step_ = block_passes_ = 0;
  }
}

void Progress::committed(RowSet positions) {
  committed_ = std::move(positions);
  ++step;
  ++block_step_;
  ++block_passes_;
  repeat = 0;
}

void Progress::show(StepInfo& at) const {
  at.step = step;
  at.block = block_;
  at.block_step = block_passes_;
  at.wanted = wanted_;
  at.repeat = repeat;
  at.committed = committed_;
}

}  // namespace bicache
