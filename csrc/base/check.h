// Errors: every one reads "[where] what: expected X, got Y". Nothing in the library prints or
// aborts.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace bicache {

// A system call on a file failed; `code` is its errno. Becomes OSError (FileNotFoundError, ...) in
// Python.
class FileError : public std::runtime_error {
 public:
  FileError(int code, std::string path, const std::string& what)
      : std::runtime_error(what), code_(code), path_(std::move(path)) {}
  int code() const { return code_; }
  const std::string& path() const { return path_; }

 private:
  int code_;
  std::string path_;
};

// The parts, one after the other, as one string.
template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Bad input (an argument, a file's content): ValueError in Python.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument(cat(parts...));
}

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail(parts...);
}

// A mistake of ours, never of the caller's: RuntimeError in Python.
template <class... Parts>
void internal_check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    throw std::logic_error(cat(parts...));
}

// The one place where sizes are multiplied: a * b, or an error that names `where`. Both must be >=
// 0.
inline int64_t checked_mul(int64_t a, int64_t b, const char* where) {
  int64_t product = 0;
  require(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), "[", where,
          "] size overflow: ", a, " * ", b, " does not fit 63 bits");
  return product;
}

inline int64_t checked_add(int64_t a, int64_t b, const char* where) {
  int64_t sum = 0;
  require(a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, &sum), "[", where,
          "] size overflow: ", a, " + ", b, " does not fit 63 bits");
  return sum;
}

}  // namespace bicache
