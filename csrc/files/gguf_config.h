// config.json's keys from the metadata of a GGUF file.
#pragma once

#include <span>
#include <string>

#include "files/gguf.h"
#include "files/json.h"

namespace bicache {

// A tensor's name in llama.cpp, and in the folder the file was made from. "N": the layer's number;
// "X": an expert's, which llama.cpp keeps in one tensor.
struct GgufName {
  const char *gguf, *folder;
};

// What llama.cpp makes of a model family.
struct Architecture {
  const char* name;
  std::span<const GgufName> names;
  bool interleaved;  // rows of q and k: StoredMatrix::interleaved_head
  bool shift;        // position i is predicted from row i - 1, if the file does not say
  const char* keys;  // of config.json: those that are the same for all models
  bool olmo_names;   // of the sizes: d_model, n_heads, ... in place of hidden_size, ...
};

// That of the file; std::invalid_argument, with those known, if it is none of them.
const Architecture& gguf_architecture(const Gguf& file);

// `embeddings`: rows of the embedding. std::invalid_argument "[gguf] FILE: KEY: expected ...".
Json gguf_config(const Gguf& file, const Architecture& architecture, int64_t embeddings);

// The size of a query head.
int64_t gguf_head_dim(const Gguf& file, const Architecture& architecture);

}  // namespace bicache
