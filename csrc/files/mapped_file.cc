#include "files/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "base/check.h"

namespace bicache {

void fail_file(int code, const std::string& path, const char* what) {
  throw FileError(code, path,
                  cat("[", path, "] cannot ", what, ": ", std::generic_category().message(code)));
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // c_str() would open another file than the one named.
  require(path.find('\0') == std::string::npos, "[", path.c_str(),
          "] path: expected no NUL character, got one");
  // O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) fail_file(errno, path_, "open");
  try {
    map();
  } catch (...) {
    ::close(fd_);  // the destructor does not run
    throw;
  }
}

void MappedFile::map() {
  struct stat info;
  if (::fstat(fd_, &info) != 0) fail_file(errno, path_, "stat");
  require(S_ISREG(info.st_mode), "[", path_, "] expected a regular file, got ",
          S_ISDIR(info.st_mode) ? "a folder" : "a FIFO or a device");
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) return;  // mmap refuses length 0
  void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  if (p == MAP_FAILED) fail_file(errno, path_, "map");
  data_ = static_cast<const std::byte*>(p);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (fd_ >= 0) ::close(fd_);
}

MappedFile::MappedFile(MappedFile&& o) noexcept
    : path_(std::move(o.path_)),
      fd_(std::exchange(o.fd_, -1)),
      data_(std::exchange(o.data_, nullptr)),
      size_(std::exchange(o.size_, 0)) {}

void MappedFile::check_size() const {
  if (fd_ < 0) return;
  struct stat info;
  if (::fstat(fd_, &info) != 0) fail_file(errno, path_, "stat");
  require(static_cast<size_t>(info.st_size) >= size_, "[", path_, "] file size: expected ", size_,
          " bytes, as when it was opened, got ", info.st_size);
}

}  // namespace bicache
