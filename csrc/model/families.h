// The families of checkpoints that load: how each one's config.json and tensors are named, and what
// is fixed in it. A family is a row of a table; nothing else asks for its name.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace bicache {

// Names in config.json; null: the family has no such key.
struct ConfigKeys {
  const char *layers, *dim, *heads, *kv_heads, *ffn, *vocab, *context, *norm_eps, *rope_theta;
  const char* multi_query = nullptr;  // where kv_heads is absent: true: 1, false: as many as heads
  const char* ffn_ratio = nullptr;    // where ffn is absent: times dim; absent as well: 4
  const char* embeddings = nullptr;   // absent: as vocab
  const char *experts = nullptr, *experts_per_row = nullptr;
};

// A flag: the value of a key, or `fallback` where the key is null or absent.
struct Flag {
  const char* key = nullptr;
  bool fallback = false;
};

// A list of nothing but the number 1.
struct Ones {};

// The one value of a key that the engine computes; null allows nothing but null.
struct Only {
  const char* key;
  std::variant<std::nullptr_t, bool, double, const char*, Ones> value;
  bool required = false;  // absent is an error as well
};

// Where tensors are; "N" is the layer's number, "E" the expert's.
struct NameTable {
  const char *embedding, *final_norm, *head;
  const char *attention_norm, *ffn_norm, *q_norm, *k_norm, *q, *k, *v, *attention_out, *gate, *up,
      *down;
  const char *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *router = nullptr;
};

struct Family {
  const char* name;
  std::vector<const char*> types;          // model_type
  std::vector<const char*> architectures;  // architectures[0]
  ConfigKeys keys;
  NameTable names;
  Flag tied, qkv_bias, qk_norm, shift;
  std::vector<Only> only;
  int32_t mask_token_id = -1;  // where config.json does not say; -1: it must
};

const std::vector<Family>& families();

// The row of that name, which is in the table.
const Family& family(const std::string& name);

}  // namespace bicache
