// A Hugging Face model folder: config.json, and model.safetensors or the shards of
// model.safetensors.index.json.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "files/json.h"
#include "files/safetensors.h"

namespace bicache {

// One weight of a checkpoint, mapped, not copied.
struct Tensor {
  std::string name;
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, possibly unaligned; valid while the checkpoint is
};

// A JSON file that holds an object. FileError or std::invalid_argument, which name the file.
Json read_json(const std::string& path);

class Checkpoint {
 public:
  // FileError if the folder or a file of it is missing; std::invalid_argument for everything that
  // is wrong inside.
  explicit Checkpoint(const std::string& folder);

  const std::string& folder() const { return folder_; }
  const Json& config() const { return config_; }
  // Names of all tensors, sorted.
  std::vector<std::string> names() const;
  bool has(const std::string& name) const { return where_.contains(name); }
  // Tensor `name`, checked: std::invalid_argument "[folder] tensor NAME: expected shape [..], got
  // [..]" (or is missing, or has a type other than F32 and BF16).
  Tensor tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  // As stored, unchecked except for its type.
  Tensor tensor(const std::string& name) const;
  // Sum of the tensors' bytes.
  int64_t size_bytes() const;
  // std::invalid_argument if a mapped file has been truncated meanwhile.
  void check_size() const;

 private:
  void open_shards();
  void add_shard(const std::string& path);

  std::string folder_;
  Json config_;
  std::vector<SafeTensors> shards_;
  std::map<std::string, size_t> where_;  // tensor -> shard
};

}  // namespace bicache
