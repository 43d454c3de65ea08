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

void check_path(const std::string& path) {
  // c_str() would name another file.
  require(path.find('\0') == std::string::npos, "[", path.c_str(),
          "] path: expected no NUL character, got one");
}

void check_regular(const std::string& path, mode_t mode) {
  require(S_ISREG(mode), "[", path, "] expected a regular file, got ",
          S_ISDIR(mode) ? "a folder" : "a FIFO or a device");
}

int open_regular(const std::string& path, size_t* size) {
  check_path(path);
  // O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_file(errno, path, "open");
  try {
    struct stat info;
    if (::fstat(fd, &info) != 0) fail_file(errno, path, "stat");
    check_regular(path, info.st_mode);
    *size = static_cast<size_t>(info.st_size);
  } catch (...) {
    ::close(fd);
    throw;
  }
  return fd;
}

MappedFile::MappedFile(const std::string& path) : path_(path), fd_(open_regular(path, &size_)) {
  if (size_ == 0) return;  // mmap refuses length 0
  void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  if (p == MAP_FAILED) {
    const int code = errno;
    ::close(fd_);  // the destructor does not run
    fail_file(code, path_, "map");
  }
  data_ = static_cast<const std::byte*>(p);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (fd_ >= 0) ::close(fd_);
}

MappedFile::MappedFile(MappedFile&& o) noexcept
    : path_(std::move(o.path_)),
      size_(std::exchange(o.size_, 0)),
      fd_(std::exchange(o.fd_, -1)),
      data_(std::exchange(o.data_, nullptr)) {}

void MappedFile::check_size() const {
  if (fd_ < 0) return;
  struct stat info;
  if (::fstat(fd_, &info) != 0) fail_file(errno, path_, "stat");
  require(static_cast<size_t>(info.st_size) >= size_, "[", path_, "] file size: expected ", size_,
          " bytes, as when it was opened, got ", info.st_size);
}

}  // namespace bicache
