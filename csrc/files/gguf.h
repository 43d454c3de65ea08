// A strict reader of GGUF files (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little
// endian: header, key-values, tensor table, then tensors at multiples of the alignment. Stricter
// than llama.cpp: text is UTF-8 without NUL, booleans are 0 or 1, shapes have no 0, and nothing but
// padding stands behind the last tensor. Arrays of arrays are refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/stored.h"
#include "files/mapped_file.h"

namespace bicache {

// A value of the metadata; its bytes are the file's, and were checked when it was opened.
class GgufValue {
 public:
  // The format's numbers for types.
  enum Type : uint32_t {
    kUint8,
    kInt8,
    kUint16,
    kInt16,
    kUint32,
    kInt32,
    kFloat32,
    kBoolean,
    kString,
    kArray,
    kUint64,
    kInt64,
    kFloat64
  };
  // uint64_t only for what no int64_t holds.
  using Element = std::variant<bool, int64_t, uint64_t, double, std::string_view>;

  bool is_array() const { return is_array_; }
  Type type() const { return type_; }       // of an array: of its elements
  int64_t count() const { return count_; }  // of an array's elements; otherwise 1
  // "uint32", "array of string".
  std::string type_name() const;

  // All elements of an array; otherwise the value alone.
  std::vector<Element> elements() const;
  // The value, or std::invalid_argument "[where] what: expected an integer, got ..."; number()
  // takes integers too.
  bool boolean(std::string_view where, std::string_view what) const;
  int64_t integer(std::string_view where, std::string_view what) const;
  double number(std::string_view where, std::string_view what) const;
  std::string string(std::string_view where, std::string_view what) const;

 private:
  friend class GgufParser;
  Element scalar(std::string_view where, std::string_view what, const char* expected) const;

  Type type_ = kUint8;
  bool is_array_ = false;
  int64_t count_ = 1;
  std::span<const std::byte> bytes_;
};

struct GgufTensor {
  const Format* format = nullptr;
  std::vector<int64_t> shape;   // row-major: slowest first, as everywhere here (the file: fastest)
  int64_t begin = 0, size = 0;  // bytes, within the data section
};

class Gguf {
 public:
  // std::invalid_argument names the file and the rule that is broken; FileError if the file cannot
  // be opened.
  explicit Gguf(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }
  // `t` must be one of tensors().
  std::span<const std::byte> data(const GgufTensor& t) const;
  void check_size() const { file_.check_size(); }

 private:
  MappedFile file_;
  size_t data_begin_ = 0;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, GgufTensor> tensors_;
};

}  // namespace bicache
