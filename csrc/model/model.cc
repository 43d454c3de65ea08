#include "model/model.h"

#include <bit>
#include <cstdio>

#include "base/check.h"
#include "base/hash.h"
#include "files/checkpoint.h"

namespace bicache {

Model::Model(ModelConfig config, Weights weights, Backend backend, DType kv_dtype,
             const Kernels& kernels)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      backend_(backend),
      kv_dtype_(kv_dtype),
      kernels_(&kernels) {}

std::shared_ptr<const Model> Model::load(const std::string& folder, Backend backend,
                                         std::optional<DType> dtype, std::optional<DType> kv_dtype,
                                         int threads, int32_t eot_token_id, const Kernels& kernels,
                                         int64_t known_ids) {
  const Checkpoint checkpoint(folder);
  ModelConfig config = ModelConfig::parse(checkpoint.config(), checkpoint.config_path());
  require(-1 <= eot_token_id && eot_token_id < config.embeddings,
          "[model] eot_token_id: expected an id of 0..", config.embeddings - 1,
          ", or -1 for none, got ", eot_token_id);
  if (config.eot_token_id < 0) config.eot_token_id = eot_token_id;
  require(known_ids >= 0, "[model] known_ids: expected >= 0, got ", known_ids);
  config.known_ids = known_ids;
  Weights weights = load_weights(checkpoint, config, kernels, backend, dtype, threads);
  const DType kv = kv_dtype.value_or(weights.dtype == DType::f32 ? DType::f32 : DType::bf16);
  return std::shared_ptr<const Model>(
      new Model(std::move(config), std::move(weights), backend, kv, kernels));
}

std::string Model::fingerprint() const {
  const ModelConfig& c = config_;
  std::vector<uint64_t> facts = {weights_.hash,
                                 static_cast<uint64_t>(c.layers),
                                 static_cast<uint64_t>(c.heads),
                                 static_cast<uint64_t>(c.kv_heads),
                                 static_cast<uint64_t>(c.vocab),
                                 static_cast<uint64_t>(c.qk_norm),
                                 static_cast<uint64_t>(c.shift),
                                 static_cast<uint64_t>(c.mask_token_id),
                                 std::bit_cast<uint32_t>(c.norm_eps),
                                 std::bit_cast<uint64_t>(c.rope_theta)};
  if (c.experts > 0) facts.push_back(static_cast<uint64_t>(c.experts_per_row));
  const uint64_t all =
      hash_bytes(std::as_bytes(std::span(facts)), hash_bytes(std::as_bytes(std::span(c.family))));
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(all));
  return text;
}

RequestState Model::make_request(std::vector<int32_t> tokens, int64_t p, const Kept& kept) const {
  RequestState r;
  r.tokens = std::move(tokens);
  r.p = p;
  const int64_t n = r.n();
  require(n > 0, "[request] canvas: expected at least one token, got none");
  require(n <= config_.context, "[request] length: expected at most ", config_.context,
          " tokens (the model's context), got ", n);
  for (int64_t i = 0; i < n; ++i) {
    require(0 <= r.tokens[i] && r.tokens[i] < config_.embeddings, "[request] token ", i,
            ": expected an id of 0..", config_.embeddings - 1, ", got ", r.tokens[i]);
  }
  r.cache = LayerCache(config_.layers, n, config_.kv_width(), config_.dim, kept, kv_dtype_);
  r.work.resize(static_cast<size_t>(config_.layers) + 1);
  return r;
}

}  // namespace bicache
