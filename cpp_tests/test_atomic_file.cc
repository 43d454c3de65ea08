// Atomic files: whole or not at all, whatever goes wrong and whoever dies.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <iterator>
#include <string>

#include "base/check.h"
#include "files/atomic_file.h"
#include "temp_files.h"

namespace bicache {
namespace {

using namespace std::string_literals;

std::span<const std::byte> bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

void put(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(bytes(text));
  file.commit();
}

int files_in(const std::string& folder) {
  std::filesystem::directory_iterator all(folder);
  return static_cast<int>(std::distance(begin(all), end(all)));
}

TEST(AtomicFile, holds_all_writes_in_order) {
  const TempFolder folder;
  const std::string text = test_bytes(1'000'000);
  // Around the size of the buffer, and the rest at once.
  for (const size_t step : {1u, 1000u, 65535u, 65536u, 65537u, 1'000'000u}) {
    AtomicFile file(folder.at("f"));
    size_t at = 0;
    for (int i = 0; i < 70 && at < text.size(); ++i, at += step)
      file.write(bytes(text.substr(at, step)));
    if (at < text.size()) file.write(bytes(text.substr(at)));
    file.write({});
    file.commit();
    EXPECT_EQ(read_file(folder.at("f")), text) << step;
  }
  EXPECT_EQ(files_in(folder.path()), 1);
}

TEST(AtomicFile, appears_when_it_is_committed) {
  const TempFolder folder;
  folder.write("f", "old");
  {
    AtomicFile file(folder.at("f"));
    file.write(bytes(test_bytes(100'000)));
    EXPECT_EQ(read_file(folder.at("f")), "old");
    EXPECT_EQ(files_in(folder.path()), 2);
  }
  EXPECT_EQ(read_file(folder.at("f")), "old");
  EXPECT_EQ(files_in(folder.path()), 1);
  put(folder.at("f"), "new");
  EXPECT_EQ(read_file(folder.at("f")), "new");
  AtomicFile file(folder.at("f"));
  file.commit();
  EXPECT_EQ(read_file(folder.at("f")), "");
  EXPECT_THROW(file.commit(), std::logic_error);
}

TEST(AtomicFile, two_at_once_do_not_mix) {
  const TempFolder folder;
  AtomicFile a(folder.at("f")), b(folder.at("f"));
  a.write(bytes("aaa"));
  b.write(bytes("b"));
  a.commit();
  EXPECT_EQ(read_file(folder.at("f")), "aaa");
  b.commit();
  EXPECT_EQ(read_file(folder.at("f")), "b");
}

TEST(AtomicFile, is_for_its_owner_only) {
  const TempFolder folder;
  folder.write("f", "old");
  ASSERT_EQ(::chmod(folder.at("f").c_str(), 0666), 0);
  put(folder.at("f"), "new");
  struct stat info;
  ASSERT_EQ(::stat(folder.at("f").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(AtomicFile, takes_names_without_a_folder) {
  const TempFolder folder;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  EXPECT_NO_THROW(put("f", "x"));
  std::filesystem::current_path(before);
  EXPECT_EQ(read_file(folder.at("f")), "x");
}

TEST(AtomicFile, replaces_a_symbolic_link) {
  const TempFolder folder;
  folder.write("target", "old");
  std::filesystem::create_symlink("target", folder.at("link"));
  std::filesystem::create_symlink("nowhere", folder.at("dangling"));
  put(folder.at("link"), "new");
  put(folder.at("dangling"), "new");
  EXPECT_EQ(read_file(folder.at("link")), "new");
  EXPECT_EQ(read_file(folder.at("dangling")), "new");
  EXPECT_EQ(read_file(folder.at("target")), "old");
}

TEST(AtomicFile, replaces_regular_files_only) {
  const TempFolder folder;
  ASSERT_EQ(::mkfifo(folder.at("fifo").c_str(), 0600), 0);
  std::filesystem::create_directory(folder.at("sub"));
  std::filesystem::create_symlink("/dev/null", folder.at("link"));
  const auto message = [](const std::string& path) {
    return error_of<std::invalid_argument>([&] { put(path, "x"); });
  };
  EXPECT_TRUE(contains(message(folder.at("sub")), "] expected a regular file, got a folder"));
  EXPECT_TRUE(contains(message(folder.at("fifo")), "] expected a regular file, got a FIFO"));
  EXPECT_TRUE(contains(message(folder.at("link")), "] expected a regular file, got a FIFO"));
  EXPECT_TRUE(contains(message(folder.at("sub/")), "expected one that ends in a file's name"));
  EXPECT_TRUE(contains(message(""), "[] path: expected one that ends in a file's name"));
  EXPECT_TRUE(contains(message(folder.at("a\0b"s)), "NUL"));
  EXPECT_EQ(files_in(folder.path()), 3);
}

// The errno of the FileError, and that it names the path.
int code_of(const std::string& path, const std::string& text, const std::string& what) {
  try {
    put(path, text);
  } catch (const FileError& e) {
    EXPECT_EQ(e.path(), path);
    EXPECT_TRUE(contains(e.what(), "[" + path + "] cannot " + what + ": "));
    return e.code();
  }
  ADD_FAILURE() << "expected an exception, got none";
  return 0;
}

TEST(AtomicFile, names_what_the_system_refuses) {
  const TempFolder folder;
  folder.write("file", "x");
  EXPECT_EQ(code_of(folder.at("none/f"), "x", "open its folder"), ENOENT);
  EXPECT_EQ(code_of(folder.at("file/f"), "x", "open its folder"), ENOTDIR);
  EXPECT_EQ(code_of(folder.at(std::string(300, 'n')), "x", "stat"), ENAMETOOLONG);
  EXPECT_EQ(files_in(folder.path()), 1);
  if (::geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  ASSERT_EQ(::chmod(folder.path().c_str(), 0500), 0);
  EXPECT_EQ(code_of(folder.at("f"), "x", "make a temporary file beside it"), EACCES);
  ASSERT_EQ(::chmod(folder.path().c_str(), 0700), 0);
}

void limit_files_to(rlim_t limit_bytes) {
  rlimit limit;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  limit.rlim_cur = limit_bytes;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
}

TEST(AtomicFile, a_full_disk_leaves_the_old_file) {
  const TempFolder folder;
  folder.write("f", "old");
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  limit_files_to(100'000);
  EXPECT_EQ(code_of(folder.at("f"), test_bytes(200'000), "write"), EFBIG);  // after a short write
  limit_files_to(10);
  EXPECT_EQ(code_of(folder.at("f"), test_bytes(20), "write"), EFBIG);  // in commit()
  limit_files_to(RLIM_INFINITY);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_file(folder.at("f")), "old");
  EXPECT_EQ(files_in(folder.path()), 1);
}

// SIGXFSZ kills in the write that passes the limit: a death at a byte of our choice.
TEST(AtomicFile, who_dies_while_writing_leaves_the_old_file) {
  const TempFolder folder;
  const std::string text = test_bytes(300'000);
  for (const char* name : {"f", "absent"}) {
    if (name == "f"s) folder.write("f", "old");
    for (size_t limit = 0; limit < text.size(); limit += 12'345) {
      const pid_t child = ::fork();
      ASSERT_GE(child, 0);
      if (child == 0) {
        const rlimit no_core{0, 0};
        ::setrlimit(RLIMIT_CORE, &no_core);
        limit_files_to(limit);
        put(folder.at(name), text);
        ::_exit(0);
      }
      int status = 0;
      ASSERT_EQ(::waitpid(child, &status, 0), child);
      ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ) << status;
    }
  }
  EXPECT_EQ(read_file(folder.at("f")), "old");
  EXPECT_FALSE(std::filesystem::exists(folder.at("absent")));
  put(folder.at("f"), text);  // what the dead left behind is not in the way
  EXPECT_EQ(read_file(folder.at("f")), text);
}

TEST(AtomicFile, descriptors_are_not_inherited) {
  const TempFolder folder;
  const AtomicFile file(folder.at("f"));
  const std::string here = std::filesystem::canonical(folder.path());
  int found = 0;
  for (int fd = 0; fd < 1024; ++fd) {
    std::error_code error;
    const std::string target =
        std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd), error).string();
    if (error || target.rfind(here, 0) != 0) continue;
    ++found;
    EXPECT_NE(::fcntl(fd, F_GETFD) & FD_CLOEXEC, 0) << target;
  }
  EXPECT_EQ(found, 2);  // the temporary file and its folder
}

TEST(AtomicFile, leaves_no_descriptor_open) {
  const TempFolder folder;
  const int before = files_in("/proc/self/fd");
  put(folder.at("f"), "x");
  {
    AtomicFile file(folder.at("f"));
  }
  EXPECT_THROW(put(folder.path(), "x"), std::invalid_argument);
  EXPECT_THROW(put(folder.at("none/f"), "x"), FileError);
  EXPECT_EQ(files_in("/proc/self/fd"), before);
}

}  // namespace
}  // namespace bicache
