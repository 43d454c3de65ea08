#include "files/atomic_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "base/check.h"
#include "files/mapped_file.h"

namespace bicache {
namespace {

constexpr size_t kBufferBytes = 1 << 16;

// 0, or the errno of fsync.
int sync_code(int fd) {
  while (::fsync(fd) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  check_path(path);
  const size_t name = path.rfind('/') + 1;  // 0 if there is none
  require(name < path.size(), "[", path, "] path: expected one that ends in a file's name, got \"",
          path, "\"");
  const std::string folder = name == 0 ? "." : path.substr(0, name);
  std::string temporary = path.substr(0, name) + "." + path.substr(name) + ".tmp-XXXXXX";

  folder_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_ < 0) fail_file(errno, path, "open its folder");
  try {
    struct stat info;
    if (::stat(path.c_str(), &info) == 0) {
      check_regular(path, info.st_mode);  // rename would replace a device as well
    } else if (errno != ENOENT) {
      fail_file(errno, path, "stat");
    }
    buffer_.reserve(kBufferBytes);
    fd_ = ::mkostemp(temporary.data(), O_CLOEXEC);
    if (fd_ < 0) fail_file(errno, path, "make a temporary file beside it");
    temporary_ = std::move(temporary);
  } catch (...) {
    ::close(folder_);  // the destructor does not run
    throw;
  }
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  ::close(fd_);
  ::close(folder_);
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (bytes.size() > kBufferBytes - buffer_.size()) flush();
  if (bytes.size() > kBufferBytes) {
    write_through(bytes);
  } else {
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
}

void AtomicFile::flush() {
  write_through(buffer_);
  buffer_.clear();
}

void AtomicFile::write_through(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(n));
    } else if (errno != EINTR) {
      fail_file(errno, path_, "write");
    }
  }
}

void AtomicFile::commit() {
  internal_check(!temporary_.empty(), "[", path_, "] commit: expected once, got a second call");
  flush();
  // Without this a power cut could leave the name with a file whose bytes never arrived.
  if (const int code = sync_code(fd_); code != 0) fail_file(code, path_, "sync");
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail_file(errno, path_, "rename to");
  temporary_.clear();
  // EINVAL: a file system that does not sync folders.
  const int code = sync_code(folder_);
  if (code != 0 && code != EINVAL) fail_file(code, path_, "sync its folder");
}

}  // namespace bicache
