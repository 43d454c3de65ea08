// Engine: a loaded model, its prefix store, and the generation loop: plan -> forward -> sample ->
// commit.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cache/discovery.h"
#include "cache/policy.h"
#include "cache/prefix_file.h"
#include "cache/prefix_store.h"
#include "engine/options.h"
#include "engine/progress.h"
#include "engine/sampler.h"
#include "model/model.h"

namespace bicache {

struct Request {
  std::vector<int32_t> prompt;  // [p + u]
  int64_t prefix = 0;           // how many of them are shared; never changed by what their ids are
  GenerationOptions options;
  PolicyPtr policy;
  std::string salt;                       // requests with different salts share no prefix entry
  std::optional<DiscoveryRule> discover;  // where `prefix` is 0: look for one when it is admitted
  std::vector<int32_t> response = {};     // [g]: what stands there already, and masks to fill;
                                          // empty: all masks
};

// One committed step of one request.
struct StepEvent {
  size_t request = 0;  // index in the generation
  int64_t step = 0;
  std::vector<Commit> commits;  // by position
  std::vector<int32_t> canvas;  // [N] after the step
};

struct RequestStats {
  std::vector<Work> work;  // [L + 1]: every pass of the request, unconditional ones too; the last:
                           // the head
  std::vector<Work> entry_work;    // [L + 1]: making the prefix entry, where this request had to
  std::optional<bool> prefix_hit;  // none: its policy reads no prefix entry
  int64_t prefix_tokens = 0;       // p
  int depth = -1;                  // reusable depth b in force last; -1: the policy has none
  std::string depth_reason;        // why
  std::vector<int> depths;         // as chosen, refresh by refresh
  int64_t refreshes = 0;           // passes that recomputed prefix rows from the entry
  int64_t steps = 0;               // passes that committed tokens
  int64_t passes = 0;
  int64_t cache_bytes = 0;  // K/V and deltas of this request alone
  double seconds = 0;       // from its admission to its end

  void note(const DepthChoice& choice) {
    depth = choice.depth;
    depth_reason = choice.why;
    depths.push_back(choice.depth);
  }
  // A pass of a model of `layers` layers.
  void note(const StepPlan& plan, int layers) {
    ++passes;
    // from_entry: there are prefix rows, of which row 0 is one
    if (plan.from_entry && plan.at(layers - 1).live.contains(int64_t{0})) ++refreshes;
  }
};

struct Result {
  std::vector<int32_t> tokens;     // [g]
  std::vector<float> confidences;  // [g]; NaN: never committed
  std::string finish_reason;       // eos | stop | length | cancelled
  RequestStats stats;
};

class Engine {
 public:
  // `prefix_dtype`: how prefix entries are held, f32 or bf16; see entry_types.
  Engine(std::shared_ptr<const Model> model, int threads, int64_t prefix_budget_bytes,
         DType prefix_dtype = DType::f32);

  const Model& model() const { return *model_; }
  int threads() const { return threads_; }
  PrefixStore& store() { return store_; }
  DType prefix_dtype() const { return prefix_dtype_; }
  EntryTypes entry_types() const { return bicache::entry_types(model_->kv_dtype(), prefix_dtype_); }
  // What the store's entries belong to: this model, and the way it computes.
  StoreShape store_shape() const;
  // Forgets all prefix entries and what discovery has seen.
  void clear_prefixes();
  // Makes the entry that `policy` reads of this prefix, unless it is there; whether it is kept.
  bool warm(const std::vector<int32_t>& prefix, const Policy& policy, const std::string& salt);
  // Of every pass from now on; empty: off.
  void set_tap(Tap tap);

  // logits [positions.size(), V] of `positions` of a canvas, everything recomputed.
  void forward(std::vector<int32_t> tokens, const std::vector<int64_t>& positions, float* logits);

 private:
  friend class Generation;
  // Holds the engine for one pass. std::runtime_error where this thread holds it already, which is
  // a call from inside a tap or hook: it would wait for itself for ever.
  class Turn {
   public:
    explicit Turn(Engine& engine);
    ~Turn();

   private:
    Engine& engine_;
  };

  // The entry of a canvas's first info.p rows: found, or made (which `stats` records); null if
  // nothing is needed.
  PrefixStore::Entry prefix_entry(EntryNeeds needs, const RequestInfo& info,
                                  const std::vector<int32_t>& canvas, const std::string& salt,
                                  RequestStats& stats);
  // Rows of a request that came without a prefix to take as one; 0: none, or none worth it.
  int64_t discover(const Request& request);

  std::shared_ptr<const Model> model_;
  int threads_;
  PrefixStore store_;
  DType prefix_dtype_;
  Discovery discovery_;
  std::mutex mutex_;                         // one pass at a time: workspace and tap
  std::atomic<std::thread::id> owner_ = {};  // who holds it
  Workspace workspace_;
  Tap tap_;
};

// Requests under way. Steps may be called from any thread, one at a time; cancel() and stop() from
// any thread at any time.
class Generation {
 public:
  // Checks every request before anything runs: std::invalid_argument "[generate] request I ...". At
  // most `batch_rows` rows ride in one pass (one request always does); requests are admitted in
  // order.
  Generation(std::shared_ptr<Engine> engine, std::vector<Request> requests, int64_t batch_rows);

  bool done() const { return finished_ == static_cast<int64_t>(requests_.size()); }
  int64_t finished() const { return finished_; }
  int64_t steps_done() const { return steps_done_; }
  int64_t steps_total() const { return steps_total_; }

  // One pass of the batch; what it committed.
  std::vector<StepEvent> step();
  // The request ends before its next pass, with the canvas as it is.
  void cancel(size_t request);
  // The same, of a request whose text has ended: what is still masked becomes its first end token.
  void stop(size_t request);
  // One per request, in order. std::logic_error before done().
  std::vector<Result> results() const;

 private:
  // A canvas with its caches, and what the policy has measured on it: the request's own, and, with
  // cfg_scale, one whose prompt is masked.
  struct Branch {
    RequestState state;
    StepInfo at;  // the next step; its progress is that of the request
  };
  struct Active {
    size_t index = 0;
    RequestInfo info;
    std::vector<Branch> branches;  // empty: it has ended
    Progress progress;
    std::vector<float> confidences;  // [g]
    RequestStats stats;
    std::chrono::steady_clock::time_point begin;

    std::vector<int32_t>& canvas() { return branches[0].state.tokens; }
    std::span<const int32_t> response() const {
      return std::span(branches[0].state.tokens).last(static_cast<size_t>(info.g));
    }
  };

  void check(size_t index);
  RequestInfo info(const Request& request) const;
  void admit();
  std::unique_ptr<Active> start(size_t index);
  Branch branch(const Request& request, Active& a, std::vector<int32_t> canvas, bool runs);
  StepPlan plan(Active& a, Branch& branch);
  bool advance(Active& a);
  void commit(Active& a, const StepPlan& plan, View<float> logits, std::vector<StepEvent>& events);
  // What somebody asked of a request under way.
  enum class Ask : uint8_t { nothing, cancel, stop };
  void ask(size_t request, Ask what);
  bool complete(size_t index, std::span<const int32_t> response) const;
  void finish(Active& a, std::string_view reason);
  void sweep();

  std::shared_ptr<Engine> engine_;
  std::vector<Request> requests_;
  std::vector<Result> results_;
  std::vector<std::atomic<Ask>> asked_;
  int64_t batch_rows_;
  size_t next_ = 0;  // first request that was not admitted yet
  std::vector<std::unique_ptr<Active>> active_;
  std::atomic<int64_t> finished_ = 0, steps_done_ = 0;
  int64_t steps_total_ = 0;
  bool failed_ = false;
};

}  // namespace bicache
