// The only threads in the library: one parallel_for, on OpenMP (parallel_omp.cc) or std::thread
// (parallel_std.cc, which ThreadSanitizer can see into; CMake's BICACHE_PARALLEL chooses).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

namespace bicache {

// Calls task(i) once for every i in [0, tasks), on at most `threads` threads, in no particular
// order; returns when all have ended. Nested calls run serially. The first exception of a task is
// rethrown here after the others have ended.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

// The same with threads made for the call: for builds without OpenMP, and for forked children.
void parallel_for_on_std_threads(int64_t tasks, int threads,
                                 const std::function<void(int64_t)>& task);

// The threads that `flops` of work are worth: starting and joining one costs about as much as a
// million floating-point operations, so smaller shares run on fewer threads.
inline int worth_threads(int threads, int64_t flops) {
  constexpr int64_t kFlopsPerThread = 1000000;
  return static_cast<int>(std::clamp<int64_t>(flops / kFlopsPerThread, 1, std::max(threads, 1)));
}

// "openmp" or "std".
const char* parallel_backend();

// CPUs this process may use: the affinity mask, lowered by the cgroup's CPU quota (v1 and v2), at
// least 1.
int available_threads();

// CPUs per period that the tightest quota allows, from the cgroups `membership_file` names (as
// /proc/self/cgroup does) up to the root of the hierarchy mounted at `root`; 0: no quota.
double cgroup_cpu_quota(const std::string& membership_file, const std::string& root);

}  // namespace bicache
