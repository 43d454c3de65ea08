// A strict reader of the JSON that checkpoints use: RFC 8259, one document, UTF-8; duplicate keys,
// trailing text, nesting deeper than 64, lone surrogates, numbers that no double holds (1e999,
// 1e-999) and more than 2^22 values are errors. Not fast, not a writer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace bicache {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the file

  static constexpr int kMaxDepth = 64;
  // A value takes tens of times the memory of its text; no checkpoint has a tenth as many.
  static constexpr int64_t kMaxValues = int64_t{1} << 22;

  // std::invalid_argument "[source] JSON: ... at byte N".
  static Json parse(std::string_view text, const std::string& source);

  enum class Kind : uint8_t { null, boolean, integer, number, string, array, object };
  Kind kind() const { return static_cast<Kind>(value_.index()); }
  // With its article: "an integer".
  const char* kind_name() const;
  bool is_null() const { return kind() == Kind::null; }

  // The value, or std::invalid_argument "[where] what: expected an integer, got a string" (without
  // `what`: "[where] expected ..."). An integer is a JSON number written without fraction or
  // exponent that an int64_t holds (so not -0); number() takes all.
  bool boolean(std::string_view where, std::string_view what = {}) const;
  int64_t integer(std::string_view where, std::string_view what = {}) const;
  double number(std::string_view where, std::string_view what = {}) const;
  const std::string& string(std::string_view where, std::string_view what = {}) const;
  const Array& array(std::string_view where, std::string_view what = {}) const;
  const Object& object(std::string_view where, std::string_view what = {}) const;

  // Member of an object, or null where there is none (or where this is not an object).
  const Json* find(std::string_view key) const;

 private:
  friend class JsonParser;
  template <class T>
  const T& get(const char* expected, std::string_view where, std::string_view what) const;

  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value_ = nullptr;
};

bool is_utf8(std::string_view text);

// Text out of a file, fit for an error message: control characters and bytes that are not UTF-8
// escaped, and cut (at a UTF-8 boundary) after 80 bytes.
std::string printable(std::string_view text);
// The same in quotes.
std::string quote(std::string_view text);

}  // namespace bicache
