#include "model/config.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "model/families.h"

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

  // What the engine computes, or an error.
  void only(const Only& o) const {
    const Json* v = present(o.key);
    if (v == nullptr && !o.required) return;
    if (v == nullptr || !equal(*v, o)) {
      fail("[", where_, "] ", o.key, ": expected ", text(o), " (nothing else is supported), got ",
           v == nullptr ? "nothing" : text(*v));
    }
  }

  bool flag(const Flag& f) const {
    return f.key == nullptr ? f.fallback : boolean(f.key, f.fallback);
  }

 private:
  const Json* present(const char* key) const {
    const Json* v = json_.find(key);
    return v == nullptr || v->is_null() ? nullptr : v;
  }

  bool equal(const Json& v, const Only& o) const {
    if (const auto* x = std::get_if<bool>(&o.value)) return v.boolean(where_, o.key) == *x;
    if (const auto* x = std::get_if<double>(&o.value)) return v.number(where_, o.key) == *x;
    if (const auto* x = std::get_if<const char*>(&o.value)) return v.string(where_, o.key) == *x;
    if (!std::holds_alternative<Ones>(o.value)) return false;  // null, and `v` is not
    const Json::Array& list = v.array(where_, o.key);
    return std::all_of(list.begin(), list.end(),
                       [&](const Json& x) { return x.number(where_, o.key) == 1; });
  }
  static std::string text(const Only& o) {
    if (const auto* x = std::get_if<bool>(&o.value)) return *x ? "true" : "false";
    if (const auto* x = std::get_if<double>(&o.value)) return cat(*x);
    if (const auto* x = std::get_if<const char*>(&o.value)) return quote(*x);
    return std::holds_alternative<Ones>(o.value) ? "only ones" : "null";
  }
  std::string text(const Json& v) const {
    switch (v.kind()) {
      case Json::Kind::boolean:
        return v.boolean(where_) ? "true" : "false";
      case Json::Kind::integer:
      case Json::Kind::number:
        return cat(v.number(where_));
      case Json::Kind::string:
        return quote(v.string(where_));
      default:
        return v.kind_name();
    }
  }

  const Json& json_;
  const std::string& where_;
};

ModelConfig parse_as(const Family& f, const Reader& r, const std::string& where) {
  for (const Only& o : f.only) r.only(o);
  const ConfigKeys& k = f.keys;
  ModelConfig c;
  c.family = f.name;
  c.layers = static_cast<int>(r.integer(k.layers, Reader::kRequired, 1, 4096));
  c.dim = r.integer(k.dim, Reader::kRequired, 1, kMaxDim);
  c.heads = r.integer(k.heads, Reader::kRequired, 1, kMaxDim);
  const bool multi_query = k.multi_query != nullptr && r.boolean(k.multi_query, false);
  c.kv_heads = r.integer(k.kv_heads, multi_query ? 1 : c.heads, 1, kMaxDim);
  const int64_t ffn =
      k.ffn_ratio == nullptr ? Reader::kRequired : r.integer(k.ffn_ratio, 4, 1, 1024) * c.dim;
  c.ffn = r.integer(k.ffn, ffn, 1, kMaxDim);
  c.vocab = r.integer(k.vocab, Reader::kRequired, 1, kMaxDim);
  c.embeddings = k.embeddings == nullptr ? c.vocab : r.integer(k.embeddings, c.vocab, 1, kMaxDim);
  c.context = r.integer(k.context, Reader::kRequired, 1, kMaxDim);
  c.norm_eps = static_cast<float>(r.number(k.norm_eps, 1e-30, 1));
  c.rope_theta = r.number(k.rope_theta, 1, 1e15);
  if (k.experts != nullptr) {
    c.experts = r.integer(k.experts, Reader::kRequired, 1, 65536);
    c.experts_per_row = r.integer(k.experts_per_row, Reader::kRequired, 1, c.experts);
  }
  c.qkv_bias = r.flag(f.qkv_bias);
  c.qk_norm = r.flag(f.qk_norm);
  c.shift = r.flag(f.shift) ? 1 : 0;
  c.tied = r.flag(f.tied);
  require(c.dim % c.heads == 0, "[", where, "] ", k.heads, ": expected a divisor of ", k.dim, " (",
          c.dim, "), got ", c.heads);
  require(c.heads % c.kv_heads == 0, "[", where, "] ", k.kv_heads, ": expected a divisor of ",
          k.heads, " (", c.heads, "), got ", c.kv_heads);
  c.head_dim = c.dim / c.heads;
  require(c.head_dim % 2 == 0, "[", where, "] ", k.dim, " / ", k.heads,
          ": expected an even head size for RoPE, got ", c.head_dim);
  r.integer("head_dim", c.head_dim, c.head_dim, c.head_dim);
  require(c.embeddings >= c.vocab, "[", where, "] ", k.embeddings, ": expected at least ", k.vocab,
          " (", c.vocab, "), got ", c.embeddings);
  const int64_t mask = f.mask_token_id < 0 ? Reader::kRequired : f.mask_token_id;
  c.mask_token_id = static_cast<int32_t>(r.integer("mask_token_id", mask, 0, c.embeddings - 1));
  require(c.mask_token_id < c.embeddings, "[", where, "] ", k.vocab, ": expected more than ",
          c.mask_token_id, ", the family's mask where mask_token_id is absent, got ", c.vocab);
  c.eos_token_id = static_cast<int32_t>(r.integer("eos_token_id", -1, 0, c.embeddings - 1));
  c.eot_token_id = static_cast<int32_t>(r.integer("eot_token_id", -1, 0, c.embeddings - 1));
  return c;
}

bool contains(const std::vector<const char*>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// The whole table, as an error lists it: "type or type (Architecture), ...".
std::string known() {
  std::string text;
  const auto list = [&](const std::vector<const char*>& names) {
    for (const char* name : names) text += cat(name == names[0] ? "" : " or ", name);
  };
  for (const Family& f : families()) {
    text += text.empty() ? "" : ", ";
    list(f.types);
    text += " (";
    list(f.architectures);
    text += ")";
  }
  return text;
}

// The first row that agrees with all the file says of the two.
const Family& find_family(const Json& json, const std::string& where) {
  const Json *type = json.find("model_type"), *classes = json.find("architectures");
  const bool typed = type != nullptr && !type->is_null();
  const std::string* name = typed ? &type->string(where, "model_type") : nullptr;
  const std::string* architecture = nullptr;
  if (classes != nullptr && !classes->is_null()) {
    const Json::Array& list = classes->array(where, "architectures");
    if (!list.empty()) architecture = &list[0].string(where, "architectures");
  }
  for (const Family& f : families()) {
    if (name == nullptr && architecture == nullptr) break;
    if ((name == nullptr || contains(f.types, *name)) &&
        (architecture == nullptr || contains(f.architectures, *architecture)))
      return f;
  }
  fail("[", where, "] model_type and architectures: expected one of ", known(), "; got ",
       name == nullptr ? "nothing" : quote(*name), " and ",
       architecture == nullptr ? "nothing" : quote(*architecture));
}

}  // namespace

ModelConfig ModelConfig::parse(const Json& json, const std::string& where) {
  json.object(where);
  return parse_as(find_family(json, where), Reader(json, where), where);
}

}  // namespace bicache
