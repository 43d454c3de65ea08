// Progress of one request through its blocks and steps, as the decoding rules ask for.
#pragma once

#include <vector>

#include "cache/step_info.h"
#include "engine/sampler.h"

namespace bicache {

class Progress {
 public:
  static constexpr int kMaxRepeats = 8;  // passes without logits a policy may ask for at one step

  Progress() = default;
  // `options` resolved.
  Progress(const RequestInfo& request, const GenerationOptions& options);

  // Moves to the first step that commits something of the first block with masks and steps left;
  // false if there is none. A block without masks is left before anything runs for it; one whose
  // steps are used up is left as it is, as in the reference. Steps in which a rule of Dream's
  // commits nothing change nothing: they are passed over.
  bool advance(const Sampler& sampler, const std::vector<int32_t>& canvas, int32_t mask);
  // After a pass that decided `positions`.
  void committed(RowSet positions);

  // What a policy sees of it.
  void show(StepInfo& at) const;
  // What the sampler sees of it.
  DecodingStep decoding() const {
    const int64_t blocks =
        (block_.begin - first_) / (block_.end - block_.begin);  // before this one
    return {dream_ ? blocks * steps_per_block_ + block_step_ : step, block_step_, masks_};
  }

  int64_t step = 0;   // passes that committed so far
  int repeat = 0;     // passes without logits made at this step
  int64_t quota = 0;  // positions this step commits at least
  const RowSet& wanted() const { return wanted_; }

 private:
  RowSpan block_;
  int64_t first_ = 0, end_ = 0;  // the response's rows
  int64_t steps_per_block_ = 0;
  bool dream_ = false;
  int64_t block_step_ = 0;    // of the block's schedule, steps passed over included
  int64_t block_passes_ = 0;  // that committed in this block
  int64_t masks_ = 0;         // of the block when it began
  RowSet wanted_, committed_;
};

}  // namespace bicache
