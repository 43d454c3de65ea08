#include "files/gguf.h"

#include <bit>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "files/ggml_types.h"
#include "files/json.h"
#include "files/safetensors.h"

namespace bicache {
namespace {

constexpr uint32_t kTypes = 13;
constexpr const char* kTypeNames[kTypes] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                            "int32",  "float32", "bool",   "string", "array",
                                            "uint64", "int64",   "float64"};
constexpr size_t kTypeBytes[kTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: varies

template <class T>
T load(const std::byte* at) {
  static_assert(std::endian::native == std::endian::little);
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

constexpr size_t kLengthBytes = 8;

std::string_view text_at(const std::byte* at) {
  return {reinterpret_cast<const char*>(at + kLengthBytes),
          static_cast<size_t>(load<uint64_t>(at))};
}

GgufValue::Element decode(GgufValue::Type type, const std::byte* at) {
  switch (type) {
    case GgufValue::kUint8:
      return int64_t{load<uint8_t>(at)};
    case GgufValue::kInt8:
      return int64_t{load<int8_t>(at)};
    case GgufValue::kUint16:
      return int64_t{load<uint16_t>(at)};
    case GgufValue::kInt16:
      return int64_t{load<int16_t>(at)};
    case GgufValue::kUint32:
      return int64_t{load<uint32_t>(at)};
    case GgufValue::kInt32:
      return int64_t{load<int32_t>(at)};
    case GgufValue::kFloat32:
      return double{load<float>(at)};
    case GgufValue::kBoolean:
      return load<uint8_t>(at) != 0;
    case GgufValue::kUint64: {
      const uint64_t value = load<uint64_t>(at);
      if (value > uint64_t{std::numeric_limits<int64_t>::max()}) return value;
      return static_cast<int64_t>(value);
    }
    case GgufValue::kInt64:
      return load<int64_t>(at);
    case GgufValue::kFloat64:
      return load<double>(at);
    case GgufValue::kString:
      return text_at(at);
    case GgufValue::kArray:
      break;
  }
  throw std::logic_error("[gguf] value: expected a type that is not an array");
}

uint64_t round_up(uint64_t x, uint64_t alignment) { return (x + alignment - 1) & ~(alignment - 1); }

}  // namespace

// Walks through a file from its first byte to the end of the tensor table.
class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, const std::string& path)
      : bytes_(bytes), path_(path) {}

  void header() {
    const std::span<const std::byte> magic = take(4, "magic");
    require(std::memcmp(magic.data(), "GGUF", 4) == 0, "[gguf] ", path_,
            ": magic: expected \"GGUF\", got ",
            quote({reinterpret_cast<const char*>(magic.data()), 4}));
    const uint32_t version = number<uint32_t>("version");
    require((version & 0xffff) != 0 || version == 0, "[gguf] ", path_,
            ": byte order: expected little endian, got big endian; llama.cpp's "
            "gguf_convert_endian.py converts it");
    require(version == 2 || version == 3, "[gguf] ", path_, ": version: expected 2 or 3, got ",
            version, version == 1 ? " (its counts have 32 bits): convert the model again" : "");
    // A tensor takes at least 33 bytes of the table, a key-value 14.
    tensors_ = count(33, "number of tensors");
    values_ = count(14, "number of key-values");
  }

  std::map<std::string, GgufValue, std::less<>> metadata() {
    std::map<std::string, GgufValue, std::less<>> values;
    for (uint64_t i = 0; i < values_; ++i) {
      const std::string_view key = text(cat("key ", i));
      check_name(key, kMostKeyBytes, cat("key ", i));
      const auto [at, is_new] = values.emplace(key, value(cat("value of ", printable(key))));
      require(is_new, "[gguf] ", path_, ": key ", printable(key), ": expected once, got it again");
    }
    return values;
  }

  std::map<std::string, GgufTensor> tensors(uint64_t alignment) {
    std::map<std::string, GgufTensor> tensors;
    std::vector<std::pair<const std::string*, const GgufTensor*>> order;
    for (uint64_t i = 0; i < tensors_; ++i) {
      const std::string_view name = text(cat("name of tensor ", i));
      check_name(name, kMostNameBytes, cat("name of tensor ", i));
      const auto [at, is_new] = tensors.emplace(name, tensor("tensor " + printable(name)));
      require(is_new, "[gguf] ", path_, ": tensor ", printable(name),
              ": expected once, got it again");
      order.emplace_back(&at->first, &at->second);
    }
    check_places(order, alignment);
    return tensors;
  }

  size_t data_begin() const { return data_begin_; }

 private:
  static constexpr size_t kMostKeyBytes = 65535, kMostNameBytes = 64;

  uint64_t left() const { return bytes_.size() - at_; }

  std::span<const std::byte> take(uint64_t size, std::string_view what) {
    require(size <= left(), "[gguf] ", path_, ": ", what, ": expected ", size, " bytes, got ",
            left(), " before the end of the file");
    const auto taken = bytes_.subspan(at_, static_cast<size_t>(size));
    at_ += static_cast<size_t>(size);
    return taken;
  }

  template <class T>
  T number(std::string_view what) {
    return load<T>(take(sizeof(T), what).data());
  }

  // Of things that take at least `least_bytes` each.
  uint64_t count(uint64_t least_bytes, std::string_view what) {
    const uint64_t n = number<uint64_t>(what);
    require(n <= left() / least_bytes, "[gguf] ", path_, ": ", what, ": expected at most ",
            left() / least_bytes, ", which the ", left(), " bytes behind it can hold, got ", n);
    return n;
  }

  std::string_view text(std::string_view what) {
    const size_t from = at_;
    const uint64_t length = number<uint64_t>(what);
    require(length <= left(), "[gguf] ", path_, ": ", what, ": expected text of at most the ",
            left(), " bytes that the file has behind it, got ", length);
    take(length, what);
    const std::string_view s = text_at(bytes_.data() + from);
    if (!is_utf8(s)) fail("[gguf] ", path_, ": ", what, ": expected UTF-8, got ", quote(s));
    return s;
  }

  void check_name(std::string_view name, size_t most_bytes, const std::string& what) {
    require(!name.empty() && name.size() <= most_bytes, "[gguf] ", path_, ": ", what,
            ": expected 1..", most_bytes, " bytes, got ", name.size());
    require(name.find('\0') == std::string_view::npos, "[gguf] ", path_, ": ", what,
            ": expected no NUL character, got ", quote(name));
  }

  GgufValue::Type value_type(const std::string& what) {
    const uint32_t type = number<uint32_t>(what + ", type");
    require(type < kTypes, "[gguf] ", path_, ": ", what, ": expected a type of 0..", kTypes - 1,
            ", got ", type);
    return static_cast<GgufValue::Type>(type);
  }

  GgufValue value(const std::string& what) {
    GgufValue v;
    v.type_ = value_type(what);
    if (v.type_ == GgufValue::kArray) {
      v.is_array_ = true;
      v.type_ = value_type(what + ", elements");
      require(v.type_ != GgufValue::kArray, "[gguf] ", path_, ": ", what,
              ": expected an array of plain values, got one of arrays");
      const size_t least = v.type_ == GgufValue::kString ? kLengthBytes : kTypeBytes[v.type_];
      v.count_ = static_cast<int64_t>(count(least, what + ", number of elements"));
    }
    const size_t from = at_;
    if (v.type_ == GgufValue::kString) {
      for (int64_t i = 0; i < v.count_; ++i) text(what);
    } else {
      take(static_cast<uint64_t>(v.count_) * kTypeBytes[v.type_], what);
    }
    v.bytes_ = bytes_.subspan(from, at_ - from);
    if (v.type_ == GgufValue::kBoolean) {
      for (const std::byte b : v.bytes_) {
        require(b <= std::byte{1}, "[gguf] ", path_, ": ", what,
                ": expected 0 or 1 for a boolean, got ", std::to_integer<int>(b));
      }
    }
    return v;
  }

  GgufTensor tensor(const std::string& what) {
    GgufTensor t;
    const uint32_t dims = number<uint32_t>(what + ", number of dimensions");
    require(1 <= dims && dims <= 4, "[gguf] ", path_, ": ", what,
            ": expected 1..4 dimensions, got ", dims);
    for (uint32_t i = 0; i < dims; ++i) {
      const uint64_t size = number<uint64_t>(what + ", shape");
      require(1 <= size && size <= uint64_t{1} << 62, "[gguf] ", path_, ": ", what,
              ", shape: expected positive sizes, got ", size);
      t.shape.insert(t.shape.begin(), static_cast<int64_t>(size));
    }
    const uint32_t type = number<uint32_t>(what + ", type");
    t.format = ggml_format(type);
    require(t.format != nullptr, "[gguf] ", path_, ": ", what,
            ", type: expected one of the format's, got ", type);
    require(t.shape.back() % t.format->block == 0, "[gguf] ", path_, ": ", what,
            ", shape: expected rows of a multiple of ", t.format->block, " numbers for ",
            t.format->name, ", got ", t.shape.back());
    bool fits =
        !__builtin_mul_overflow(t.shape.back() / t.format->block, t.format->block_bytes, &t.size);
    for (size_t i = 0; i + 1 < t.shape.size(); ++i)
      fits = fits && !__builtin_mul_overflow(t.size, t.shape[i], &t.size);
    require(fits, "[gguf] ", path_, ": ", what, ", shape: expected bytes that 63 bits count, got ",
            shape_text(t.shape), " of ", t.format->name);
    const uint64_t begin = number<uint64_t>(what + ", offset");
    require(begin <= uint64_t{1} << 62, "[gguf] ", path_, ": ", what,
            ", offset: expected one within the file, got ", begin);
    t.begin = static_cast<int64_t>(begin);
    return t;
  }

  // In the order of the table, each tensor begins at the next aligned place behind the one before,
  // and nothing but padding follows the last.
  void check_places(const std::vector<std::pair<const std::string*, const GgufTensor*>>& order,
                    uint64_t alignment) {
    const uint64_t begin = order.empty() ? at_ : round_up(at_, alignment);
    require(begin <= bytes_.size(), "[gguf] ", path_, ": data: expected it at byte ", begin,
            ", got a file of ", bytes_.size());
    data_begin_ = static_cast<size_t>(begin);
    const uint64_t size = bytes_.size() - data_begin_;
    uint64_t next = 0, end = 0;
    for (const auto& [name, t] : order) {
      const auto at = static_cast<uint64_t>(t->begin);
      require(at % alignment == 0, "[gguf] ", path_, ": tensor ", printable(*name),
              ", offset: expected a multiple of the alignment ", alignment, ", got ", at);
      require(at == next, "[gguf] ", path_, ": tensor ", printable(*name), ", offset: expected ",
              next, ", where the tensor before it ends, got ", at,
              at < next ? " (an overlap)" : " (a gap)");
      require(static_cast<uint64_t>(t->size) <= size && at <= size - static_cast<uint64_t>(t->size),
              "[gguf] ", path_, ": tensor ", printable(*name), ": expected its ", t->size,
              " bytes at ", at, " within the ", size, " bytes of data (is the file truncated?)");
      end = at + static_cast<uint64_t>(t->size);
      next = round_up(end, alignment);
    }
    require(size - end < alignment || size == end, "[gguf] ", path_, ": data: expected ", end,
            " bytes, where the last tensor ends, and padding, got ", size, " (trailing bytes)");
  }

  std::span<const std::byte> bytes_;
  const std::string& path_;
  size_t at_ = 0, data_begin_ = 0;
  uint64_t tensors_ = 0, values_ = 0;
};

std::string GgufValue::type_name() const {
  return cat(is_array_ ? "array of " : "", kTypeNames[type_]);
}

std::vector<GgufValue::Element> GgufValue::elements() const {
  std::vector<Element> all;
  all.reserve(static_cast<size_t>(count_));
  const std::byte* at = bytes_.data();
  for (int64_t i = 0; i < count_; ++i) {
    all.push_back(decode(type_, at));
    at += type_ == kString ? kLengthBytes + std::get<std::string_view>(all.back()).size()
                           : kTypeBytes[type_];
  }
  return all;
}

GgufValue::Element GgufValue::scalar(std::string_view where, std::string_view what,
                                     const char* expected) const {
  require(!is_array_, "[", where, "] ", what, ": expected ", expected, ", got an ", type_name());
  return decode(type_, bytes_.data());
}

bool GgufValue::boolean(std::string_view where, std::string_view what) const {
  const Element e = scalar(where, what, "a boolean");
  require(std::holds_alternative<bool>(e), "[", where, "] ", what, ": expected a boolean, got ",
          type_name());
  return std::get<bool>(e);
}

int64_t GgufValue::integer(std::string_view where, std::string_view what) const {
  const Element e = scalar(where, what, "an integer");
  require(!std::holds_alternative<uint64_t>(e), "[", where, "] ", what,
          ": expected an integer that 63 bits hold, got a larger one");
  require(std::holds_alternative<int64_t>(e), "[", where, "] ", what, ": expected an integer, got ",
          type_name());
  return std::get<int64_t>(e);
}

double GgufValue::number(std::string_view where, std::string_view what) const {
  const Element e = scalar(where, what, "a number");
  if (const auto* value = std::get_if<int64_t>(&e)) return static_cast<double>(*value);
  if (const auto* value = std::get_if<uint64_t>(&e)) return static_cast<double>(*value);
  require(std::holds_alternative<double>(e), "[", where, "] ", what, ": expected a number, got ",
          type_name());
  return std::get<double>(e);
}

std::string GgufValue::string(std::string_view where, std::string_view what) const {
  const Element e = scalar(where, what, "text");
  require(std::holds_alternative<std::string_view>(e), "[", where, "] ", what,
          ": expected text, got ", type_name());
  return std::string(std::get<std::string_view>(e));
}

Gguf::Gguf(const std::string& path) : file_(path) {
  GgufParser parser(file_.bytes(), path);
  parser.header();
  metadata_ = parser.metadata();
  uint64_t alignment = 32;
  if (const auto it = metadata_.find("general.alignment"); it != metadata_.end()) {
    require(it->second.type() == GgufValue::kUint32 && !it->second.is_array(), "[gguf] ", path,
            ": general.alignment: expected uint32, got ", it->second.type_name());
    alignment = static_cast<uint64_t>(it->second.integer("gguf", "general.alignment"));
    require(std::has_single_bit(alignment), "[gguf] ", path,
            ": general.alignment: expected a power of two, got ", alignment);
  }
  tensors_ = parser.tensors(alignment);
  data_begin_ = parser.data_begin();
}

std::span<const std::byte> Gguf::data(const GgufTensor& t) const {
  const std::span<const std::byte> all = file_.bytes().subspan(data_begin_);
  internal_check(0 <= t.begin && t.begin <= static_cast<int64_t>(all.size()) &&
                     t.size <= static_cast<int64_t>(all.size()) - t.begin,
                 "[gguf] ", path(), ": data: expected one of the file's own tensors");
  return all.subspan(static_cast<size_t>(t.begin), static_cast<size_t>(t.size));
}

}  // namespace bicache
