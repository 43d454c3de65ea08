// parallel_for without OpenMP: threads per call, so that ThreadSanitizer sees every start and join.
// Slow, for tests.
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/parallel.h"

namespace bicache {
namespace {
thread_local bool inside = false;
}

const char* parallel_backend() { return "std"; }

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || inside) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&] {
    inside = true;
    for (int64_t i = next++; i < tasks; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    }
    inside = false;
  };
  std::vector<std::jthread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(work);
  work();
  team.clear();
  if (error) std::rethrow_exception(error);
}

}  // namespace bicache
