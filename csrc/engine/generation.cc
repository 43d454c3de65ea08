#include <algorithm>
#include <limits>
#include <set>
#include <stdexcept>

#include "base/check.h"
#include "engine/engine.h"

namespace bicache {
namespace {

// Classifier-free guidance, into the conditional logits: un + (scale + 1) (cond - un).
void guide(const Pass& cond, const Pass& un, double scale) {
  require(cond.plan->logits == un.plan->logits,
          "[plan] logits: expected the same positions with and without the prompt (",
          cond.plan->logits.str(), "), got ", un.plan->logits.str());
  constexpr double kMax = std::numeric_limits<float>::max();
  const auto factor = static_cast<float>(std::min(scale + 1, kMax));
  for (int64_t i = 0; i < cond.logits.rows; ++i) {
    float* x = cond.logits.row(i);
    const float* y = un.logits.row(i);
    for (int64_t v = 0; v < cond.logits.cols; ++v) x[v] = y[v] + factor * (x[v] - y[v]);
  }
}

bool is_end(const GenerationOptions& o, int32_t token) {
  return std::find(o.end_tokens->begin(), o.end_tokens->end(), token) != o.end_tokens->end();
}

// `options.end_tokens` where they were not given: end of text and end of turn.
void resolve_ends(const ModelConfig& c, GenerationOptions& o) {
  if (!o.end_tokens) {
    o.end_tokens.emplace();
    for (const int32_t token : {c.eos_token_id, c.eot_token_id}) {
      if (token >= 0 && token != c.mask_token_id) o.end_tokens->push_back(token);
    }
  }
  for (const int64_t token : *o.end_tokens) {
    require(0 <= token && token < c.embeddings, "[generate] end_tokens: expected ids of 0..",
            c.embeddings - 1, ", got ", token);
    require(token != c.mask_token_id, "[generate] end_tokens: expected ids other than the mask's, ",
            "got ", token);
  }
  require(!o.early_stop || !o.end_tokens->empty(),
          "[generate] early_stop: expected a model with an end-of-text or end-of-turn token, or "
          "end_tokens, got none");
}

void check_banned(const ModelConfig& c, const GenerationOptions& o) {
  std::set<int64_t> banned;
  for (const int64_t token : o.suppress_tokens) {
    require(0 <= token && token < c.vocab, "[generate] suppress_tokens: expected ids of 0..",
            c.vocab - 1, ", got ", token);
    if (token < c.sampled_ids()) banned.insert(token);
  }
  if (o.logits_eos_inf && 0 <= c.eos_token_id && c.eos_token_id < c.sampled_ids())
    banned.insert(c.eos_token_id);
  require(static_cast<int64_t>(banned.size()) < c.sampled_ids(),
          "[generate] suppress_tokens: expected some ids left, got all ", c.sampled_ids(),
          o.logits_eos_inf ? " with logits_eos_inf" : "");
  require(!o.logits_eos_inf || c.eos_token_id >= 0,
          "[generate] logits_eos_inf: expected a model with an end-of-text token, got one without");
  require(!o.confidence_eos_eot_inf || c.eos_token_id >= 0 || c.eot_token_id >= 0,
          "[generate] confidence_eos_eot_inf: expected a model with an end-of-text or end-of-turn "
          "token, got one without");
}

void check_ids(const ModelConfig& c, const char* what, const std::vector<int32_t>& ids) {
  for (size_t i = 0; i < ids.size(); ++i) {
    require(0 <= ids[i] && ids[i] < c.embeddings, "[generate] ", what, " token ", i,
            ": expected an id of 0..", c.embeddings - 1, ", got ", ids[i]);
  }
}

}  // namespace

Generation::Generation(std::shared_ptr<Engine> engine, std::vector<Request> requests,
                       int64_t batch_rows)
    : engine_(std::move(engine)),
      requests_(std::move(requests)),
      results_(requests_.size()),
      asked_(requests_.size()),
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
    check_ids(c, "prompt", r.prompt);
    const auto given = static_cast<int64_t>(r.response.size());
    require(given == 0 || given == r.options.gen_length, "[generate] response: expected ",
            r.options.gen_length, " tokens (gen_length), got ", given);
    check_ids(c, "response", r.response);
    resolve_ends(c, r.options);
    check_banned(c, r.options);
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
  auto a = std::make_unique<Active>();
  a->begin = std::chrono::steady_clock::now();
  a->index = index;
  const int32_t mask = engine_->model().config().mask_token_id;
  r.response.resize(static_cast<size_t>(r.options.gen_length), mask);
  const bool done = complete(index, r.response) ||
                    std::find(r.response.begin(), r.response.end(), mask) == r.response.end();
  const bool runs = !done && asked_[index] == Ask::nothing;
  if (r.discover && r.prefix == 0 && runs) r.prefix = engine_->discover(r);
  a->info = info(r);
  std::vector<int32_t> canvas = r.prompt;
  canvas.insert(canvas.end(), r.response.begin(), r.response.end());
  a->stats.prefix_tokens = a->info.p;
  a->branches.push_back(branch(r, *a, canvas, runs));
  if (r.options.cfg_scale > 0) {  // without anything that was given, prompt or response
    std::fill(canvas.begin(), canvas.end(), mask);
    a->branches.push_back(branch(r, *a, canvas, runs));
  }
  a->confidences.assign(static_cast<size_t>(a->info.g), std::numeric_limits<float>::quiet_NaN());
  a->progress = Progress(a->info, r.options);
  if (done || !advance(*a)) finish(*a, "length");
  return a;
}

// `runs`: there will be a pass that may read the prefix entry.
Generation::Branch Generation::branch(const Request& r, Active& a, std::vector<int32_t> canvas,
                                      bool runs) {
  std::shared_ptr<const PrefixEntry> entry;
  if (runs) entry = engine_->prefix_entry(r.policy->needs(a.info), a.info, canvas, r.salt, a.stats);
  Branch b{engine_->model().make_request(std::move(canvas), a.info.p, r.policy->kept(a.info)), {}};
  b.state.entry = std::move(entry);
  b.at.request = a.info;
  a.stats.cache_bytes += b.state.cache.size_bytes();
  return b;
}

void Generation::admit() {
  int64_t rows = 0;
  for (const auto& a : active_)
    for (const Branch& b : a->branches) rows += b.state.n();
  while (next_ < requests_.size()) {
    const Request& r = requests_[next_];
    const int64_t n = (static_cast<int64_t>(r.prompt.size()) + r.options.gen_length) *
                      (r.options.cfg_scale > 0 ? 2 : 1);
    if (!active_.empty() && rows + n > batch_rows_) return;
    rows += n;
    active_.push_back(start(next_++));
  }
}

// To the next step that commits something; false if there is none.
bool Generation::advance(Active& a) {
  const ModelConfig& c = engine_->model().config();
  const GenerationOptions& o = requests_[a.index].options;
  if (!a.progress.advance(Sampler(c, o), a.canvas(), c.mask_token_id)) return false;
  for (Branch& b : a.branches) a.progress.show(b.at);
  return true;
}

StepPlan Generation::plan(Active& a, Branch& branch) {
  const Policy& policy = *requests_[a.index].policy;
  const auto choice = settle(policy, branch.at);
  if (choice && a.info.p > 0 && &branch == a.branches.data()) a.stats.note(*choice);
  StepPlan plan = policy.plan(branch.at);
  require(branch.at.wanted.contains(plan.logits),
          "[plan] logits: expected masked positions of the block (", branch.at.wanted.str(),
          "), got ", plan.logits.str());
  return plan;
}

std::vector<StepEvent> Generation::step() {
  const Engine::Turn turn(*engine_);
  if (failed_) throw std::runtime_error("[generate] an earlier step of this generation failed");
  failed_ = true;  // until this step has ended well
  admit();
  for (auto& a : active_) {
    const Ask asked = asked_[a->index];
    if (asked != Ask::nothing && !a->branches.empty())
      finish(*a, asked == Ask::stop ? "stop" : "cancelled");
  }
  sweep();
  std::vector<StepPlan> plans;
  for (auto& a : active_)
    for (Branch& b : a->branches) plans.push_back(plan(*a, b));
  std::vector<Pass> batch;
  for (auto& a : active_)
    for (Branch& b : a->branches) batch.push_back({&b.state, &plans[batch.size()], nullptr, {}});
  std::vector<StepEvent> events;
  if (!batch.empty())
    engine_->model_->forward(batch, engine_->workspace_, engine_->threads_, engine_->tap_);
  auto pass = batch.begin();
  for (auto& a : active_) {
    const auto first = pass;
    for (Branch& b : a->branches) {
      if (!pass->similarity.empty())
        (pass->plan->observe.to_entry ? b.at.to_entry : b.at.to_own) = std::move(pass->similarity);
      ++pass;
    }
    if (a->branches.size() > 1) guide(first[0], first[1], requests_[a->index].options.cfg_scale);
    commit(*a, *first->plan, first->logits, events);
    if (complete(a->index, a->response()) || !advance(*a)) finish(*a, "length");
  }
  sweep();
  failed_ = false;
  return events;
}

void Generation::commit(Active& a, const StepPlan& plan, View<float> logits,
                        std::vector<StepEvent>& events) {
  a.stats.note(plan, a.info.layers);
  if (plan.logits.empty()) {
    require(++a.progress.repeat <= Progress::kMaxRepeats, "[generate] policy ",
            requests_[a.index].policy->spec(), ": expected at most ", Progress::kMaxRepeats,
            " passes without logits at step ", a.progress.step, ", got one more");
    return;
  }
  const ModelConfig& c = engine_->model().config();
  const Sampler sampler(c, requests_[a.index].options);
  std::vector<Commit> commits;
  try {
    commits = sampler.sample(engine_->model().kernels(), logits, plan.logits.list(),
                             a.progress.decoding(), a.progress.quota, engine_->threads_);
  } catch (const std::runtime_error& e) {
    throw std::runtime_error(cat(e.what(), " (request ", a.index, ")"));
  }
  std::sort(commits.begin(), commits.end(),
            [](const Commit& x, const Commit& y) { return x.position < y.position; });
  std::vector<int64_t> decided;
  for (const Commit& x : commits) {
    for (Branch& b : a.branches) b.state.tokens[x.position] = x.token;
    if (x.token == c.mask_token_id) continue;  // predicted the mask: still undecided
    a.confidences[x.position - a.info.p - a.info.u] = x.confidence;
    decided.push_back(x.position);
  }
  events.push_back({a.index, a.progress.step, std::move(commits), a.canvas()});
  a.progress.committed(RowSet::of(std::move(decided)));
  ++a.stats.steps;
  ++steps_done_;
}

// Whether the text of a response [g] has ended and can change no more: a final token with no mask
// before it.
bool Generation::complete(size_t index, std::span<const int32_t> response) const {
  const GenerationOptions& o = requests_[index].options;
  if (!o.early_stop) return false;
  const int32_t mask = engine_->model().config().mask_token_id;
  for (const int32_t token : response) {
    if (token == mask) return false;
    if (is_end(o, token)) return true;
  }
  return false;
}

void Generation::finish(Active& a, std::string_view reason) {
  Result& result = results_[a.index];
  const GenerationOptions& o = requests_[a.index].options;
  const std::span<const int32_t> response = a.response();
  result.tokens.assign(response.begin(), response.end());
  if ((complete(a.index, response) || reason == "stop") && !o.end_tokens->empty()) {
    std::replace(result.tokens.begin(), result.tokens.end(),
                 engine_->model().config().mask_token_id,
                 static_cast<int32_t>(o.end_tokens->front()));
  }
  result.confidences = std::move(a.confidences);
  const bool ended = std::any_of(result.tokens.begin(), result.tokens.end(),
                                 [&](int32_t t) { return is_end(o, t); });
  result.finish_reason = ended && reason == "length" ? "eos" : reason;
  result.stats = std::move(a.stats);
  for (Branch& b : a.branches) add(result.stats.work, b.state.work);
  result.stats.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - a.begin).count();
  steps_done_ += *requests_[a.index].options.steps - result.stats.steps;  // steps it did not need
  ++finished_;
  a.branches.clear();  // frees its caches; sweep() drops the rest
}

void Generation::sweep() {
  std::erase_if(active_, [](const std::unique_ptr<Active>& a) { return a->branches.empty(); });
}

void Generation::cancel(size_t request) { ask(request, Ask::cancel); }

void Generation::stop(size_t request) { ask(request, Ask::stop); }

void Generation::ask(size_t request, Ask what) {
  require(request < requests_.size(), "[generate] ", what == Ask::stop ? "stop" : "cancel",
          ": expected a request of 0..", static_cast<int64_t>(requests_.size()) - 1, ", got ",
          request);
  asked_[request] = what;
}

std::vector<Result> Generation::results() const {
  internal_check(done(), "[generate] results: expected all ", requests_.size(),
                 " requests to have ended, got ", finished_.load());
  return results_;
}

}  // namespace bicache
