// A strict reader of safetensors files: 8-byte little-endian header length, JSON header, tensor
// bytes. Stricter than the reference reader: duplicate keys and unknown fields are errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "files/mapped_file.h"

namespace bicache {

struct TensorInfo {
  std::string dtype;  // as written: F32, BF16, F16, I64, ...
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // bytes, within the data section
};

class SafeTensors {
 public:
  static constexpr int64_t kMaxHeaderBytes = 100'000'000;  // as the format prescribes

  // std::invalid_argument names the file, the tensor and the rule that is broken; FileError if the
  // file cannot be opened.
  explicit SafeTensors(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // `t` must be one of tensors().
  std::span<const std::byte> data(const TensorInfo& t) const;
  void check_size() const { file_.check_size(); }

 private:
  MappedFile file_;
  size_t data_begin_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

// "[2, 3]"; of more than 8 dimensions the first 8.
std::string shape_text(std::span<const int64_t> shape);

}  // namespace bicache
