// Model: weights and the one forward pass, which executes the plans of one or several requests at
// once.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/plan.h"
#include "cache/request.h"
#include "cache/step_info.h"
#include "model/config.h"
#include "model/weights.h"

namespace bicache {

// Opt-in look at the activations of a pass: layer (L: after the last), name, rows of all requests
// in the batch, one after the other. Names: "residual" [R, E] entering the layer, "q" [R, H * D],
// "k", "v" [R, G * D] (q, k after RoPE), "attention" [R, E] (after the output projection), "ffn"
// [R, E], "logits" [R, V]. K and V are shown as they were computed, before they are held as
// Model::kv_dtype.
using Tap = std::function<void(int layer, const char* name, View<const float> values)>;

// One request's part in a pass.
struct Pass {
  RequestState* request = nullptr;
  const StepPlan* plan = nullptr;
  PrefixEntry* record = nullptr;  // filled with K, V and residuals of its first rows, if not null
  View<float> logits;  // out: [plan->logits.size(), V]; the workspace's, until its next pass
  std::vector<Similarity> similarity = {};  // out: of the observed rows, [plan->observe.end]
  float* logits_to = nullptr;               // of a pass of one request: where they go instead
};

// Buffers of a pass, grown as needed and reused. One pass at a time.
struct Workspace {
  std::vector<Buffer<float>> residual;  // per request [N + observed rows, E]
  Activations normed;                   // [R, E]
  Buffer<float> q, mixed;               // [R, H * D]
  Buffer<float> k, v;                   // [R, G * D]
  Activations mixed_in;                 // [R, H * D]: mixed, converted
  Buffer<float> attention, ffn;         // [R, E]
  Buffer<float> gate;                   // [R, F], quantised weights only
  Activations routed, gathered;         // [R, E]: what the router sees; the rows of one expert
  Buffer<float> router;                 // [R, experts]
  Buffer<float> expert;                 // [R, E]: what one expert makes of its rows
  Activations gated;                    // [R, F]: silu(gate) * up
  Activations final_normed;             // [R, E] of the rows with logits
  Buffer<float> logits;                 // [R, V]
  std::vector<const void*> key_rows;    // per request: K pointers [N], V pointers [N]
  std::vector<Buffer<float>> lent;      // a layer of prefix entries that are widened, [p, 2, G, D]
  Buffer<float> cos, sin;               // RoPE, [rope_rows, D / 2]
  int64_t rope_rows = 0;
};

class Model {
 public:
  // Reads, checks and packs a checkpoint (files/checkpoint.h). `kv_dtype`: f32 or bf16; empty: f32
  // with f32 weights, otherwise bf16. `eot_token_id`: what the tokenizer knows where config.json
  // does not say. `known_ids`: how many ids the tokenizer has tokens for; 0: there is none.
  static std::shared_ptr<const Model> load(const std::string& folder, Backend backend,
                                           std::optional<DType> dtype,
                                           std::optional<DType> kv_dtype, int threads,
                                           int32_t eot_token_id = -1,
                                           const Kernels& kernels = bicache::kernels(),
                                           int64_t known_ids = 0);

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  Backend backend() const { return backend_; }
  // What K and V are rounded to as they are written, and held in.
  DType kv_dtype() const { return kv_dtype_; }
  // Of the weights and of everything in the configuration that a pass depends on; 16 hex digits.
  // Not cryptographic.
  std::string fingerprint() const;
  const Kernels& kernels() const { return *kernels_; }

  // A request of this model: canvas, p, and the storage its policy asks for.
  RequestState make_request(std::vector<int32_t> tokens, int64_t p, const Kept& kept) const;

  // One pass: GEMMs over the rows of all requests together, attention per request over all its N
  // keys. Bits of a row do not depend on the other requests or on `threads` (Backend::packed).
  // Requests must be distinct.
  void forward(std::span<Pass> batch, Workspace& workspace, int threads, const Tap& tap = {}) const;

 private:
  Model(ModelConfig config, Weights weights, Backend backend, DType kv_dtype,
        const Kernels& kernels);

  ModelConfig config_;
  Weights weights_;
  Backend backend_;
  DType kv_dtype_;
  const Kernels* kernels_;
};

}  // namespace bicache
