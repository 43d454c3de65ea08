// parallel_for without OpenMP, for ThreadSanitizer.
#include "base/parallel.h"

namespace bicache {

const char* parallel_backend() { return "std"; }

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  parallel_for_on_std_threads(tasks, threads, task);
}

}  // namespace bicache
