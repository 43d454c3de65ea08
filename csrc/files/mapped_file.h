// A regular file mapped read-only.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace bicache {

// FileError "[path] cannot DO: reason", of a system call that failed with errno `code`.
[[noreturn]] void fail_file(int code, const std::string& path, const char* what);

class MappedFile {
 public:
  // FileError if it cannot be opened; std::invalid_argument if it is not a regular file (folder,
  // FIFO, device). Symbolic links are followed: a Hugging Face cache is made of them.
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
  void map();

  std::string path_;
  int fd_ = -1;  // kept open for check_size
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace bicache
