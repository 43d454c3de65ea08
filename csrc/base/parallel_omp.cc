#include <omp.h>

#include <exception>
#include <mutex>

#include "base/parallel.h"
#include "base/parallel_fork.h"

namespace bicache {

const char* parallel_backend() { return "openmp"; }

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  note_threads_started();
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
