// A small random checkpoint in a temporary folder, loaded for one kernel table.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "model/model.h"

namespace bicache {

struct TinyModel {
  int layers = 4;
  int64_t dim = 32, heads = 4, kv_heads = 2, ffn = 40, vocab = 53, context = 128;
  bool qk_norm = false, shift = false;
  std::string family = "llada";    // the others need no flag
  int64_t experts = 5, top_k = 2;  // of "llada-moe"
  unsigned seed = 1;
  int32_t eot = -1;  // end of turn; -1: none
  int32_t mask() const { return static_cast<int32_t>(vocab) - 1; }

  bool moe() const { return family == "llada-moe"; }

  // config.json of a family that names its sizes as Qwen does.
  std::string qwen_config() const {
    const std::string kind =
        family == "dream" ? R"("model_type": "Dream", "architectures": ["DreamModel"])"
        : moe()
            ? R"("model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "num_experts": )" +
                  std::to_string(experts) + ", \"num_experts_per_tok\": " + std::to_string(top_k)
            : R"("architectures": ["ILLaDAForCausalLM"], "tie_word_embeddings": true)";
    return "{" + kind + R"(, "hidden_act": "silu", "hidden_size": )" + std::to_string(dim) +
           ", \"num_attention_heads\": " + std::to_string(heads) +
           ", \"num_key_value_heads\": " + std::to_string(kv_heads) +
           ", \"num_hidden_layers\": " + std::to_string(layers) +
           (moe() ? ", \"expert_intermediate_size\": " : ", \"intermediate_size\": ") +
           std::to_string(ffn) + ", \"vocab_size\": " + std::to_string(vocab) +
           ", \"max_position_embeddings\": " + std::to_string(context) +
           ", \"rms_norm_eps\": 1e-06, \"rope_theta\": 500.0, \"mask_token_id\": " +
           std::to_string(mask()) + ", \"eos_token_id\": 0}";
  }

  std::map<std::string, std::vector<int64_t>> qwen_shapes() const {
    const int64_t d = dim / heads, kv = kv_heads * d;
    std::map<std::string, std::vector<int64_t>> s = {{"model.embed_tokens.weight", {vocab, dim}},
                                                     {"model.norm.weight", {dim}}};
    if (family != "illada") s["lm_head.weight"] = {vocab, dim};
    for (int l = 0; l < layers; ++l) {
      const std::string layer = "model.layers." + std::to_string(l) + ".";
      const std::string attention = layer + "self_attn.";
      s[layer + "input_layernorm.weight"] = s[layer + "post_attention_layernorm.weight"] = {dim};
      for (const char* which : {"q", "k", "v"}) {
        const int64_t rows = *which == 'q' ? dim : kv;
        s[attention + which + "_proj.weight"] = {rows, dim};
        if (family == "dream") s[attention + which + "_proj.bias"] = {rows};
      }
      s[attention + "o_proj.weight"] = {dim, dim};
      if (moe()) {
        s[attention + "q_norm.weight"] = s[attention + "k_norm.weight"] = {d};
        s[layer + "mlp.gate.weight"] = {experts, dim};
      }
      for (int64_t x = 0; x < (moe() ? experts : 1); ++x) {
        const std::string mlp =
            layer + "mlp." + (moe() ? "experts." + std::to_string(x) + "." : "");
        s[mlp + "gate_proj.weight"] = s[mlp + "up_proj.weight"] = {ffn, dim};
        s[mlp + "down_proj.weight"] = {dim, ffn};
      }
    }
    return s;
  }

  std::string config() const {
    if (family != "llada") return qwen_config();
    const auto flag = [](bool x) { return x ? "true" : "false"; };
    return "{\"model_type\": \"llada\", \"block_type\": \"llama\", \"layer_norm_type\": \"rms\", "
           "\"activation_type\": \"silu\", \"rope\": true, \"d_model\": " +
           std::to_string(dim) + ", \"n_heads\": " + std::to_string(heads) +
           ", \"n_kv_heads\": " + std::to_string(kv_heads) +
           ", \"n_layers\": " + std::to_string(layers) +
           ", \"mlp_hidden_size\": " + std::to_string(ffn) +
           ", \"vocab_size\": " + std::to_string(vocab) +
           ", \"max_sequence_length\": " + std::to_string(context) +
           ", \"rms_norm_eps\": 1e-05, \"rope_theta\": 500.0" +
           ", \"qk_layernorm\": " + flag(qk_norm) + ", \"shift_logits\": " + flag(shift) +
           ", \"mask_token_id\": " + std::to_string(mask()) + ", \"eos_token_id\": 0}";
  }

  std::map<std::string, std::vector<int64_t>> shapes() const {
    if (family != "llada") return qwen_shapes();
    const int64_t d = dim / heads, kv = kv_heads * d;
    std::map<std::string, std::vector<int64_t>> s = {
        {"wte.weight", {vocab, dim}}, {"ln_f.weight", {dim}}, {"ff_out.weight", {vocab, dim}}};
    for (int l = 0; l < layers; ++l) {
      const std::string block = "blocks." + std::to_string(l) + ".";
      for (const char* norm : {"attn_norm", "ff_norm"}) s[block + norm + ".weight"] = {dim};
      if (qk_norm) s[block + "q_norm.weight"] = s[block + "k_norm.weight"] = {d};
      s[block + "q_proj.weight"] = s[block + "attn_out.weight"] = {dim, dim};
      s[block + "k_proj.weight"] = s[block + "v_proj.weight"] = {kv, dim};
      s[block + "ff_proj.weight"] = s[block + "up_proj.weight"] = {ffn, dim};
      s[block + "ff_out.weight"] = {dim, ffn};
    }
    std::map<std::string, std::vector<int64_t>> stored;
    for (const auto& [name, shape] : s) stored["model.transformer." + name] = shape;
    return stored;
  }

  // Writes config.json and model.safetensors (float32) into `folder`.
  void write(const std::filesystem::path& folder) const {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::string header = "{";
    std::vector<float> values;
    for (const auto& [name, shape] : shapes()) {
      const size_t begin = values.size() * 4;
      int64_t count = 1;
      std::string dims;
      for (const int64_t n : shape) {
        count *= n;
        dims += (dims.empty() ? "" : ",") + std::to_string(n);
      }
      const bool norm = shape.size() == 1;
      // Peaked attention: queries and keys are scaled up.
      const bool sharp = name.find("q_proj") != name.npos || name.find("k_proj") != name.npos;
      const float scale =
          norm ? 0.1f : (sharp ? 2.0f : 1.0f) / std::sqrt(static_cast<float>(shape[1]));
      for (int64_t i = 0; i < count; ++i)
        values.push_back((norm ? 1.0f : 0.0f) + scale * normal(rng));
      header += (header.size() > 1 ? ", " : "") + ("\"" + name) +
                "\": {\"dtype\": \"F32\", \"shape\": [" + dims + "], \"data_offsets\": [" +
                std::to_string(begin) + ", " + std::to_string(values.size() * 4) + "]}";
    }
    header += "}";
    std::ofstream(folder / "config.json") << config();
    std::ofstream file(folder / "model.safetensors", std::ios::binary);
    const uint64_t size = header.size();
    file.write(reinterpret_cast<const char*>(&size), 8);
    file << header;
    file.write(reinterpret_cast<const char*>(values.data()),
               static_cast<std::streamsize>(values.size() * 4));
  }

  std::shared_ptr<const Model> load(const Kernels& kernels = bicache::kernels(),
                                    std::optional<DType> dtype = {},
                                    std::optional<DType> kv_dtype = {},
                                    Backend backend = Backend::packed) const {
    std::string folder = (std::filesystem::temp_directory_path() / "bicache-tiny-XXXXXX").string();
    if (mkdtemp(folder.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    write(folder);
    auto model = Model::load(folder, backend, dtype, kv_dtype, 1, eot, kernels);
    std::filesystem::remove_all(folder);
    return model;
  }

  // `count` random ids, never the mask.
  std::vector<int32_t> ids(int64_t count, unsigned id_seed) const {
    std::mt19937 rng(id_seed);
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < count; ++i)
      tokens.push_back(static_cast<int32_t>(rng() % static_cast<unsigned>(vocab - 1)));
    return tokens;
  }
};

// A model whose products are worth several threads for a hundred rows.
inline TinyModel big_enough_for_threads() {
  TinyModel t;
  t.layers = 3;
  t.dim = 96;
  t.ffn = 256;
  return t;
}

}  // namespace bicache
