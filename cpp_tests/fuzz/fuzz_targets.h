// What the fuzzers run, shared by the libFuzzer entry points and test_fuzz_files.cc: hostile bytes
// may be refused with std::invalid_argument (or FileError), and nothing else; what is accepted
// must keep the reader's promises. Anything broken leaves as std::logic_error.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "../prefix_image.h"
#include "base/check.h"
#include "files/gguf.h"
#include "files/json.h"
#include "files/safetensors.h"

namespace bicache::fuzz {

// An own decoder, so that the reader's is not checked against itself.
inline bool is_utf8(std::string_view s) {
  for (size_t i = 0; i < s.size();) {
    const auto lead = static_cast<unsigned char>(s[i]);
    const int extra = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    if (lead >= 0x80 && (lead < 0xC0 || lead > 0xF7)) return false;
    uint32_t code = extra == 0 ? lead : lead & (0x3Fu >> extra);
    if (s.size() - i <= static_cast<size_t>(extra)) return false;
    for (int k = 1; k <= extra; ++k) {
      const auto next = static_cast<unsigned char>(s[i + static_cast<size_t>(k)]);
      if ((next & 0xC0) != 0x80) return false;
      code = code << 6 | (next & 0x3F);
    }
    constexpr uint32_t shortest[] = {0, 0x80, 0x800, 0x10000};
    if (code < shortest[extra] || code > 0x10FFFF) return false;
    if (code >= 0xD800 && code <= 0xDFFF) return false;
    i += static_cast<size_t>(extra) + 1;
  }
  return true;
}

inline void check_json(const Json& json, int depth) {
  if (json.kind() == Json::Kind::string) {
    internal_check(is_utf8(json.string("fuzz")), "a string is not UTF-8");
  } else if (json.kind() == Json::Kind::array) {
    internal_check(depth < Json::kMaxDepth, "nested too deeply");
    for (const Json& item : json.array("fuzz")) check_json(item, depth + 1);
  } else if (json.kind() == Json::Kind::object) {
    internal_check(depth < Json::kMaxDepth, "nested too deeply");
    for (const auto& [key, value] : json.object("fuzz")) {
      internal_check(is_utf8(key), "a key is not UTF-8");
      internal_check(json.find(key) == &value, "a key is not unique");
      check_json(value, depth + 1);
    }
  }
}

// Messages become Python strings.
inline bool refused(const std::exception& e) {
  internal_check(is_utf8(e.what()), "a message is not UTF-8");
  return false;
}

// Whether the bytes were accepted.
inline bool run_json(std::string_view bytes) {
  try {
    check_json(Json::parse(bytes, "fuzz"), 0);
    return true;
  } catch (const std::invalid_argument& e) {
    return refused(e);
  }
}

// A file without a name; it counts as a regular one.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view bytes) : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    internal_check(fd_ >= 0, "memfd_create failed");
    while (!bytes.empty()) {
      const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
      internal_check(n > 0, "write failed");
      bytes.remove_prefix(static_cast<size_t>(n));
    }
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

// Whether the bytes were accepted.
inline bool run_safetensors(std::string_view bytes) {
  const MemoryFile memory(bytes);
  try {
    const SafeTensors file(memory.path());
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) {
      header_bytes = header_bytes << 8 | static_cast<unsigned char>(bytes[static_cast<size_t>(i)]);
    }
    const char* begin = nullptr;
    size_t covered = 0;
    for (const auto& [name, t] : file.tensors()) {
      internal_check(is_utf8(name), "a name is not UTF-8");
      const auto data = file.data(t);
      const std::string_view seen(reinterpret_cast<const char*>(data.data()), data.size());
      // Read every byte, and find it where the file has it.
      const size_t at = 8 + header_bytes + static_cast<size_t>(t.begin);
      internal_check(seen == bytes.substr(at, data.size()), "a tensor has other bytes");
      if (begin == nullptr) begin = seen.data() - t.begin;
      internal_check(seen.data() - t.begin == begin, "tensors have different origins");
      covered += data.size();
    }
    internal_check(8 + header_bytes + covered == bytes.size(), "the data is not covered");
    file.check_size();
    return true;
  } catch (const std::invalid_argument& e) {
    return refused(e);
  } catch (const FileError& e) {
    return refused(e);
  }
}

// Whether the bytes were accepted.
inline bool run_gguf(std::string_view bytes) {
  const MemoryFile memory(bytes);
  try {
    const Gguf file(memory.path());
    for (const auto& [key, value] : file.metadata()) {
      internal_check(is_utf8(key), "a key is not UTF-8");
      const auto elements = value.elements();
      internal_check(static_cast<int64_t>(elements.size()) == value.count(),
                     "elements are missing");
      for (const GgufValue::Element& e : elements) {
        const auto* text = std::get_if<std::string_view>(&e);
        internal_check(text == nullptr || is_utf8(*text), "a value is not UTF-8");
      }
    }
    size_t end = 0;  // of the data that was seen
    for (const auto& [name, t] : file.tensors()) {
      internal_check(is_utf8(name), "a name is not UTF-8");
      const auto data = file.data(t);
      int64_t count = 1;
      for (const int64_t n : t.shape) count *= n;
      internal_check(
          static_cast<int64_t>(data.size()) * t.format->block == count * t.format->block_bytes,
          "a tensor has other bytes than its shape needs");
      const std::string_view seen(reinterpret_cast<const char*>(data.data()), data.size());
      internal_check(bytes.find(seen) != std::string_view::npos, "a tensor is not in the file");
      end = std::max(end, static_cast<size_t>(t.begin) + data.size());
    }
    internal_check(end <= bytes.size(), "tensors are longer than the file");
    file.check_size();
    return true;
  } catch (const std::invalid_argument& e) {
    return refused(e);
  }
}

// Of the prefix files that are tried.
inline StoreShape prefix_shape() { return {4, 2, 3, {DType::bf16, DType::f32}, "fuzz"}; }

// Whether the bytes were accepted.
inline bool run_prefixes(std::string_view bytes) {
  const MemoryFile memory(bytes);
  PrefixStore store(int64_t{1} << 40);
  try {
    const Restored restored = restore_prefixes(store, prefix_shape(), memory.path());
    internal_check(restored.kept == restored.entries, "an entry is not kept");
    // One file for one content.
    internal_check(PrefixImage(prefix_shape(), store.items()).bytes() == bytes,
                   "the store has other content");
    return true;
  } catch (const std::invalid_argument& e) {
    internal_check(store.stats().entries == 0, "a refused file left entries");
    return refused(e);
  }
}

}  // namespace bicache::fuzz
