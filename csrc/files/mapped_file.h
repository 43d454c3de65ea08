// A regular file mapped read-only.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>

namespace bicache {

// FileError "[path] cannot DO: reason", of a system call that failed with errno `code`.
[[noreturn]] void fail_file(int code, const std::string& path, const char* what);

// std::invalid_argument if the path holds a NUL character.
void check_path(const std::string& path);
// std::invalid_argument unless `mode` (stat's) is a regular file's.
void check_regular(const std::string& path, mode_t mode);
// Opens a regular file to read it; the descriptor is the caller's. FileError if it cannot be
// opened; std::invalid_argument if it is not a regular file (folder, FIFO, device).
int open_regular(const std::string& path, size_t* size);

class MappedFile {
 public:
  // Fails as open_regular does. Symbolic links are followed: a Hugging Face cache is made of them.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& o) noexcept;  // leaves `o` an empty file
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }
  // std::invalid_argument if the file has been truncated since it was mapped (touching its pages
  // would be a SIGBUS).
  void check_size() const;

 private:
  std::string path_;
  size_t size_ = 0;
  int fd_ = -1;  // kept open for check_size
  const std::byte* data_ = nullptr;
};

}  // namespace bicache
