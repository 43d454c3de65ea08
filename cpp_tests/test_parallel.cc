#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/parallel.h"
#include "gtest/gtest.h"
#include "temp_files.h"

namespace bicache {
namespace {

TEST(ParallelFor, CallsEveryIndexOnce) {
  for (int threads : {-1, 0, 1, 2, 4}) {
    for (int64_t tasks : {0, 1, 2, 3, 7, 100, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(tasks));
      parallel_for(tasks, threads, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
      for (const auto& n : calls) EXPECT_EQ(n, 1) << threads << " threads, " << tasks << " tasks";
    }
  }
}

TEST(ParallelFor, WritesOfTheTasksAreSeenAfterIt) {
  std::vector<int64_t> squares(500);
  parallel_for(500, 4, [&](int64_t i) { squares[static_cast<size_t>(i)] = i * i; });
  for (int64_t i = 0; i < 500; ++i) EXPECT_EQ(squares[static_cast<size_t>(i)], i * i);
}

TEST(ParallelFor, RethrowsAfterTheOthersHaveEnded) {
  for (int threads : {1, 2, 4}) {
    std::atomic<int> calls = 0;
    try {
      parallel_for(50, threads, [&](int64_t i) {
        ++calls;
        if (i == 20) throw std::runtime_error("task 20");
      });
      ADD_FAILURE() << "no exception, " << threads << " threads";
    } catch (const std::runtime_error& e) {
      EXPECT_STREQ(e.what(), "task 20");
    }
    // Alone, what comes after it is not begun; in a team the others go on.
    EXPECT_EQ(calls, threads == 1 ? 21 : 50);
    std::atomic<int> again = 0;
    parallel_for(10, threads, [&](int64_t) { ++again; });
    EXPECT_EQ(again, 10);
  }
}

TEST(ParallelFor, NestedCallsAreSerial) {
  for (int threads : {2, 4}) {
    std::atomic<int> total = 0, strangers = 0;
    parallel_for(8, threads, [&](int64_t) {
      const auto self = std::this_thread::get_id();
      int64_t next = 0;
      parallel_for(5, 4, [&](int64_t i) {
        if (std::this_thread::get_id() != self || i != next++) ++strangers;
        ++total;
      });
    });
    EXPECT_EQ(total, 40);
    EXPECT_EQ(strangers, 0);
  }
}

TEST(ParallelFor, OneThreadIsTheCaller) {
  const auto self = std::this_thread::get_id();
  parallel_for(5, 1, [&](int64_t) { EXPECT_EQ(std::this_thread::get_id(), self); });
  parallel_for(1, 4, [&](int64_t) { EXPECT_EQ(std::this_thread::get_id(), self); });
}

TEST(AvailableThreads, FollowsTheTightestCgroupQuota) {
  const TempFolder folder;
  const auto write = [&](const std::string& path, const std::string& text) {
    const std::filesystem::path file = std::filesystem::path(folder.path()) / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return file.string();
  };
  const auto quota = [&](const std::string& membership) {
    return cgroup_cpu_quota(write("membership", membership), folder.path());
  };
  EXPECT_EQ(quota("0::/app/job\n"), 0);  // no files: no quota
  write("app/job/cpu.max", "max 100000\n");
  EXPECT_EQ(quota("0::/app/job\n"), 0);
  write("app/cpu.max", "150000 100000\n");
  EXPECT_EQ(quota("0::/app/job\n"), 1.5);  // the parent's
  write("app/job/cpu.max", "50000 100000\n");
  EXPECT_EQ(quota("0::/app/job\n"), 0.5);
  EXPECT_EQ(quota("0::/\n"), 0);
  write("cpu/box/cpu.cfs_quota_us", "300000\n");
  write("cpu/box/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(quota("5:memory:/box\n4:cpu,cpuacct:/box\n"), 3);
  write("cpu/box/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(quota("4:cpu,cpuacct:/box\n"), 0);
  EXPECT_EQ(quota("nonsense\n"), 0);
}

TEST(AvailableThreads, IsAtLeastOneAndAtMostTheMachine) {
  EXPECT_GE(available_threads(), 1);
  EXPECT_LE(available_threads(), static_cast<int>(sysconf(_SC_NPROCESSORS_CONF)));
}

// In a forked child: on one thread, and on several.
bool use_threads_again() {
  for (const int threads : {1, 2}) {
    std::atomic<int64_t> sum = 0;
    parallel_for(4, threads, [&](int64_t i) { sum += i; });
    if (sum != 6) return false;
  }
  return true;
}

TEST(ParallelFor, AForkedChildDoesNotHang) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "ThreadSanitizer supports no threads after a fork";
#endif
  std::atomic<int> calls = 0;
  parallel_for(4, 2, [&](int64_t) { ++calls; });
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(use_threads_again() ? 0 : 1);
  int status = 0;
  pid_t ended = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while ((ended = waitpid(child, &status, WNOHANG)) == 0 &&
         std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (ended == 0) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    FAIL() << "the child hung";
  }
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  parallel_for(4, 2, [&](int64_t) { ++calls; });  // the parent goes on
  EXPECT_EQ(calls, 8);
}

}  // namespace
}  // namespace bicache
