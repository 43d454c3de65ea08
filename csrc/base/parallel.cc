#include "base/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "base/parallel_fork.h"

namespace bicache {
namespace {

std::atomic<bool> threads_started = false;
std::atomic<bool> forked_after_threads = false;

void in_child() { forked_after_threads.store(threads_started.load()); }

// CPUs per period of one cgroup folder; 0 where it sets no limit.
double cgroup_quota(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (std::ifstream v2(folder + "/cpu.max"); v2 >> quota >> period) {
    return quota == "max" || period <= 0 ? 0 : std::strtod(quota.c_str(), nullptr) / period;
  }
  double limit = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> limit && v1_period >> period && limit > 0 && period > 0) return limit / period;
  return 0;
}

// The tightest quota from this process's cgroup up to the root of the hierarchy.
double cpu_quota() {
  double tightest = 0;
  const auto lower = [&](double q) {
    if (q > 0) tightest = tightest > 0 ? std::min(tightest, q) : q;
  };
  std::ifstream membership("/proc/self/cgroup");
  for (std::string line; std::getline(membership, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string base = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1);;) {
      lower(cgroup_quota(base + path));
      const size_t slash = path.rfind('/');
      if (path.empty() || path == "/" || slash == std::string::npos) break;
      path.resize(slash);
    }
    lower(cgroup_quota(base));
  }
  return tightest;
}

}  // namespace

void note_threads_started() {
  if (forked_after_threads) {
    throw std::runtime_error(
        "[parallel] this process was forked after bicache had used threads, and OpenMP threads do "
        "not survive a fork: "
        "expected a process started by 'spawn' or 'forkserver', or threads=1, got a forked child");
  }
  static const int registered = pthread_atfork(nullptr, nullptr, in_child);
  (void)registered;
  threads_started = true;
}

int available_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  if (const double quota = cpu_quota(); quota > 0)
    cpus = std::min(cpus, static_cast<int>(std::ceil(quota)));
  return std::max(cpus, 1);
}

}  // namespace bicache
