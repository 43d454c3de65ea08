// The weights of one model, packed for the kernels. families.h says where a checkpoint keeps them.
#pragma once

#include <optional>
#include <vector>

#include "files/checkpoint.h"
#include "kernels/gemm.h"
#include "model/config.h"

namespace bicache {

struct Ffn {
  Matrix gate, up;  // [F, E]
  Matrix down;      // [E, F]
};

struct LayerWeights {
  Buffer<float> attention_norm, ffn_norm;  // [E]
  Buffer<float> q_norm, k_norm;            // [D]; empty without qk_norm
  Matrix q;                                // [H * D, E]
  Matrix k, v;                             // [G * D, E]
  Matrix attention_out;                    // [E, H * D]
  Matrix router;         // [experts, E], float32: it decides; without experts none
  std::vector<Ffn> ffn;  // one, or one per expert
};

struct Weights {
  DType dtype = DType::f32;  // of the matrices; norms are float32
  DType embedding_dtype = DType::f32;
  Buffer<std::byte> embedding;  // [embeddings, E]
  std::vector<LayerWeights> layers;
  Buffer<float> final_norm;  // [E]
  Matrix head;               // [V, E]; of a tied model packed from the embedding
  uint64_t hash = 0;         // of names, shapes, types and bytes as the checkpoint has them

  int64_t size_bytes() const;
  // x[0..E) = the embedding of `token`, in float32.
  void embed(int32_t token, int64_t dim, float* x) const;
};

// What the output head is held in: it decides between tokens, so never in less than int8.
constexpr DType head_type(DType dtype) { return dtype == DType::int4 ? DType::int8 : dtype; }

// Every tensor the family needs, with its shape checked before anything is packed; tensors nobody
// asked for, and NaN or Inf in a weight, are errors that name the tensor. `dtype`: what to hold the
// matrices in; empty: as the checkpoint does, and int8 where it has fewer bits than bf16 (float32
// with Backend::blas).
Weights load_weights(const Checkpoint& checkpoint, const ModelConfig& config,
                     const Kernels& kernels, Backend backend, std::optional<DType> dtype,
                     int threads);

}  // namespace bicache
