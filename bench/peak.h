// What this machine can do at most: loops of nothing but one instruction's multiply-adds, and
// streaming reads and copies. Measured beside the kernels, because a shared machine's limit moves.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/buffer.h"

namespace bicache::bench {

// Seconds since some moment: by the wall, or of this process's CPU time, which is all that a busy
// machine gives one thread to go by.
double now();
void use_cpu_time(bool yes);

struct Peak {
  const char* name;
  const char* type;  // f32, bf16 or int8
  const char* isa;   // the first kernel table that may use it
  double ops;        // of one turn of the loop; a multiply-add is two
  void (*loop)(int64_t turns);
};

// Those this CPU has.
const std::vector<Peak>& peaks();

// The one with most operations a second of those that table `isa` may use for `type` (any table, if
// `isa` is empty). Products with bf16 weights may widen them: f32 counts there, too.
const Peak& best_peak(std::string_view isa, std::string_view type);

// Operations a second, in 1e9: the best of three loops of a few milliseconds.
double gops(const Peak& peak, int threads);

// Reading 256 MiB of 1 GiB, another quarter at every call, in 1e9 bytes a second.
class StreamingRead {
 public:
  explicit StreamingRead(int64_t bytes = int64_t{1} << 30);
  double gb_per_second(int threads);

 private:
  Buffer<char> memory_;
  int64_t next_ = 0;
};

// Reading and writing again what stays in a core's L2 (bytes read and bytes written), in 1e9 bytes
// a second, all threads together.
double l2_gb_per_second(int threads);

// Drops [p, p + bytes) from all caches. False: no way to do that here.
bool evict(const void* p, int64_t bytes, int threads);

}  // namespace bicache::bench
