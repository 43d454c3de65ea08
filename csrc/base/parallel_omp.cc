// parallel_for on OpenMP. libgomp's threads do not survive a fork, and whoever forked this process
// may have used them (torch shares them): a forked child would wait for them for ever, so it uses
// std::thread instead.
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "base/parallel.h"

namespace bicache {
namespace {

std::atomic<bool> forked = false;
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

const char* parallel_backend() { return "openmp"; }

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (omp_in_parallel()) threads = 1;
  if (threads <= 1 || forked) return parallel_for_on_std_threads(tasks, threads, task);
  std::exception_ptr error;
  std::mutex mutex;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < tasks; ++i) {
    try {
      task(i);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace bicache
