// A model of llama.cpp, one GGUF file or several, as the Hugging Face folder it was made from:
// config.json's keys from the metadata, tensors under the folder's names. (llama.cpp's conversion
// of LLaDA, Dream and LLaDA-MoE, undone.)
#pragma once

#include <map>
#include <string>
#include <vector>

#include "files/gguf.h"
#include "files/json.h"
#include "files/tensor.h"

namespace bicache {

struct Architecture;

class GgufCheckpoint {
 public:
  // `path`: the file; of a split model its first, the others lie beside it. Throws as Gguf does,
  // and std::invalid_argument for architectures that are not known.
  explicit GgufCheckpoint(const std::string& path);

  const std::string& path() const { return files_[0].path(); }
  const Json& config() const { return config_; }
  // Names as in the folder; tensors that it would not have keep theirs.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const { return places_.contains(name); }
  // `name` must be one of them. std::invalid_argument if its type is not read.
  Tensor tensor(const std::string& name) const;
  // What the file calls the tensor that the folder calls `name`; as it is, where it has no name.
  std::string stored_name(const std::string& name) const;
  // All tensors as the files have them, under the files' names; of any type.
  std::vector<Tensor> stored() const;
  void check_size() const;

 private:
  struct Place {
    size_t file = 0;
    std::string stored_name;
    GgufTensor tensor;
    int64_t interleaved_head = 0;
    int64_t part = -1;  // of the first dimension; -1: all of it
  };

  void open_others(const std::string& path);
  void add(const std::string& name, Place place);
  void add_tensors();

  const Architecture* architecture_ = nullptr;
  std::vector<Gguf> files_;
  std::map<std::string, Place> places_;
  Json config_;
};

}  // namespace bicache
