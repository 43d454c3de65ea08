#include "model/config.h"

#include <limits>

#include "base/check.h"

namespace bicache {
namespace {

constexpr int64_t kMaxDim = int64_t{1}
                            << 24;  // of any one size; products are checked where they are made

// Typed reads of config.json's members.
class Reader {
 public:
  Reader(const Json& json, const std::string& where) : json_(json), where_(where) {}

  // In [low, high]; `fallback` where the key is absent or null, kRequired: an error.
  static constexpr int64_t kRequired = std::numeric_limits<int64_t>::min();
  int64_t integer(const char* key, int64_t fallback, int64_t low, int64_t high) const {
    const Json* v = present(key);
    if (v == nullptr) {
      require(fallback != kRequired, "[", where_, "] ", key, ": expected a number, got nothing");
      return fallback;
    }
    const int64_t x = v->integer(where_, key);
    require(low <= x && x <= high, "[", where_, "] ", key, ": expected ", low, "..", high, ", got ",
            x);
    return x;
  }

  double number(const char* key, double low, double high) const {
    const Json* v = present(key);
    require(v != nullptr, "[", where_, "] ", key, ": expected a number, got nothing");
    const double x = v->number(where_, key);
    require(low <= x && x <= high, "[", where_, "] ", key, ": expected ", low, "..", high, ", got ",
            x);
    return x;
  }

  bool boolean(const char* key, bool fallback) const {
    const Json* v = present(key);
    return v == nullptr ? fallback : v->boolean(where_, key);
  }

  // The engine computes `expected` only.
  void only(const char* key, bool expected) const {
    require(boolean(key, expected) == expected, "[", where_, "] ", key, ": expected ",
            expected ? "true" : "false", " (nothing else is supported), got ",
            expected ? "false" : "true");
  }
  void only(const char* key, const char* expected) const {
    const Json* v = present(key);
    require(v != nullptr, "[", where_, "] ", key, ": expected \"", expected, "\", got nothing");
    const std::string& x = v->string(where_, key);
    require(x == expected, "[", where_, "] ", key, ": expected \"", expected,
            "\" (nothing else is supported), got \"", x, "\"");
  }

 private:
  const Json* present(const char* key) const {
    const Json* v = json_.find(key);
    return v == nullptr || v->is_null() ? nullptr : v;
  }

  const Json& json_;
  const std::string& where_;
};

// LLaDA's names (configuration_llada); the checks cover every switch of that file that changes the
// arithmetic.
ModelConfig parse_llada(const Reader& r, const std::string& where) {
  // Where these are absent, LLaDA's own defaults are others.
  r.only("block_type", "llama");
  r.only("layer_norm_type", "rms");
  r.only("activation_type", "silu");
  require(r.boolean("rope", false), "[", where, "] rope: expected true, got false or nothing");
  r.only("layer_norm_with_affine", true);
  for (const char* key :
       {"include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi", "attention_layer_norm",
        "input_emb_norm", "scale_logits", "weight_tying"}) {
    r.only(key, false);
  }

  ModelConfig c;
  c.family = "llada";
  c.layers = static_cast<int>(r.integer("n_layers", Reader::kRequired, 1, 4096));
  c.dim = r.integer("d_model", Reader::kRequired, 1, kMaxDim);
  c.heads = r.integer("n_heads", Reader::kRequired, 1, kMaxDim);
  const bool multi_query = r.boolean("multi_query_attention", false);
  c.kv_heads = r.integer("n_kv_heads", multi_query ? 1 : c.heads, 1, kMaxDim);
  c.ffn = r.integer("mlp_hidden_size", r.integer("mlp_ratio", 4, 1, 1024) * c.dim, 1, kMaxDim);
  c.vocab = r.integer("vocab_size", Reader::kRequired, 1, kMaxDim);
  c.embeddings = r.integer("embedding_size", c.vocab, 1, kMaxDim);
  c.context = r.integer("max_sequence_length", Reader::kRequired, 1, kMaxDim);
  c.norm_eps = static_cast<float>(r.number("rms_norm_eps", 1e-30, 1));
  c.rope_theta = r.number("rope_theta", 1, 1e15);
  c.qk_norm = r.boolean("qk_layernorm", false);
  c.shift = r.boolean("shift_logits", false) ? 1 : 0;
  require(c.dim % c.heads == 0, "[", where, "] n_heads: expected a divisor of d_model (", c.dim,
          "), got ", c.heads);
  require(c.heads % c.kv_heads == 0, "[", where, "] n_kv_heads: expected a divisor of n_heads (",
          c.heads, "), got ", c.kv_heads);
  c.head_dim = c.dim / c.heads;
  require(c.head_dim % 2 == 0, "[", where,
          "] d_model / n_heads: expected an even head size for RoPE, got ", c.head_dim);
  require(c.embeddings >= c.vocab, "[", where, "] embedding_size: expected at least vocab_size (",
          c.vocab, "), got ", c.embeddings);
  c.mask_token_id =
      static_cast<int32_t>(r.integer("mask_token_id", Reader::kRequired, 0, c.embeddings - 1));
  c.eos_token_id = static_cast<int32_t>(r.integer("eos_token_id", -1, 0, c.embeddings - 1));
  c.eot_token_id = static_cast<int32_t>(r.integer("eot_token_id", -1, 0, c.embeddings - 1));
  return c;
}

}  // namespace

ModelConfig ModelConfig::parse(const Json& json, const std::string& where) {
  json.object(where);
  const Json* type = json.find("model_type");
  require(type != nullptr, "[", where, "] model_type: expected \"llada\", got nothing");
  const std::string& family = type->string(where, "model_type");
  require(family == "llada", "[", where, "] model_type: expected one of llada, got \"", family,
          "\"");
  return parse_llada(Reader(json, where), where);
}

}  // namespace bicache
