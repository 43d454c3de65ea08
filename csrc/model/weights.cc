#include "model/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>
#include <unordered_map>

#include "base/check.h"
#include "base/convert.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "model/balance.h"
#include "model/families.h"

namespace bicache {
namespace {

// Buffers that some exporters store and nobody needs: they follow from the configuration.
bool is_derived(const std::string& name) { return name.ends_with("rotary_emb.inv_freq"); }

// int8 where a file holds matrices in fewer bits than bf16; otherwise the narrowest type that holds
// every matrix as it is stored. Routers do not count: they are held in float32 in any case.
DType stored_type(const std::vector<Tensor>& tensors, const char* router) {
  const std::string_view table = router == nullptr ? "" : router;
  const std::string_view suffix = table.substr(std::min(table.find(".N.") + 2, table.size()));
  DType type = DType::bf16;
  for (const Tensor& t : tensors) {
    const DType held = t.dtype.format().held;
    if (t.shape.size() == 1 || (!suffix.empty() && t.name.ends_with(suffix))) continue;
    if (is_quantised(held)) return held;
    if (held == DType::f32) type = held;
  }
  return type;
}

uint64_t hash_tensor(const Tensor& t) {
  uint64_t h = hash_bytes(std::as_bytes(std::span(t.name)), t.dtype.id());
  h = hash_bytes(std::as_bytes(std::span(t.shape)), h);
  if (t.interleaved_head > 0) h = mix(h + static_cast<uint64_t>(t.interleaved_head));
  return hash_bytes(t.bytes, h);
}

// Finite, also after rounding to `kept`.
void check_finite(const Tensor& t, DType kept, const std::string& where) {
  const StoredMatrix m = t.matrix();
  std::vector<float> row(static_cast<size_t>(m.cols));
  for (int64_t i = 0; i < m.rows; ++i) {
    m.row(i, row.data());
    for (int64_t j = 0; j < m.cols; ++j) {
      float x = row[static_cast<size_t>(j)];
      if (kept != DType::f32) x = to_float(to_bf16(x));
      require((std::bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u, "[", where, "] tensor ",
              t.stored_name.empty() ? t.name : t.stored_name,
              ": expected weights that are finite in ", name(kept), ", got NaN or Inf at element ",
              i * m.cols + j);
    }
  }
}

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const ModelConfig& config, const NameTable& names,
         const Kernels& kernels, Backend backend, int threads)
      : checkpoint_(checkpoint),
        c_(config),
        names_(names),
        kernels_(kernels),
        backend_(backend),
        threads_(threads) {}

  Weights load(std::optional<DType> dtype) {
    check_names();
    for (const auto& [name, shape] : expected_) tensors_.push_back(checkpoint_.tensor(name, shape));
    checkpoint_.check_size();
    Weights w;
    w.dtype = dtype.value_or(backend_ == Backend::blas ? DType::f32
                                                       : stored_type(tensors_, names_.router));
    require(
        backend_ == Backend::packed || w.dtype == DType::f32,
        "[model] dtype: expected f32 with backend=\"blas\" (OpenBLAS has no bf16 product), got ",
        name(w.dtype));
    std::vector<uint64_t> hashes(tensors_.size());
    parallel_for(static_cast<int64_t>(tensors_.size()), threads_, [&](int64_t i) {
      const Tensor& t = tensors_[static_cast<size_t>(i)];
      check_finite(t, t.shape.size() == 1 ? DType::f32 : w.dtype, checkpoint_.folder());
      hashes[static_cast<size_t>(i)] = hash_tensor(t);
    });
    w.hash = hash_bytes(std::as_bytes(std::span(hashes)));
    // A lookup: nothing is gained by fewer than 16 bits.
    w.embedding_dtype = is_quantised(w.dtype) ? DType::bf16 : w.dtype;
    w.embedding = embedding(w.embedding_dtype);
    if (is_quantised(w.dtype)) balance_ = balanced();
    for (int l = 0; l < c_.layers; ++l) w.layers.push_back(layer(l, w.dtype));
    w.final_norm = vector(names_.final_norm, balance_.final);
    w.head =
        matrix(head_name(), c_.vocab, c_.dim, head_type(w.dtype), {nullptr, data(balance_.final)});
    return w;
  }

 private:
  using Shape = std::vector<int64_t>;

  static std::string at(const char* name, int layer, int64_t expert = 0) {
    std::string text = name;
    if (const size_t n = text.find(".N."); n != std::string::npos)
      text.replace(n + 1, 1, std::to_string(layer));
    if (const size_t n = text.find(".E."); n != std::string::npos)
      text.replace(n + 1, 1, std::to_string(expert));
    return text;
  }
  int64_t ffns() const { return std::max<int64_t>(c_.experts, 1); }

  const char* head_name() const { return c_.tied ? names_.embedding : names_.head; }

  void expect(std::string name, Shape shape) {
    expected_.emplace_back(std::move(name), std::move(shape));
  }

  void check_names() {
    const auto stored = static_cast<int64_t>(checkpoint_.names().size());
    require(c_.layers * ffns() <= stored, "[", checkpoint_.folder(),
            "] tensors: expected those of ", c_.layers, " layers of ", ffns(), " FFN each, got ",
            stored, " in all");
    const int64_t e = c_.dim, q = c_.q_width(), kv = c_.kv_width();
    expect(names_.embedding, {c_.embeddings, e});
    for (int l = 0; l < c_.layers; ++l) {
      expect(at(names_.attention_norm, l), {e});
      expect(at(names_.ffn_norm, l), {e});
      if (c_.qk_norm) {
        expect(at(names_.q_norm, l), {c_.head_dim});
        expect(at(names_.k_norm, l), {c_.head_dim});
      }
      expect(at(names_.q, l), {q, e});
      expect(at(names_.k, l), {kv, e});
      expect(at(names_.v, l), {kv, e});
      if (c_.qkv_bias) {
        expect(at(names_.q_bias, l), {q});
        expect(at(names_.k_bias, l), {kv});
        expect(at(names_.v_bias, l), {kv});
      }
      expect(at(names_.attention_out, l), {e, q});
      if (c_.experts > 0) expect(at(names_.router, l), {c_.experts, e});
      for (int64_t x = 0; x < ffns(); ++x) {
        expect(at(names_.gate, l, x), {c_.ffn, e});
        expect(at(names_.up, l, x), {c_.ffn, e});
        expect(at(names_.down, l, x), {e, c_.ffn});
      }
    }
    expect(names_.final_norm, {e});
    if (!c_.tied) expect(names_.head, {c_.embeddings, e});

    for (const auto& [name, shape] : expected_) where_.emplace(name, where_.size());
    for (const std::string& name : checkpoint_.names()) {
      require(where_.contains(name) || is_derived(name), "[", checkpoint_.folder(), "] tensor ",
              name, ": expected only tensors of a ", c_.family,
              " model as its configuration describes it (", c_.layers, " layers), got one more");
    }
  }

  const Tensor& find(const std::string& name) const {
    const auto it = where_.find(name);
    internal_check(it != where_.end(), "[model] tensor ", name, " was not expected");
    return tensors_[it->second];
  }

  // Divided by `factors`, if there are any.
  Buffer<float> vector(const std::string& name, const std::vector<float>& factors = {}) const {
    const Tensor& t = find(name);
    Buffer<float> out(t.shape[0]);
    t.matrix().row(0, out.data());
    for (size_t i = 0; i < factors.size(); ++i) out[static_cast<int64_t>(i)] /= factors[i];
    return out;
  }

  static const float* data(const std::vector<float>& factors) {
    return factors.empty() ? nullptr : factors.data();
  }

  Balance balanced() const {
    const auto stored = [&](const std::string& name) { return find(name).matrix(); };
    const auto floats = [&](const std::string& name) {
      const Buffer<float> v = vector(name);
      return std::vector<float>(v.data(), v.data() + v.size());
    };
    std::vector<StoredLayer> layers;
    for (int l = 0; l < c_.layers; ++l) {
      layers.push_back({floats(at(names_.attention_norm, l)),
                        floats(at(names_.ffn_norm, l)),
                        stored(at(names_.q, l)),
                        stored(at(names_.k, l)),
                        stored(at(names_.v, l)),
                        stored(at(names_.attention_out, l)),
                        {}});
      for (int64_t x = 0; x < ffns(); ++x) {
        layers.back().ffn.push_back({stored(at(names_.gate, l, x)), stored(at(names_.up, l, x)),
                                     stored(at(names_.down, l, x))});
      }
    }
    return balance(stored(names_.embedding), layers, floats(names_.final_norm), stored(head_name()),
                   threads_);
  }

  Buffer<std::byte> embedding(DType kept) const {
    const Tensor& t = find(names_.embedding);
    const int64_t count = checked_mul(c_.embeddings, c_.dim, "embedding");
    Buffer<std::byte> out(checked_mul(count, size_bytes(kept), "embedding"));
    if (t.dtype == kept) {
      std::memcpy(out.data(), t.bytes.data(), t.bytes.size());
      return out;
    }
    parallel_for(c_.embeddings, threads_, [&](int64_t i) {
      std::vector<float> row(static_cast<size_t>(c_.dim));
      t.matrix().row(i, row.data());
      convert(row.data(), DType::f32, c_.dim, out.data() + i * c_.dim * size_bytes(kept), kept);
    });
    return out;
  }

  Matrix matrix(const std::string& name, int64_t outputs, int64_t inputs, DType kept,
                Factors factors = {}) const {
    StoredMatrix stored = find(name).matrix();
    stored.rows = outputs;
    internal_check(stored.cols == inputs, "[model] tensor ", name, ": expected ", inputs,
                   " inputs, got ", stored.cols);
    return {kernels_, backend_, stored, kept, threads_, factors};
  }

  LayerWeights layer(int l, DType kept) const {
    const int64_t e = c_.dim, q = c_.q_width(), kv = c_.kv_width();
    const LayerBalance b = balance_.layers.empty() ? LayerBalance{} : balance_.layers[l];
    const Factors attention = {nullptr, data(b.attention)};
    LayerWeights w;
    w.attention_norm = vector(at(names_.attention_norm, l), b.attention);
    w.ffn_norm = vector(at(names_.ffn_norm, l), b.ffn);
    if (c_.qk_norm) {
      w.q_norm = vector(at(names_.q_norm, l));
      w.k_norm = vector(at(names_.k_norm, l));
    }
    w.q = matrix(at(names_.q, l), q, e, kept, attention);
    w.k = matrix(at(names_.k, l), kv, e, kept, attention);
    w.v = matrix(at(names_.v, l), kv, e, kept, attention);
    if (c_.qkv_bias) {
      w.q.set_bias(vector(at(names_.q_bias, l)));
      w.k.set_bias(vector(at(names_.k_bias, l)));
      w.v.set_bias(vector(at(names_.v_bias, l)));
    }
    w.attention_out = matrix(at(names_.attention_out, l), e, q, kept);
    if (c_.experts > 0)
      w.router = matrix(at(names_.router, l), c_.experts, e, DType::f32, {nullptr, data(b.ffn)});
    for (int64_t x = 0; x < ffns(); ++x) w.ffn.push_back(ffn(l, x, kept, b));
    return w;
  }

  Ffn ffn(int l, int64_t x, DType kept, const LayerBalance& b) const {
    const int64_t e = c_.dim;
    const std::vector<float> inner = b.inner.empty() ? std::vector<float>{} : b.inner[x];
    std::vector<float> inverse;
    for (const float s : inner) inverse.push_back(1 / s);
    return {matrix(at(names_.gate, l, x), c_.ffn, e, kept, {nullptr, data(b.ffn)}),
            matrix(at(names_.up, l, x), c_.ffn, e, kept, {data(inverse), data(b.ffn)}),
            matrix(at(names_.down, l, x), e, c_.ffn, kept, {nullptr, data(inner)})};
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& c_;
  const NameTable& names_;
  const Kernels& kernels_;
  Backend backend_;
  int threads_;
  std::vector<std::pair<std::string, Shape>> expected_;
  std::unordered_map<std::string, size_t> where_;  // of expected_ and tensors_
  std::vector<Tensor> tensors_;
  Balance balance_;  // quantised weights only
};

}  // namespace

int64_t Weights::size_bytes() const {
  int64_t bytes = embedding.size_bytes() + final_norm.size_bytes() + head.size_bytes();
  for (const LayerWeights& w : layers) {
    for (const Buffer<float>* b : {&w.attention_norm, &w.ffn_norm, &w.q_norm, &w.k_norm})
      bytes += b->size_bytes();
    for (const Matrix* m : {&w.q, &w.k, &w.v, &w.attention_out, &w.router})
      bytes += m->size_bytes();
    for (const Ffn& f : w.ffn)
      bytes += f.gate.size_bytes() + f.up.size_bytes() + f.down.size_bytes();
  }
  return bytes;
}

void Weights::embed(int32_t token, int64_t dim, float* x) const {
  const std::byte* row = embedding.data() + token * dim * bicache::size_bytes(embedding_dtype);
  if (embedding_dtype == DType::f32) {
    std::memcpy(x, row, static_cast<size_t>(dim) * 4);
    return;
  }
  const bf16* values = reinterpret_cast<const bf16*>(row);
  for (int64_t i = 0; i < dim; ++i) x[i] = to_float(values[i]);
}

Weights load_weights(const Checkpoint& checkpoint, const ModelConfig& config,
                     const Kernels& kernels, Backend backend, std::optional<DType> dtype,
                     int threads) {
  return Loader(checkpoint, config, family(config.family).names, kernels, backend, threads)
      .load(dtype);
}

}  // namespace bicache
