#include "files/json.h"

#include <algorithm>
#include <charconv>

#include "base/check.h"

namespace bicache {
namespace {

constexpr bool is_digit(int c) { return c >= '0' && c <= '9'; }

// Bytes of the well-formed UTF-8 sequence at the front of `s` (Unicode 15, table 3-7: no overlong
// forms, no surrogates, nothing above U+10FFFF), or 0.
size_t utf8_length(std::string_view s) {
  const auto at = [&](size_t i) { return i < s.size() ? static_cast<unsigned char>(s[i]) : 0u; };
  const unsigned lead = at(0);
  if (lead < 0x80) return 1;
  size_t length = 0;
  unsigned low = 0x80, high = 0xBF;  // of the second byte
  if (lead >= 0xC2 && lead <= 0xDF) length = 2;
  if (lead >= 0xE0 && lead <= 0xEF) length = 3;
  if (lead >= 0xF0 && lead <= 0xF4) length = 4;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  if (length == 0 || at(1) < low || at(1) > high) return 0;
  for (size_t i = 2; i < length; ++i) {
    if (at(i) < 0x80 || at(i) > 0xBF) return 0;
  }
  return length;
}

void append_utf8(uint32_t code, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
  } else {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

constexpr char kHex[] = "0123456789abcdef";

}  // namespace

// Recursive descent; the depth limit bounds the stack.
class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& source) : text_(text), source_(source) {}

  Json document() {
    Json value = this->value(0);
    skip_space();
    if (pos_ != text_.size()) fail_at(pos_, "expected the end of the text, got ", got());
    return value;
  }

 private:
  static constexpr int kEnd = -1;

  int peek() const { return pos_ < text_.size() ? static_cast<unsigned char>(text_[pos_]) : kEnd; }
  bool take(char c) {
    if (peek() != static_cast<unsigned char>(c)) return false;
    ++pos_;
    return true;
  }
  void skip_space() {
    while (take(' ') || take('\t') || take('\n') || take('\r')) {
    }
  }

  template <class... Parts>
  [[noreturn]] void fail_at(size_t pos, const Parts&... parts) const {
    fail("[", source_, "] JSON: ", parts..., " at byte ", pos);
  }

  // What stands at pos_, for messages.
  std::string got() const {
    const int c = peek();
    if (c == kEnd) return "the end of the text";
    if (c > ' ' && c < 0x7F) return std::string("'") + static_cast<char>(c) + "'";
    return std::string("byte 0x") + kHex[c >> 4] + kHex[c & 15];
  }

  Json value(int depth) {
    skip_space();
    if (++values_ > Json::kMaxValues) {
      fail_at(pos_, "expected at most ", Json::kMaxValues, " values, got more");
    }
    Json json;
    const int c = peek();
    if (c == '{') {
      json.value_ = object(depth + 1);
    } else if (c == '[') {
      json.value_ = array(depth + 1);
    } else if (c == '"') {
      json.value_ = string();
    } else if (c == '-' || is_digit(c)) {
      number(&json);
    } else if (literal("true")) {
      json.value_ = true;
    } else if (literal("false")) {
      json.value_ = false;
    } else if (!literal("null")) {
      fail_at(pos_, "expected a value, got ", got());
    }
    return json;
  }

  bool literal(std::string_view word) {
    if (!text_.substr(pos_).starts_with(word)) return false;
    pos_ += word.size();
    return true;
  }

  void enter(int depth) {
    if (depth > Json::kMaxDepth) {
      fail_at(pos_, "expected nesting of at most ", Json::kMaxDepth, " levels, got more");
    }
    ++pos_;
    skip_space();
  }

  Json::Array array(int depth) {
    enter(depth);
    Json::Array items;
    if (take(']')) return items;
    while (true) {
      items.push_back(value(depth));
      skip_space();
      if (take(']')) return items;
      if (!take(',')) fail_at(pos_, "expected ',' or ']', got ", got());
    }
  }

  Json::Object object(int depth) {
    enter(depth);
    Json::Object members;
    std::vector<size_t> starts;  // of the keys, in bytes
    if (take('}')) return members;
    while (true) {
      skip_space();
      if (peek() != '"') fail_at(pos_, "expected a key in quotes, got ", got());
      starts.push_back(pos_);
      std::string key = string();
      skip_space();
      if (!take(':')) fail_at(pos_, "expected ':', got ", got());
      members.emplace_back(std::move(key), value(depth));
      skip_space();
      if (take('}')) break;
      if (!take(',')) fail_at(pos_, "expected ',' or '}', got ", got());
    }
    check_unique(members, starts);
    return members;
  }

  // Sorted, not hashed: no choice of keys makes it slow.
  void check_unique(const Json::Object& members, const std::vector<size_t>& starts) const {
    std::vector<std::pair<std::string_view, size_t>> keys;
    for (size_t i = 0; i < members.size(); ++i) keys.emplace_back(members[i].first, starts[i]);
    std::sort(keys.begin(), keys.end());
    for (size_t i = 1; i < keys.size(); ++i) {
      if (keys[i].first == keys[i - 1].first) {
        fail_at(keys[i].second, "expected unique keys, got ", quote(keys[i].first), " again");
      }
    }
  }

  std::string string() {
    const size_t start = pos_++;
    std::string out;
    while (true) {
      const int c = peek();
      if (c == kEnd) fail_at(start, "expected a string that ends, got one that does not");
      if (take('"')) return out;
      if (c == '\\') {
        escape(&out);
        continue;
      }
      if (c < 0x20) fail_at(pos_, "expected control characters to be escaped, got ", got());
      const size_t length = utf8_length(text_.substr(pos_));
      if (length == 0) fail_at(pos_, "expected UTF-8, got ", got());
      out.append(text_, pos_, length);
      pos_ += length;
    }
  }

  void escape(std::string* out) {
    constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const size_t start = pos_++;
    const int c = peek();
    const size_t i = c == kEnd ? names.npos : names.find(static_cast<char>(c));
    if (i != names.npos) {
      out->push_back(meanings[i]);
      ++pos_;
      return;
    }
    if (!take('u')) fail_at(pos_, "expected one of \"\\/bfnrtu behind a backslash, got ", got());
    uint32_t code = hex4();
    if (code >= 0xD800 && code <= 0xDBFF && literal("\\u")) {
      const uint32_t low = hex4();
      const bool pair = low >= 0xDC00 && low <= 0xDFFF;
      if (pair) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code <= 0xDFFF) {
      fail_at(start, "expected surrogates in pairs, got a lone one");
    }
    append_utf8(code, out);
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const int c = peek();
      const int lower = c | 0x20;
      if (!is_digit(c) && (lower < 'a' || lower > 'f')) {
        fail_at(pos_, "expected 4 hexadecimal digits, got ", got());
      }
      code = code << 4 | static_cast<uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
      ++pos_;
    }
    return code;
  }

  void digits() {
    if (!is_digit(peek())) fail_at(pos_, "expected a digit, got ", got());
    while (is_digit(peek())) ++pos_;
  }

  void number(Json* json) {
    const size_t start = pos_;
    take('-');
    if (take('0')) {
      if (is_digit(peek())) fail_at(start, "expected no leading zeros, got some");
    } else {
      digits();
    }
    bool whole = true;
    if (take('.')) {
      whole = false;
      digits();
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      digits();
    }
    const std::string_view token = text_.substr(start, pos_ - start);
    const char *first = token.data(), *last = first + token.size();
    int64_t integer = 0;
    // -0 has no integer: only a double keeps its sign.
    if (whole && token != "-0" && std::from_chars(first, last, integer).ec == std::errc()) {
      json->value_ = integer;
      return;
    }
    double real = 0;
    if (std::from_chars(first, last, real).ec != std::errc()) {
      fail_at(start, "expected a number that a double holds, got ", quote(token));
    }
    json->value_ = real;
  }

  std::string_view text_;
  const std::string& source_;
  size_t pos_ = 0;
  int64_t values_ = 0;
};

Json Json::parse(std::string_view text, const std::string& source) {
  return JsonParser(text, source).document();
}

const char* Json::kind_name() const {
  switch (kind()) {
    case Kind::null:
      return "null";
    case Kind::boolean:
      return "a boolean";
    case Kind::integer:
      return "an integer";
    case Kind::number:
      return "a number";
    case Kind::string:
      return "a string";
    case Kind::array:
      return "an array";
    case Kind::object:
      break;
  }
  return "an object";
}

template <class T>
const T& Json::get(const char* expected, std::string_view where, std::string_view what) const {
  const T* value = std::get_if<T>(&value_);
  require(value != nullptr, "[", where, "] ", what, what.empty() ? "" : ": ", "expected ", expected,
          ", got ", kind_name());
  return *value;
}

bool Json::boolean(std::string_view where, std::string_view what) const {
  return get<bool>("a boolean", where, what);
}

int64_t Json::integer(std::string_view where, std::string_view what) const {
  return get<int64_t>("an integer", where, what);
}

double Json::number(std::string_view where, std::string_view what) const {
  if (const auto* integer = std::get_if<int64_t>(&value_)) return static_cast<double>(*integer);
  return get<double>("a number", where, what);
}

const std::string& Json::string(std::string_view where, std::string_view what) const {
  return get<std::string>("a string", where, what);
}

const Json::Array& Json::array(std::string_view where, std::string_view what) const {
  return get<Array>("an array", where, what);
}

const Json::Object& Json::object(std::string_view where, std::string_view what) const {
  return get<Object>("an object", where, what);
}

const Json* Json::find(std::string_view key) const {
  const Object* members = std::get_if<Object>(&value_);
  if (members == nullptr) return nullptr;
  for (const auto& [name, value] : *members) {
    if (name == key) return &value;
  }
  return nullptr;
}

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.substr(i));
    if (length == 0) return false;
    i += length;
  }
  return true;
}

std::string printable(std::string_view text) {
  constexpr size_t kMaxBytes = 80;
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t length = std::max<size_t>(utf8_length(text.substr(i)), 1);
    if (i + length > kMaxBytes) return out + "...";
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c < 0x20 || c == 0x7F || (c >= 0x80 && length == 1)) {
      out += std::string("\\x") + kHex[c >> 4] + kHex[c & 15];
    } else {
      out.append(text, i, length);
    }
    i += length;
  }
  return out;
}

std::string quote(std::string_view text) { return cat("\"", printable(text), "\""); }

}  // namespace bicache
