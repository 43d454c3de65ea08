#include "model/families.h"

#include <algorithm>

#include "base/check.h"

namespace bicache {
namespace {

constexpr ConfigKeys kLladaKeys = {.layers = "n_layers",
                                   .dim = "d_model",
                                   .heads = "n_heads",
                                   .kv_heads = "n_kv_heads",
                                   .ffn = "mlp_hidden_size",
                                   .vocab = "vocab_size",
                                   .context = "max_sequence_length",
                                   .norm_eps = "rms_norm_eps",
                                   .rope_theta = "rope_theta",
                                   .multi_query = "multi_query_attention",
                                   .ffn_ratio = "mlp_ratio",
                                   .embeddings = "embedding_size"};

constexpr ConfigKeys kHuggingFaceKeys = {.layers = "num_hidden_layers",
                                         .dim = "hidden_size",
                                         .heads = "num_attention_heads",
                                         .kv_heads = "num_key_value_heads",
                                         .ffn = "intermediate_size",
                                         .vocab = "vocab_size",
                                         .context = "max_position_embeddings",
                                         .norm_eps = "rms_norm_eps",
                                         .rope_theta = "rope_theta"};

constexpr ConfigKeys llada_moe_keys() {
  ConfigKeys keys = kHuggingFaceKeys;
  keys.ffn = "expert_intermediate_size";
  keys.experts = "num_experts";
  keys.experts_per_row = "num_experts_per_tok";
  return keys;
}

// LLaDA's head and its FFN's down projection share the short name ff_out.
constexpr NameTable kLladaNames = {
    .embedding = "model.transformer.wte.weight",
    .final_norm = "model.transformer.ln_f.weight",
    .head = "model.transformer.ff_out.weight",
    .attention_norm = "model.transformer.blocks.N.attn_norm.weight",
    .ffn_norm = "model.transformer.blocks.N.ff_norm.weight",
    .q_norm = "model.transformer.blocks.N.q_norm.weight",
    .k_norm = "model.transformer.blocks.N.k_norm.weight",
    .q = "model.transformer.blocks.N.q_proj.weight",
    .k = "model.transformer.blocks.N.k_proj.weight",
    .v = "model.transformer.blocks.N.v_proj.weight",
    .attention_out = "model.transformer.blocks.N.attn_out.weight",
    .gate = "model.transformer.blocks.N.ff_proj.weight",
    .up = "model.transformer.blocks.N.up_proj.weight",
    .down = "model.transformer.blocks.N.ff_out.weight",
};

constexpr NameTable kHuggingFaceNames = {
    .embedding = "model.embed_tokens.weight",
    .final_norm = "model.norm.weight",
    .head = "lm_head.weight",
    .attention_norm = "model.layers.N.input_layernorm.weight",
    .ffn_norm = "model.layers.N.post_attention_layernorm.weight",
    .q_norm = "model.layers.N.self_attn.q_norm.weight",
    .k_norm = "model.layers.N.self_attn.k_norm.weight",
    .q = "model.layers.N.self_attn.q_proj.weight",
    .k = "model.layers.N.self_attn.k_proj.weight",
    .v = "model.layers.N.self_attn.v_proj.weight",
    .attention_out = "model.layers.N.self_attn.o_proj.weight",
    .gate = "model.layers.N.mlp.gate_proj.weight",
    .up = "model.layers.N.mlp.up_proj.weight",
    .down = "model.layers.N.mlp.down_proj.weight",
    .q_bias = "model.layers.N.self_attn.q_proj.bias",
    .k_bias = "model.layers.N.self_attn.k_proj.bias",
    .v_bias = "model.layers.N.self_attn.v_proj.bias",
};

constexpr NameTable llada_moe_names() {
  NameTable names = kHuggingFaceNames;
  names.router = "model.layers.N.mlp.gate.weight";
  names.gate = "model.layers.N.mlp.experts.E.gate_proj.weight";
  names.up = "model.layers.N.mlp.experts.E.up_proj.weight";
  names.down = "model.layers.N.mlp.experts.E.down_proj.weight";
  return names;
}

// LLaDA-8B, 1.5 and everything in its layout. The checks cover every switch of configuration_llada
// that changes the arithmetic; where the required ones are absent, its own defaults are others.
Family llada() {
  Family f = {.name = "llada",
              .types = {"llada"},
              .architectures = {"LLaDAModelLM"},
              .keys = kLladaKeys,
              .names = kLladaNames,
              .tied = {"weight_tying"},
              .qkv_bias = {},
              .qk_norm = {"qk_layernorm"},
              .shift = {"shift_logits"},
              .only = {{"block_type", "llama", true},
                       {"layer_norm_type", "rms", true},
                       {"activation_type", "silu", true},
                       {"rope", true, true},
                       {"layer_norm_with_affine", true}}};
  for (const char* key : {"include_bias", "include_qkv_bias", "bias_for_layer_norm", "alibi",
                          "attention_layer_norm", "input_emb_norm", "scale_logits"}) {
    f.only.push_back({key, false});
  }
  return f;
}

// Dream-7B, Dream-Coder-7B, DiffuCoder-7B: Qwen2.5's layout. Positions count from 0 without gaps:
// Dream's skip padding, and there is none here.
Family dream() {
  return {.name = "dream",
          .types = {"Dream"},
          .architectures = {"DreamModel"},
          .keys = kHuggingFaceKeys,
          .names = kHuggingFaceNames,
          .tied = {"tie_word_embeddings"},
          .qkv_bias = {"attention_bias", true},
          .qk_norm = {},
          .shift = {nullptr, true},
          .only = {{"hidden_act", "silu", true},
                   {"use_mrope", false},
                   {"use_sliding_window", false},
                   {"rope_scaling", nullptr}}};
}

// iLLaDA-8B. Its config.json names no mask.
Family illada() {
  return {.name = "illada",
          .types = {"illada", "iLLaDA", "llada"},
          .architectures = {"ILLaDAForCausalLM"},
          .keys = kHuggingFaceKeys,
          .names = kHuggingFaceNames,
          .tied = {"tie_word_embeddings", true},
          .qkv_bias = {},
          .qk_norm = {},
          .shift = {},
          .only = {{"hidden_act", "silu", true},
                   {"attention_bias", false},
                   {"mlp_bias", false},
                   {"layer_norm_eps", nullptr},  // set: LayerNorm in place of RMSNorm
                   {"rope_scaling", nullptr}},
          .mask_token_id = 5};
}

// LLaDA-MoE-7B-A1B: every layer's FFN is a mixture of experts. Its config.json names no mask.
Family llada_moe() {
  return {.name = "llada-moe",
          .types = {"llada", "llada_moe", "lladamoe"},
          .architectures = {"LLaDAMoEModelLM", "LLaDAMoEModel"},
          .keys = llada_moe_keys(),
          .names = llada_moe_names(),
          .tied = {"tie_word_embeddings"},
          .qkv_bias = {},
          .qk_norm = {"qk_layernorm", true},
          .shift = {},
          .only = {{"hidden_act", "silu", true},
                   {"attention_bias", false},
                   {"clip_qkv", nullptr},
                   {"moe_layer_freq", Ones{}},
                   {"moe_router_enable_expert_bias", false},
                   {"moe_router_score_function", "softmax"},
                   {"norm_topk_prob", false},
                   {"routed_scaling_factor", 1.0},
                   {"router_num_group", nullptr},
                   {"router_topk_group", nullptr},
                   {"partial_rotary_factor", 1.0},
                   {"rope_scaling", nullptr}},
          .mask_token_id = 156895};
}

}  // namespace

const std::vector<Family>& families() {
  static const std::vector<Family> table = {llada(), dream(), illada(), llada_moe()};
  return table;
}

const Family& family(const std::string& name) {
  const auto& table = families();
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const Family& f) { return name == f.name; });
  internal_check(found != table.end(), "[model] family: expected one of the table, got ", name);
  return *found;
}

}  // namespace bicache
