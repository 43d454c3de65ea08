// Hand-made GGUF files, for the tests of `files`; nothing is checked.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "temp_files.h"

namespace bicache {

inline std::string le32(uint32_t x) { return little_endian(x).substr(0, 4); }
inline std::string gguf_text(const std::string& s) { return little_endian(s.size()) + s; }

struct GgufImage {
  // A value of type `type` (the format's number) with these bytes.
  GgufImage& value(const std::string& key, uint32_t type, const std::string& bytes) {
    values.push_back(gguf_text(key) + le32(type) + bytes);
    return *this;
  }
  GgufImage& uint32(const std::string& key, uint32_t x) { return value(key, 4, le32(x)); }
  GgufImage& float32(const std::string& key, float x) {
    return value(key, 6, le32(std::bit_cast<uint32_t>(x)));
  }
  GgufImage& boolean(const std::string& key, bool x) {
    return value(key, 7, std::string(1, static_cast<char>(x)));
  }
  GgufImage& text(const std::string& key, const std::string& s) {
    return value(key, 8, gguf_text(s));
  }
  GgufImage& texts(const std::string& key, const std::vector<std::string>& all) {
    std::string bytes = le32(8) + little_endian(all.size());
    for (const std::string& s : all) bytes += gguf_text(s);
    return value(key, 9, bytes);
  }
  // An entry of the tensor table; sizes fastest first, as the file has them.
  GgufImage& entry(const std::string& name, const std::vector<uint64_t>& sizes, uint32_t type,
                   uint64_t offset) {
    std::string bytes = gguf_text(name) + le32(static_cast<uint32_t>(sizes.size()));
    for (const uint64_t n : sizes) bytes += little_endian(n);
    table.push_back(bytes + le32(type) + little_endian(offset));
    return *this;
  }
  // The same with its data, at the next aligned place.
  GgufImage& tensor(const std::string& name, const std::vector<uint64_t>& sizes, uint32_t type,
                    const std::string& bytes) {
    entry(name, sizes, type, data.size());
    data += bytes;
    data.resize((data.size() + alignment - 1) / alignment * alignment);
    return *this;
  }

  std::string bytes() const {
    std::string all = "GGUF" + le32(version) + little_endian(table.size() + more_tensors) +
                      little_endian(values.size() + more_values);
    for (const std::string& v : values) all += v;
    for (const std::string& t : table) all += t;
    if (!table.empty()) all.resize((all.size() + alignment - 1) / alignment * alignment);
    return all + data;
  }

  uint32_t version = 3;
  size_t alignment = 32;
  uint64_t more_tensors = 0, more_values = 0;  // than there are
  std::vector<std::string> values, table;
  std::string data;
};

}  // namespace bicache
