// ModelConfig: the numbers and flags of one checkpoint. Model families are flags and name tables,
// not subclasses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "files/json.h"

namespace bicache {

struct ModelConfig {
  std::string family;      // one of families()
  int layers = 0;          // L
  int64_t dim = 0;         // E
  int64_t heads = 0;       // H
  int64_t kv_heads = 0;    // G
  int64_t head_dim = 0;    // D
  int64_t ffn = 0;         // F; with experts: of each of them
  int64_t vocab = 0;       // V: ids that can be predicted
  int64_t embeddings = 0;  // ids that can stand in a canvas, >= V
  int64_t context = 0;     // rows a canvas may have
  float norm_eps = 1e-5f;
  double rope_theta = 10000;
  int64_t experts = 0;  // FFNs of a layer, which a router chooses from; 0: one, and no router
  int64_t experts_per_row = 0;  // how many of them run a row
  bool tied = false;            // the output head is the embedding
  bool qkv_bias = false;        // q, k and v have biases
  bool qk_norm = false;         // RMSNorm with weights [D] on every query and key head, before RoPE
  int shift = 0;                // position i is predicted from row i - shift
  int64_t known_ids = 0;        // ids below this have a token; 0: all that can be predicted
  int32_t mask_token_id = -1;
  int32_t eos_token_id = -1;  // -1: none
  int32_t eot_token_id = -1;  // end of turn; -1: none

  // Ids [0, sampled_ids()) may be sampled: others would be no text.
  int64_t sampled_ids() const { return known_ids > 0 ? std::min(known_ids, vocab) : vocab; }
  int64_t q_width() const { return heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }

  // From a Hugging Face config.json. std::invalid_argument "[where] key: expected X, got Y" for
  // what is missing, out of range, contradictory, or not supported.
  static ModelConfig parse(const Json& json, const std::string& where);
};

}  // namespace bicache
