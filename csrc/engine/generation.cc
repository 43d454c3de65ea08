#include <algorithm>
#include <limits>
#include <stdexcept>

#include "base/check.h"
#include "engine/engine.h"

namespace bicache {
namespace {

constexpr int kMaxRepeats = 8;  // passes without logits a policy may ask for at one step

}  // namespace

Generation::Generation(std::shared_ptr<Engine> engine, std::vector<Request> requests,
                       int64_t batch_rows)
    : engine_(std::move(engine)),
      requests_(std::move(requests)),
      results_(requests_.size()),
      cancelled_(requests_.size()),
      batch_rows_(batch_rows) {
  require(batch_rows >= 1, "[generate] batch_rows: expected >= 1, got ", batch_rows);
  for (size_t i = 0; i < requests_.size(); ++i) check(i);
}

void Generation::check(size_t index) {
  Request& r = requests_[index];
  const ModelConfig& c = engine_->model().config();
  try {
    r.options.resolve();
    const auto prompt = static_cast<int64_t>(r.prompt.size());
    require(prompt > 0, "[generate] prompt: expected at least one token, got none");
    require(0 <= r.prefix && r.prefix <= prompt, "[generate] prefix: expected 0..", prompt,
            " tokens of the prompt, got ", r.prefix);
    require(prompt <= c.context && r.options.gen_length <= c.context - prompt,
            "[generate] prompt (", prompt, ") + gen_length (", r.options.gen_length,
            "): expected at most ", c.context, " tokens (the model's context), got ",
            prompt + r.options.gen_length);
    for (int64_t i = 0; i < prompt; ++i) {
      require(0 <= r.prompt[i] && r.prompt[i] < c.embeddings, "[generate] prompt token ", i,
              ": expected an id of 0..", c.embeddings - 1, ", got ", r.prompt[i]);
    }
    require(
        !r.options.logits_eos_inf || c.eos_token_id >= 0,
        "[generate] logits_eos_inf: expected a model with an end-of-text token, got one without");
    require(
        !r.options.confidence_eos_eot_inf || c.eos_token_id >= 0 || c.eot_token_id >= 0,
        "[generate] confidence_eos_eot_inf: expected a model with an end-of-text or end-of-turn "
        "token, got one without");
    r.policy->check(info(r));
    if (r.discover) {
      require(r.discover->min_tokens >= 1, "[generate] discover min_tokens: expected >= 1, got ",
              r.discover->min_tokens);
      require(r.discover->min_requests >= 2,
              "[generate] discover min_requests: expected >= 2, got ", r.discover->min_requests);
    }
  } catch (const std::invalid_argument& e) {
    if (requests_.size() == 1) throw;
    fail(e.what(), " (request ", index, ")");
  }
  steps_total_ += *r.options.steps;
}

RequestInfo Generation::info(const Request& r) const {
  const ModelConfig& c = engine_->model().config();
  const auto prompt = static_cast<int64_t>(r.prompt.size());
  // A model that predicts from the row before needs the last prompt row in this request's own
  // context.
  const int64_t p = std::min(r.prefix, prompt - c.shift);
  return {c.layers, p, prompt - p, r.options.gen_length, c.shift};
}

std::unique_ptr<Generation::Active> Generation::start(size_t index) {
  Request& r = requests_[index];
  const Model& model = engine_->model();
  auto a = std::make_unique<Active>();
  a->begin = std::chrono::steady_clock::now();
  a->index = index;
  if (r.discover && r.prefix == 0 && !cancelled_[index]) {
    r.prefix = engine_->discover(r);
  }
  a->info = info(r);
  std::vector<int32_t> canvas = r.prompt;
  canvas.resize(static_cast<size_t>(a->info.n()), model.config().mask_token_id);
  std::shared_ptr<const PrefixEntry> entry;
  if (!cancelled_[index])
    entry = engine_->prefix_entry(r.policy->needs(a->info), a->info, canvas, r.salt, a->stats);
  a->state = model.make_request(std::move(canvas), a->info.p, r.policy->kept(a->info));
  a->state.entry = std::move(entry);
  a->stats.prefix_tokens = a->info.p;
  a->stats.cache_bytes = a->state.cache.size_bytes();
  a->confidences.assign(static_cast<size_t>(a->info.g), std::numeric_limits<float>::quiet_NaN());
  a->at.request = a->info;
  const int64_t first = a->info.p + a->info.u;
  a->at.block = {first, first + *r.options.block_length};
  next_block(*a);
  return a;
}

void Generation::admit() {
  int64_t rows = 0;
  for (const auto& a : active_) rows += a->state.n();
  while (next_ < requests_.size()) {
    const Request& r = requests_[next_];
    const int64_t n = static_cast<int64_t>(r.prompt.size()) + r.options.gen_length;
    if (!active_.empty() && rows + n > batch_rows_) return;
    rows += n;
    active_.push_back(start(next_++));
  }
}

// Moves to the first block with masks and steps left and sets `wanted`; false if there is none. A
// block without masks is left before anything runs for it; one whose steps are used up is left as
// it is, as in the reference.
bool Generation::next_block(Active& a) const {
  const GenerationOptions& o = requests_[a.index].options;
  const int32_t mask = engine_->model().config().mask_token_id;
  for (;;) {
    std::vector<int64_t> masked;
    for (int64_t i = a.at.block.begin; i < a.at.block.end; ++i) {
      if (a.state.tokens[i] == mask) masked.push_back(i);
    }
    if (a.at.block_step == 0) a.block_masks = static_cast<int64_t>(masked.size());
    if (!masked.empty() && a.at.block_step < o.steps_per_block()) {
      a.at.wanted = RowSet::of(std::move(masked));
      return true;
    }
    if (a.at.block.end == a.info.n()) return false;
    a.at.block = {a.at.block.end, a.at.block.end + *o.block_length};
    a.at.block_step = 0;
  }
}

std::vector<StepEvent> Generation::step() {
  const Engine::Turn turn(*engine_);
  if (failed_) throw std::runtime_error("[generate] an earlier step of this generation failed");
  failed_ = true;  // until this step has ended well
  admit();
  for (auto& a : active_) {
    if (cancelled_[a->index]) finish(*a, "cancelled");
  }
  sweep();
  std::vector<StepPlan> plans;
  plans.reserve(active_.size());
  std::vector<Pass> batch;
  for (auto& a : active_) {
    const Policy& policy = *requests_[a->index].policy;
    if (const auto choice = settle(policy, a->at); choice && a->info.p > 0) {
      a->stats.depth = choice->depth;
      a->stats.depth_reason = choice->why;
      a->stats.depths.push_back(choice->depth);
    }
    plans.push_back(policy.plan(a->at));
    require(a->at.wanted.contains(plans.back().logits),
            "[plan] logits: expected masked positions of the block (", a->at.wanted.str(),
            "), got ", plans.back().logits.str());
    batch.push_back({&a->state, &plans.back(), nullptr, {}});
  }
  std::vector<StepEvent> events;
  if (!batch.empty())
    engine_->model_->forward(batch, engine_->workspace_, engine_->threads_, engine_->tap_);
  for (size_t i = 0; i < batch.size(); ++i) {
    Active& a = *active_[i];
    if (!batch[i].similarity.empty())
      (plans[i].observe.to_entry ? a.at.to_entry : a.at.to_own) = std::move(batch[i].similarity);
    commit(a, plans[i], batch[i].logits, events);
    if (!next_block(a)) finish(a, "length");
  }
  sweep();
  failed_ = false;
  return events;
}

void Generation::commit(Active& a, const StepPlan& plan, View<float> logits,
                        std::vector<StepEvent>& events) {
  ++a.stats.passes;
  // from_entry: there are prefix rows, of which row 0 is one
  if (plan.from_entry && plan.at(a.info.layers - 1).live.contains(int64_t{0})) ++a.stats.refreshes;
  if (plan.logits.empty()) {
    require(++a.at.repeat <= kMaxRepeats, "[generate] policy ", requests_[a.index].policy->spec(),
            ": expected at most ", kMaxRepeats, " passes without logits at step ", a.at.step,
            ", got one more");
    return;
  }
  const int32_t mask = engine_->model().config().mask_token_id;
  const Sampler sampler(engine_->model().config(), requests_[a.index].options);
  std::vector<Commit> commits;
  try {
    commits = sampler.sample(engine_->model().kernels(), logits, plan.logits.list(), a.at.step,
                             sampler.quota(a.block_masks, a.at.block_step), engine_->threads_);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(cat(e.what(), " (request ", a.index, ")"));
  }
  std::sort(commits.begin(), commits.end(),
            [](const Commit& x, const Commit& y) { return x.position < y.position; });
  for (const Commit& c : commits) {
    a.state.tokens[c.position] = c.token;
    if (c.token == mask) continue;  // predicted the mask: still undecided
    a.confidences[c.position - a.info.p - a.info.u] = c.confidence;
  }
  events.push_back({a.index, a.at.step, std::move(commits), a.state.tokens});
  ++a.at.step;
  ++a.at.block_step;
  a.at.repeat = 0;
  ++a.stats.steps;
  ++steps_done_;
}

void Generation::finish(Active& a, const char* reason) {
  Result& result = results_[a.index];
  result.tokens.assign(a.state.tokens.end() - a.info.g, a.state.tokens.end());
  result.confidences = std::move(a.confidences);
  const int32_t eos = engine_->model().config().eos_token_id;
  const bool ended =
      std::find(result.tokens.begin(), result.tokens.end(), eos) != result.tokens.end();
  result.finish_reason = ended && std::string_view(reason) != "cancelled" ? "eos" : reason;
  result.stats = std::move(a.stats);
  result.stats.work = std::move(a.state.work);
  result.stats.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - a.begin).count();
  steps_done_ += *requests_[a.index].options.steps - result.stats.steps;  // steps it did not need
  ++finished_;
  a.state = {};  // frees its caches; sweep() drops the rest
}

void Generation::sweep() {
  std::erase_if(active_, [](const std::unique_ptr<Active>& a) { return a->state.tokens.empty(); });
}

void Generation::cancel(size_t request) {
  require(request < requests_.size(), "[generate] cancel: expected a request of 0..",
          static_cast<int64_t>(requests_.size()) - 1, ", got ", request);
  cancelled_[request] = true;
}

std::vector<Result> Generation::results() const {
  internal_check(done(), "[generate] results: expected all ", requests_.size(),
                 " requests to have ended, got ", finished_.load());
  return results_;
}

}  // namespace bicache
