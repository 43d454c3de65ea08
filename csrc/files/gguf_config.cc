#include "files/gguf_config.h"

#include <charconv>
#include <cmath>
#include <optional>

#include "base/check.h"

namespace bicache {
namespace {

constexpr GgufName kLladaNames[] = {
    {"token_embd.weight", "model.transformer.wte.weight"},
    {"output_norm.weight", "model.transformer.ln_f.weight"},
    {"output.weight", "model.transformer.ff_out.weight"},
    {"blk.N.attn_norm.weight", "model.transformer.blocks.N.attn_norm.weight"},
    {"blk.N.ffn_norm.weight", "model.transformer.blocks.N.ff_norm.weight"},
    {"blk.N.attn_q.weight", "model.transformer.blocks.N.q_proj.weight"},
    {"blk.N.attn_k.weight", "model.transformer.blocks.N.k_proj.weight"},
    {"blk.N.attn_v.weight", "model.transformer.blocks.N.v_proj.weight"},
    {"blk.N.attn_output.weight", "model.transformer.blocks.N.attn_out.weight"},
    {"blk.N.ffn_gate.weight", "model.transformer.blocks.N.ff_proj.weight"},
    {"blk.N.ffn_up.weight", "model.transformer.blocks.N.up_proj.weight"},
    {"blk.N.ffn_down.weight", "model.transformer.blocks.N.ff_out.weight"},
};

// As transformers names Qwen2's and OLMoE's.
constexpr GgufName kQwenNames[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
    {"blk.N.attn_norm.weight", "model.layers.N.input_layernorm.weight"},
    {"blk.N.ffn_norm.weight", "model.layers.N.post_attention_layernorm.weight"},
    {"blk.N.attn_q.weight", "model.layers.N.self_attn.q_proj.weight"},
    {"blk.N.attn_k.weight", "model.layers.N.self_attn.k_proj.weight"},
    {"blk.N.attn_v.weight", "model.layers.N.self_attn.v_proj.weight"},
    {"blk.N.attn_q.bias", "model.layers.N.self_attn.q_proj.bias"},
    {"blk.N.attn_k.bias", "model.layers.N.self_attn.k_proj.bias"},
    {"blk.N.attn_v.bias", "model.layers.N.self_attn.v_proj.bias"},
    {"blk.N.attn_q_norm.weight", "model.layers.N.self_attn.q_norm.weight"},
    {"blk.N.attn_k_norm.weight", "model.layers.N.self_attn.k_norm.weight"},
    {"blk.N.attn_output.weight", "model.layers.N.self_attn.o_proj.weight"},
    {"blk.N.ffn_gate.weight", "model.layers.N.mlp.gate_proj.weight"},
    {"blk.N.ffn_up.weight", "model.layers.N.mlp.up_proj.weight"},
    {"blk.N.ffn_down.weight", "model.layers.N.mlp.down_proj.weight"},
    {"blk.N.ffn_gate_inp.weight", "model.layers.N.mlp.gate.weight"},
    {"blk.N.ffn_gate_exps.weight", "model.layers.N.mlp.experts.X.gate_proj.weight"},
    {"blk.N.ffn_up_exps.weight", "model.layers.N.mlp.experts.X.up_proj.weight"},
    {"blk.N.ffn_down_exps.weight", "model.layers.N.mlp.experts.X.down_proj.weight"},
};

constexpr Architecture kArchitectures[] = {
    {.name = "llada",
     .names = kLladaNames,
     .interleaved = true,
     .shift = false,
     .keys = R"("model_type":"llada","block_type":"llama","layer_norm_type":"rms",)"
             R"("activation_type":"silu","rope":true)",
     .olmo_names = true},
    {.name = "dream",
     .names = kQwenNames,
     .interleaved = false,
     .shift = true,
     .keys = R"("model_type":"Dream","architectures":["DreamModel"],"hidden_act":"silu",)"
             R"("tie_word_embeddings":false,"use_mrope":false)",
     .olmo_names = false},
    {.name = "llada-moe",
     .names = kQwenNames,
     .interleaved = false,
     .shift = false,
     .keys = R"("model_type":"llada","architectures":["LLaDAMoEModelLM"],"hidden_act":"silu",)"
             R"("qk_layernorm":true,"norm_topk_prob":false,"tie_word_embeddings":false)",
     .olmo_names = false},
};

// Typed reads of the metadata.
class Reader {
 public:
  Reader(const Gguf& file, const Architecture& architecture)
      : file_(file), prefix_(cat(architecture.name, ".")) {}

  const std::string& prefix() const { return prefix_; }
  const GgufValue* find(const std::string& key) const {
    const auto it = file_.metadata().find(key);
    return it == file_.metadata().end() ? nullptr : &it->second;
  }
  // For messages, between "[gguf] " and ": expected".
  std::string what(const std::string& key) const { return file_.path() + ": " + key; }

  std::optional<int64_t> integer(const std::string& key) const {
    const GgufValue* v = find(key);
    return v == nullptr ? std::nullopt : std::optional(v->integer(kWhere, what(key)));
  }
  // Of the architecture's keys.
  int64_t size(const char* key, std::optional<int64_t> fallback = {}) const {
    const std::string name = prefix_ + key;
    const std::optional<int64_t> value = integer(name);
    require(value || fallback, "[gguf] ", what(name), ": expected an integer, got nothing");
    return value ? *value : *fallback;
  }
  double number(const char* key, std::optional<double> fallback = {}) const {
    const std::string name = prefix_ + key;
    const GgufValue* v = find(name);
    require(v != nullptr || fallback, "[gguf] ", what(name), ": expected a number, got nothing");
    const double value = v != nullptr ? v->number(kWhere, what(name)) : *fallback;
    require(std::isfinite(value), "[gguf] ", what(name), ": expected a finite number, got ", value);
    return value;
  }
  bool boolean(const std::string& key, bool fallback) const {
    const GgufValue* v = find(key);
    return v == nullptr ? fallback : v->boolean(kWhere, what(key));
  }
  // The engine computes `expected` only.
  void only(const char* key, int64_t expected) const {
    const int64_t value = size(key, expected);
    require(value == expected, "[gguf] ", what(prefix_ + key), ": expected ", expected,
            " (nothing else is supported), got ", value);
  }

 private:
  static constexpr const char* kWhere = "gguf";
  const Gguf& file_;
  std::string prefix_;
};

void check_supported(const Reader& r) {
  const std::string causal = r.prefix() + "attention.causal";
  require(!r.boolean(causal, false), "[gguf] ", r.what(causal),
          ": expected false (a diffusion model), got true");
  const std::string scaling = r.prefix() + "rope.scaling.type";
  if (const GgufValue* v = r.find(scaling)) {
    const std::string type = v->string("gguf", r.what(scaling));
    require(type == "none", "[gguf] ", r.what(scaling),
            ": expected \"none\" (nothing else is supported), got ", quote(type));
  }
}

// The id of the mask token where the file does not give it: of the one that is spelled so.
int64_t mask_token(const Reader& r) {
  if (const auto id = r.integer("tokenizer.ggml.mask_token_id")) return *id;
  if (const GgufValue* tokens = r.find("tokenizer.ggml.tokens")) {
    const std::vector<GgufValue::Element> all = tokens->elements();
    for (size_t i = 0; i < all.size(); ++i) {
      const auto* text = std::get_if<std::string_view>(&all[i]);
      if (text != nullptr && (*text == "<|mdm_mask|>" || *text == "<|mask|>"))
        return static_cast<int64_t>(i);
    }
  }
  fail("[gguf] ", r.what("tokenizer.ggml.mask_token_id"),
       ": expected an integer, or a token <|mdm_mask|> or <|mask|>, got neither");
}

// A JSON object, written member by member.
class Object {
 public:
  explicit Object(const char* members) : text_(cat("{", members)) {}
  void integer(const char* key, int64_t value) { add(key, std::to_string(value)); }
  void boolean(const char* key, bool value) { add(key, value ? "true" : "false"); }
  void number(const char* key, double value) {
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    add(key, std::string(digits, end));
  }
  Json parsed(const std::string& source) const { return Json::parse(text_ + "}", source); }

 private:
  void add(const char* key, const std::string& value) { text_ += cat(",\"", key, "\":", value); }
  std::string text_;
};

}  // namespace

const Architecture& gguf_architecture(const Gguf& file) {
  std::string known;
  const auto it = file.metadata().find("general.architecture");
  const std::string what = file.path() + ": general.architecture";
  require(it != file.metadata().end(), "[gguf] ", what, ": expected text, got nothing");
  const std::string name = it->second.string("gguf", what);
  for (const Architecture& a : kArchitectures) {
    if (name == a.name) return a;
    known += cat(known.empty() ? "" : ", ", a.name);
  }
  fail("[gguf] ", what, ": expected one of ", known, ", got ", quote(name));
}

int64_t gguf_head_dim(const Gguf& file, const Architecture& architecture) {
  const Reader r(file, architecture);
  const int64_t dim = r.size("embedding_length"), heads = r.size("attention.head_count");
  require(1 <= heads && heads <= dim && dim % heads == 0 && dim / heads % 2 == 0, "[gguf] ",
          r.what(r.prefix() + "attention.head_count"), ": expected a divisor of embedding_length (",
          dim, ") into even heads, got ", heads);
  return dim / heads;
}

Json gguf_config(const Gguf& file, const Architecture& architecture, int64_t embeddings) {
  const Reader r(file, architecture);
  check_supported(r);
  const int64_t head_dim = gguf_head_dim(file, architecture),
                heads = r.size("attention.head_count");
  for (const char* key : {"rope.dimension_count", "attention.key_length", "attention.value_length"})
    r.only(key, head_dim);
  int64_t vocab = embeddings;
  if (const GgufValue* tokens = r.find("tokenizer.ggml.tokens")) vocab = tokens->count();
  vocab = r.size("vocab_size", vocab);

  Object json(architecture.keys);
  const auto put = [&](const char* olmo, const char* usual, int64_t value) {
    json.integer(architecture.olmo_names ? olmo : usual, value);
  };
  put("n_layers", "num_hidden_layers", r.size("block_count"));
  put("d_model", "hidden_size", r.size("embedding_length"));
  put("n_heads", "num_attention_heads", heads);
  put("n_kv_heads", "num_key_value_heads", r.size("attention.head_count_kv", heads));
  put("max_sequence_length", "max_position_embeddings", r.size("context_length"));
  json.integer("vocab_size", vocab);
  json.number("rms_norm_eps", r.number("attention.layer_norm_rms_epsilon"));
  json.number("rope_theta", r.number("rope.freq_base", 10000));
  json.integer("mask_token_id", mask_token(r));
  if (const auto id = r.integer("tokenizer.ggml.eos_token_id")) json.integer("eos_token_id", *id);
  if (const auto id = r.integer("tokenizer.ggml.eot_token_id")) json.integer("eot_token_id", *id);
  const bool shift = r.boolean("diffusion.shift_logits", architecture.shift);
  if (architecture.olmo_names) {
    json.integer("embedding_size", embeddings);
    json.boolean("shift_logits", shift);
  } else {
    require(shift == architecture.shift, "[gguf] ", r.what("diffusion.shift_logits"), ": expected ",
            architecture.shift ? "true" : "false", " (nothing else is supported), got ",
            shift ? "true" : "false");
  }
  if (const auto experts = r.integer(r.prefix() + "expert_count")) {
    const int64_t used = r.size("expert_used_count");
    require(used > 0, "[gguf] ", r.what(r.prefix() + "expert_used_count"),
            ": expected 1 or more, got ", used);
    json.integer("num_experts", *experts);
    json.integer("num_experts_per_tok", used);
    json.integer("expert_intermediate_size",
                 r.size("expert_feed_forward_length", r.size("feed_forward_length") / used));
  }
  put("mlp_hidden_size", "intermediate_size", r.size("feed_forward_length"));
  return json.parsed(file.path() + " metadata");
}

}  // namespace bicache
