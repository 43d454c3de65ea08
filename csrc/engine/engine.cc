#include "engine/engine.h"

#include <algorithm>
#include <stdexcept>

#include "base/check.h"

namespace bicache {

Engine::Engine(std::shared_ptr<const Model> model, int threads, int64_t prefix_budget_bytes,
               DType prefix_dtype)
    : model_(std::move(model)),
      threads_(threads),
      store_(prefix_budget_bytes),
      prefix_dtype_(prefix_dtype) {
  require(1 <= threads && threads <= 1024, "[engine] threads: expected 1..1024, got ", threads);
}

Engine::Turn::Turn(Engine& engine) : engine_(engine) {
  if (engine.owner_ == std::this_thread::get_id()) {
    throw std::runtime_error(
        "[engine] call: expected none into the same model from inside a tap or a depth policy, got "
        "one");
  }
  engine.mutex_.lock();
  engine.owner_ = std::this_thread::get_id();
}

Engine::Turn::~Turn() {
  engine_.owner_ = std::thread::id();
  engine_.mutex_.unlock();
}

void Engine::set_tap(Tap tap) {
  const Turn turn(*this);
  tap_ = std::move(tap);
}

void Engine::forward(std::vector<int32_t> tokens, const std::vector<int64_t>& positions,
                     float* logits) {
  const Turn turn(*this);
  RequestState request = model_->make_request(std::move(tokens), 0, {});
  for (const int64_t i : positions) {
    require(0 <= i && i < request.n(), "[forward] rows: expected positions 0..", request.n() - 1,
            ", got ", i);
  }
  const RowSet wanted = RowSet::of(positions);
  const std::vector<int64_t> order = wanted.list();
  const StepPlan plan = StepPlan::uniform(RowSet::span(0, request.n()), wanted);
  Pass pass{&request, &plan, nullptr, {}};
  if (order == positions) pass.logits_to = logits;
  model_->forward({&pass, 1}, workspace_, threads_, tap_);
  if (order == positions) return;
  const int64_t vocab = model_->config().vocab;
  for (size_t i = 0; i < positions.size(); ++i) {
    const int64_t row = std::lower_bound(order.begin(), order.end(), positions[i]) - order.begin();
    std::copy_n(pass.logits.row(row), vocab, logits + static_cast<int64_t>(i) * vocab);
  }
  workspace_.logits = {};  // [N, V] of a long canvas is not worth keeping
}

StoreShape Engine::store_shape() const {
  const ModelConfig& c = model_->config();
  const bool packed = model_->backend() == Backend::packed;
  return {c.layers, c.kv_width(), c.dim, entry_types(),
          cat(model_->fingerprint(), " ", name(model_->weights().dtype), " weights, ",
              name(model_->kv_dtype()), " K/V, ", packed ? "" : "blas and ", model_->kernels().isa,
              " kernels, bicache ", BICACHE_VERSION)};
}

void Engine::clear_prefixes() {
  store_.clear();
  discovery_.clear();
}

bool Engine::warm(const std::vector<int32_t>& prefix, const Policy& policy,
                  const std::string& salt) {
  const Turn turn(*this);
  const ModelConfig& c = model_->config();
  const auto p = static_cast<int64_t>(prefix.size());
  require(1 <= p && p <= c.context, "[warm] prefix: expected 1..", c.context,
          " tokens (the model's context), got ", p);
  for (int64_t i = 0; i < p; ++i) {
    require(0 <= prefix[i] && prefix[i] < c.embeddings, "[warm] prefix token ", i,
            ": expected an id of 0..", c.embeddings - 1, ", got ", prefix[i]);
  }
  const RequestInfo info{c.layers, p, 0, 0, c.shift};
  policy.check(info);
  const EntryNeeds needs = policy.prefix_needs(info);
  require(!needs.nothing() && needs.source == EntryNeeds::Source::alone,
          "[warm] cache: expected a policy that reads entries of the prefix alone, such as "
          "bicache:depth=1, got ",
          policy.spec());
  RequestStats stats;
  prefix_entry(needs, info, prefix, salt, stats);
  return store_.keeps({prefix, needs.source, salt}, needs);
}

int64_t Engine::discover(const Request& request) {
  const ModelConfig& c = model_->config();
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t p = discovery_.prefix_of(request.prompt, request.salt, prompt - c.shift,
                                         *request.discover, store_);
  const EntryNeeds needs = request.policy->prefix_needs({c.layers, p, prompt - p, 0, c.shift});
  const bool fits = PrefixEntry::size_bytes(p, c.kv_width(), c.dim, needs, entry_types()) <=
                    store_.stats().budget_bytes;
  return needs.nothing() || !fits ? 0 : p;
}

PrefixStore::Entry Engine::prefix_entry(EntryNeeds needs, const RequestInfo& info,
                                        const std::vector<int32_t>& canvas, const std::string& salt,
                                        RequestStats& stats) {
  if (needs.nothing()) return nullptr;
  const std::span<const int32_t> prefix(canvas.data(), static_cast<size_t>(info.p));
  const PrefixKey key{prefix, needs.source, salt};
  PrefixStore::Entry found = store_.find(key, needs);
  stats.prefix_hit = stats.prefix_hit.value_or(true) && found != nullptr;
  if (found) return found;

  // Miss: this same forward, everything recomputed, on the prefix alone (or on the first request's
  // canvas), up to the last layer the entry keeps something of.
  const auto& c = model_->config();
  if (const EntryNeeds wide = store_.widened(key, needs);
      PrefixEntry::size_bytes(info.p, c.kv_width(), c.dim, wide, entry_types()) <=
      store_.stats().budget_bytes) {
    needs = wide;
  }
  const bool alone = needs.source == EntryNeeds::Source::alone;
  RequestState r = model_->make_request(
      alone ? std::vector<int32_t>(prefix.begin(), prefix.end()) : canvas, 0, {});
  const StepPlan plan = entry_plan(needs, info.layers, r.n());
  auto entry = std::make_shared<PrefixEntry>(info.p, c.kv_width(), c.dim, needs, entry_types());
  Pass pass{&r, &plan, entry.get(), {}};
  model_->forward({&pass, 1}, workspace_, threads_, tap_);
  add(stats.entry_work, r.work);
  store_.insert(key, entry);
  return entry;
}

}  // namespace bicache
