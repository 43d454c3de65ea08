// AtomicFile: a file that appears at its path whole or not at all.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace bicache {

// The bytes go to a temporary file in the same folder, ".NAME.tmp-XXXXXX", which only its owner may
// read (mode 0600) and which commit() puts in place of `path`. Who dies in between leaves `path` as
// it was and a temporary file that nobody reads: it may be removed. System calls that fail are
// FileErrors with `path`.
class AtomicFile {
 public:
  // std::invalid_argument if there is something else than a regular file at `path`. A symbolic link
  // is replaced, not followed.
  explicit AtomicFile(const std::string& path);
  // Without commit(): removes the temporary file.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends all of `bytes`.
  void write(std::span<const std::byte> bytes);
  // Once, last: the bytes reach the disk, then the name. If it fails after the rename, the new file
  // is in place but might not survive a power cut.
  void commit();

 private:
  void flush();
  void write_through(std::span<const std::byte> bytes);

  std::string path_, temporary_;  // temporary_ is empty once it is renamed
  int folder_ = -1, fd_ = -1;
  std::vector<std::byte> buffer_;  // small writes, until they are kBufferBytes
};

}  // namespace bicache
