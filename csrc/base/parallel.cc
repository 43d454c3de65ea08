#include "base/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace bicache {
namespace {

thread_local bool inside_task = false;

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

}  // namespace

double cgroup_cpu_quota(const std::string& membership_file, const std::string& root) {
  double tightest = 0;
  const auto lower = [&](double q) {
    if (q > 0) tightest = tightest > 0 ? std::min(tightest, q) : q;
  };
  std::ifstream membership(membership_file);
  for (std::string line; std::getline(membership, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string base = v2 ? root : root + "/cpu";
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

void parallel_for_on_std_threads(int64_t tasks, int threads,
                                 const std::function<void(int64_t)>& task) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || inside_task) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&] {
    inside_task = true;
    for (int64_t i = next++; i < tasks; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    }
    inside_task = false;
  };
  std::vector<std::jthread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(work);
  work();
  team.clear();  // joins
  if (error) std::rethrow_exception(error);
}

int available_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cpus = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  if (const double quota = cgroup_cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup"); quota > 0)
    cpus = std::min(cpus, static_cast<int>(std::ceil(quota)));
  return std::max(cpus, 1);
}

}  // namespace bicache
