#include "files/safetensors.h"

#include <algorithm>
#include <string_view>

#include "base/check.h"
#include "files/json.h"

namespace bicache {
namespace {

struct StoredType {
  std::string_view name;
  int64_t bits;
};

// All types of the format, so that a file is checked in full even where we compute with a few only.
constexpr StoredType kTypes[] = {
    {"BOOL", 8}, {"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},     {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"I16", 16}, {"U16", 16},    {"F8_E5M2FNUZ", 8}, {"F16", 16},    {"BF16", 16},
    {"I32", 32}, {"U32", 32},    {"F32", 32},        {"C64", 64},    {"F64", 64},
    {"I64", 64}, {"U64", 64},
};

constexpr size_t kLengthBytes = 8;

// Bytes of the header, checked against the file.
size_t header_size(std::span<const std::byte> file, const std::string& path) {
  require(file.size() >= kLengthBytes, "[", path, "] header length: expected ", kLengthBytes,
          " bytes, got a file of ", file.size());
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  require(length > 0, "[", path, "] header length: expected more than 0 bytes, got 0");
  require(length <= uint64_t{SafeTensors::kMaxHeaderBytes}, "[", path,
          "] header length: expected at most ", SafeTensors::kMaxHeaderBytes, " bytes, got ",
          length);
  require(length <= file.size() - kLengthBytes, "[", path, "] header length: expected at most the ",
          file.size() - kLengthBytes, " bytes that the file has behind it, got ", length);
  return static_cast<size_t>(length);
}

std::map<std::string, std::string> parse_metadata(const Json& json, const std::string& path) {
  std::map<std::string, std::string> metadata;
  for (const auto& [key, value] : json.object(path, "__metadata__")) {
    metadata.emplace(key, value.string(path, "__metadata__ " + printable(key)));
  }
  return metadata;
}

// The bytes that `t` needs.
int64_t expected_bytes(const TensorInfo& t, const std::string& path, const std::string& what) {
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const StoredType& known) { return known.name == t.dtype; });
  require(type != std::end(kTypes), "[", path, "] ", what,
          " dtype: expected a type of the format (F32, BF16, F16, I64, ...), got ", quote(t.dtype));
  const std::string where = path + ": " + what + " shape";
  int64_t bits = type->bits;
  for (int64_t size : t.shape) bits = checked_mul(bits, size, where.c_str());
  require(bits % 8 == 0, "[", path, "] ", what, " shape: expected whole bytes of ", t.dtype,
          ", got ", shape_text(t.shape));
  return bits / 8;
}

TensorInfo parse_tensor(const std::string& name, const Json& json, int64_t data_bytes,
                        const std::string& path) {
  const std::string what = "tensor " + printable(name);
  TensorInfo t;
  for (const auto& [key, value] : json.object(path, what)) {
    require(key == "dtype" || key == "shape" || key == "data_offsets", "[", path, "] ", what,
            ": expected the fields dtype, shape and data_offsets, got ", quote(key));
  }
  const auto field = [&](const char* key) -> const Json& {
    const Json* value = json.find(key);
    require(value != nullptr, "[", path, "] ", what, ": expected the field ", key, ", got none");
    return *value;
  };
  const auto size = [&](const Json& value, const std::string& of) {
    const int64_t n = value.integer(path, of);
    require(n >= 0, "[", path, "] ", of, ": expected 0 or more, got ", n);
    return n;
  };
  t.dtype = field("dtype").string(path, what + " dtype");
  for (const Json& n : field("shape").array(path, what + " shape")) {
    t.shape.push_back(size(n, what + " shape"));
  }
  const std::string at = what + " data_offsets";
  const Json::Array& offsets = field("data_offsets").array(path, at);
  require(offsets.size() == 2, "[", path, "] ", at, ": expected 2 numbers, got ", offsets.size());
  t.begin = size(offsets[0], at);
  t.end = size(offsets[1], at);
  require(t.begin <= t.end, "[", path, "] ", at, ": expected begin <= end, got ", t.begin, " > ",
          t.end);
  const int64_t bytes = expected_bytes(t, path, what);
  require(t.end - t.begin == bytes, "[", path, "] ", at, ": expected ", bytes, " bytes for ",
          t.dtype, " ", shape_text(t.shape), ", got ", t.end - t.begin);
  require(t.end <= data_bytes, "[", path, "] ", at, ": expected an end within the ", data_bytes,
          " bytes of data (is the file truncated?), got ", t.end);
  return t;
}

// Every byte of the data section belongs to exactly one tensor. A tensor without elements may stand
// at any boundary between two others, which is where sorting by (begin, end) puts it.
void check_cover(const std::map<std::string, TensorInfo>& tensors, int64_t data_bytes,
                 const std::string& path) {
  std::vector<const std::pair<const std::string, TensorInfo>*> order;
  for (const auto& item : tensors) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  int64_t covered = 0;
  for (const auto* item : order) {
    const auto& [name, t] = *item;
    require(t.begin == covered, "[", path, "] tensor ", printable(name),
            " data_offsets: expected begin ", covered, ", where the tensor before it ends, got ",
            t.begin, t.begin < covered ? " (an overlap)" : " (a gap)");
    covered = t.end;
  }
  require(covered == data_bytes, "[", path, "] data: expected ", covered,
          " bytes, where the last tensor ends, got ", data_bytes, " (trailing bytes)");
}

}  // namespace

SafeTensors::SafeTensors(const std::string& path) : file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  const size_t header_bytes = header_size(bytes, path);
  data_begin_ = kLengthBytes + header_bytes;
  const int64_t data_bytes = static_cast<int64_t>(bytes.size() - data_begin_);

  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                              header_bytes);
  require(text[0] == '{', "[", path, "] header: expected '{' as its first byte, got ",
          quote(text.substr(0, 1)));
  const Json header = Json::parse(text, path + " header");
  for (const auto& [name, value] : header.object(path, "header")) {
    if (name == "__metadata__") {
      metadata_ = parse_metadata(value, path);
    } else {
      tensors_.emplace(name, parse_tensor(name, value, data_bytes, path));
    }
  }
  check_cover(tensors_, data_bytes, path);
}

std::span<const std::byte> SafeTensors::data(const TensorInfo& t) const {
  const std::span<const std::byte> all = file_.bytes().subspan(data_begin_);
  internal_check(0 <= t.begin && t.begin <= t.end && static_cast<size_t>(t.end) <= all.size(), "[",
                 path(), "] data: expected one of the file's own tensors");
  return all.subspan(static_cast<size_t>(t.begin), static_cast<size_t>(t.end - t.begin));
}

std::string shape_text(std::span<const int64_t> shape) {
  constexpr size_t kMaxDims = 8;
  std::string out = "[";
  for (size_t i = 0; i < shape.size() && i < kMaxDims; ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + (shape.size() > kMaxDims ? ", ...]" : "]");
}

}  // namespace bicache
