// Saves that fail and savers that are killed.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <random>

#include "base/check.h"
#include "cache/prefix_file.h"
#include "prefix_image.h"
#include "temp_files.h"

namespace bicache {
namespace {

using Source = EntryNeeds::Source;

TEST(PrefixSave, a_save_that_fails_leaves_the_old_file) {
  const TempFolder folder;
  const std::string path = folder.at("f");
  const StoreShape shape = {4, 2, 3, {}, "save"};
  PrefixStore store(kBudget);
  fill(store, shape);
  save_prefixes(store, shape, path);
  const std::string good = read_file(path);
  EXPECT_THROW(save_prefixes(store, shape, folder.at("none/f")), FileError);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit limit;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  for (rlim_t most = 0; most < good.size(); most += 7) {
    const rlimit low{most, limit.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &low), 0);
    EXPECT_THROW(save_prefixes(store, shape, path), FileError);
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_file(path), good);
  std::filesystem::directory_iterator all(folder.path());
  EXPECT_EQ(std::distance(begin(all), end(all)), 1);  // no temporary files
}

// A child saves two stores in turns until it is killed.
TEST(PrefixSave, kill_9_leaves_a_file_that_loads) {
  const TempFolder folder;
  const StoreShape shape = {2, 64, 64, {}, "kill"};
  PrefixStore a(kBudget), b(kBudget);
  add(a, shape, Ids(400, 1), "a", {Source::alone, 2, {1}});
  for (const int32_t id : {1, 2, 3}) add(b, shape, Ids(600, id), "b", {Source::alone, 2, {1}});
  const std::string content_a = content(a, shape), content_b = content(b, shape);
  const auto start = std::chrono::steady_clock::now();
  save_prefixes(a, shape, folder.at("f"));
  save_prefixes(b, shape, folder.at("f"));
  const std::chrono::duration<double, std::micro> both = std::chrono::steady_clock::now() - start;

  std::mt19937 bits(1);
  int loaded = 0, left_behind = 0;
  for (int i = 0; i < 50; ++i) {
    // Every other time over what the kills before have left.
    const std::string path = folder.at(i % 2 == 0 ? "f" : cat("new", i));
    int begun[2];
    ASSERT_EQ(::pipe(begun), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      if (::write(begun[1], "", 1) != 1) ::_exit(1);
      for (;;) {
        save_prefixes(a, shape, path);
        save_prefixes(b, shape, path);
      }
    }
    ::close(begun[1]);
    char byte;
    ASSERT_EQ(::read(begun[0], &byte, 1), 1);
    ::close(begun[0]);
    ::usleep(bits() % static_cast<useconds_t>(std::clamp(2 * both.count(), 1e3, 1e5)));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    if (i % 2 == 1 && !std::filesystem::exists(path)) continue;
    PrefixStore restored(kBudget);
    const Restored count = restore_prefixes(restored, shape, path);
    EXPECT_EQ(count.kept, count.entries);
    const std::string now = content(restored, shape);
    EXPECT_TRUE(now == content_a || now == content_b);
    ++loaded;
  }
  for (const auto& file : std::filesystem::directory_iterator(folder.path()))
    left_behind += file.path().filename().string()[0] == '.' ? 1 : 0;
  EXPECT_GT(left_behind, 0);  // kills did come in the middle of a save
  EXPECT_GE(loaded, 25);
  EXPECT_EQ(save_prefixes(a, shape, folder.at("f")), 1);  // what the dead left is not in the way
}

}  // namespace
}  // namespace bicache
