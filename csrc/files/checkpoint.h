// A model's files: a Hugging Face folder (config.json, and model.safetensors or the shards of
// model.safetensors.index.json), or a GGUF file, which looks like the folder it was made from.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "files/gguf_checkpoint.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "files/tensor.h"

namespace bicache {

// A JSON file that holds an object. FileError or std::invalid_argument, which name the file.
Json read_json(const std::string& path);

class Checkpoint {
 public:
  // `path`: a folder, or a file whose name ends with .gguf. FileError if it or a file of it is
  // missing; std::invalid_argument for everything that is wrong inside.
  explicit Checkpoint(const std::string& path);

  const std::string& folder() const { return folder_; }  // or the GGUF file
  const Json& config() const { return gguf_ ? gguf_->config() : config_; }
  // Where config() comes from, for messages.
  std::string config_path() const { return folder_ + (gguf_ ? " metadata" : "/config.json"); }
  // Names of all tensors, sorted.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const {
    return gguf_ ? gguf_->has(name) : where_.contains(name);
  }
  // Tensor `name`, checked: std::invalid_argument "[folder] tensor NAME: expected shape [..], got
  // [..]" (or is missing, or has a type that is not read: other than F32 and BF16 in safetensors).
  Tensor tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  // As stored, unchecked except for its type.
  Tensor tensor(const std::string& name) const;
  // All of them under the names the files have for them; of a GGUF file of any type.
  std::vector<Tensor> stored() const;
  // Sum of the tensors' bytes.
  int64_t size_bytes() const;
  // std::invalid_argument if a mapped file has been truncated meanwhile.
  void check_size() const;

 private:
  void open_folder();
  void open_shards();
  void add_shard(const std::string& path);

  std::string folder_;
  Json config_;
  std::vector<SafeTensors> shards_;
  std::map<std::string, size_t> where_;  // tensor -> shard
  std::optional<GgufCheckpoint> gguf_;   // in place of all these
};

}  // namespace bicache
