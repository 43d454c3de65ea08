// Mapped files: only regular ones, moves, truncation, no descriptor left behind.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <iterator>
#include <string>
#include <type_traits>

#include "base/check.h"
#include "files/mapped_file.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;

std::string text(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

int open_descriptors() {
  std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<int>(std::distance(begin(all), end(all)));
}

TEST(MappedFile, shows_the_bytes) {
  const TempFolder folder;
  const std::string bytes = test_bytes(10000);
  const MappedFile file(folder.write("f", bytes));
  EXPECT_EQ(text(file), bytes);
  EXPECT_EQ(file.path(), folder.at("f"));
  EXPECT_NO_THROW(file.check_size());
}

TEST(MappedFile, empty_file_is_an_empty_span) {
  const TempFolder folder;
  const MappedFile file(folder.write("empty", ""));
  EXPECT_TRUE(file.bytes().empty());
  EXPECT_NO_THROW(file.check_size());
}

TEST(MappedFile, follows_symbolic_links) {
  const TempFolder folder;
  folder.write("target", "abc");
  std::filesystem::create_symlink("target", folder.at("link"));
  EXPECT_EQ(text(MappedFile(folder.at("link"))), "abc");
}

TEST(MappedFile, missing_files_are_file_errors) {
  const TempFolder folder;
  std::filesystem::create_symlink("nowhere", folder.at("dangling"));
  folder.write("file", "");
  for (const auto& [name, code] :
       {std::pair{"none", ENOENT}, {"dangling", ENOENT}, {"file/below", ENOTDIR}}) {
    const std::string path = folder.at(name);
    try {
      const MappedFile file(path);
      ADD_FAILURE() << "expected an exception for " << path;
    } catch (const FileError& e) {
      EXPECT_EQ(e.code(), code);
      EXPECT_EQ(e.path(), path);
      EXPECT_TRUE(contains(e.what(), "[" + path + "] cannot open: "));
    }
  }
}

TEST(MappedFile, only_regular_files) {
  const TempFolder folder;
  ASSERT_EQ(::mkfifo(folder.at("fifo").c_str(), 0600), 0);
  const auto message = [](const std::string& path) {
    return error_of<std::invalid_argument>([&] { MappedFile file(path); });
  };
  EXPECT_TRUE(contains(message(folder.path()), "expected a regular file, got a folder"));
  // Nobody writes to it: must not wait.
  EXPECT_TRUE(contains(message(folder.at("fifo")), "expected a regular file, got a FIFO"));
  EXPECT_TRUE(contains(message("/dev/null"), "[/dev/null] expected a regular file, got a FIFO or"));
}

TEST(MappedFile, refuses_nul_in_a_path) {
  const TempFolder folder;
  folder.write("a", "secret");
  EXPECT_TRUE(contains(
      error_of<std::invalid_argument>([&] { MappedFile file(folder.at("a\0b"s)); }), "NUL"));
}

TEST(MappedFile, moved_from_is_an_empty_file) {
  const TempFolder folder;
  const int before = open_descriptors();
  {
    MappedFile from(folder.write("f", "abc"));
    const std::byte* data = from.bytes().data();
    const MappedFile to(std::move(from));
    EXPECT_EQ(to.bytes().data(), data);  // spans outlive a move
    EXPECT_EQ(text(to), "abc");
    EXPECT_TRUE(from.bytes().empty());  // NOLINT(bugprone-use-after-move)
    EXPECT_NO_THROW(from.check_size());
    EXPECT_NO_THROW(to.check_size());
  }
  EXPECT_EQ(open_descriptors(), before);
  static_assert(!std::is_copy_constructible_v<MappedFile>);
}

TEST(MappedFile, leaves_no_descriptor_open) {
  const TempFolder folder;
  folder.write("f", "abc");
  folder.write("empty", "");
  const int before = open_descriptors();
  for (int i = 0; i < 3; ++i) {
    MappedFile(folder.at("f"));
    MappedFile(folder.at("empty"));
    EXPECT_THROW(MappedFile(folder.path()), std::invalid_argument);
    EXPECT_THROW(MappedFile(folder.at("none")), FileError);
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(MappedFile, descriptor_is_not_inherited) {
  const TempFolder folder;
  const MappedFile file(folder.write("f", "abc"));
  bool found = false;
  for (int fd = 0; fd < 1024; ++fd) {
    std::error_code error;
    const auto target = std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd), error);
    if (error || target != std::filesystem::canonical(folder.at("f"))) continue;
    found = true;
    EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  }
  EXPECT_TRUE(found);
}

TEST(MappedFile, notices_truncation) {
  const TempFolder folder;
  const MappedFile file(folder.write("f", std::string(100, 'x')));
  ASSERT_EQ(::truncate(folder.at("f").c_str(), 101), 0);
  EXPECT_NO_THROW(file.check_size());
  ASSERT_EQ(::truncate(folder.at("f").c_str(), 99), 0);
  EXPECT_TRUE(contains(error_of<std::invalid_argument>([&] { file.check_size(); }),
                       "file size: expected 100 bytes, as when it was opened, got 99"));
}

}  // namespace
}  // namespace bicache
