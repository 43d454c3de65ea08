#include "peak.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <limits>
#include <map>
#include <string>

#include "base/check.h"
#include "base/parallel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bicache::bench {
namespace {

clockid_t clock_in_use = CLOCK_MONOTONIC;

// Lets the compiler believe that x matters.
void use(int64_t x) { asm volatile("" : : "r"(x)); }

// Independent sums: more than latency times throughput of any of the instructions.
constexpr int kSums = 12;

typedef float Floats4 __attribute__((vector_size(16)));

// A recurrence that no compiler can shorten; two roundings, as in the generic kernels.
void mul_add(int64_t turns) {
  Floats4 sum[kSums] = {}, a = Floats4{} + 0.999f, b = Floats4{} + 0.1f;
  for (int i = 0; i < kSums; ++i) sum[i] += static_cast<float>(i);
  for (; turns > 0; --turns) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * a + b;
  }
  Floats4 all = {};
  for (const Floats4& s : sum) all += s;
  use(static_cast<int64_t>(all[0]));
}

#if defined(__x86_64__)

// kSums chains of `code` (%0: the sum, %1, %2: two inputs), in registers of type V. A turn of the
// loop is kSums instructions. `in`: which registers the encoding reaches.
#define PEAK_LOOP(loop, isa, V, in, code)                                        \
  __attribute__((target(isa))) void loop(int64_t turns) {                        \
    V a, b, sum[kSums] = {};                                                     \
    std::memset(&a, 0x3d, sizeof a); /* no zeros, which would need less power */ \
    std::memset(&b, 0x2b, sizeof b);                                             \
    for (; turns > 0; --turns) {                                                 \
      _Pragma("GCC unroll 12") for (int i = 0; i < kSums; ++i) {                 \
        asm volatile(code : "+" in(sum[i]) : in(a), in(b) : "xmm15");            \
      }                                                                          \
    }                                                                            \
    _mm256_zeroupper();                                                          \
  }

PEAK_LOOP(fma_ymm, "avx2,fma", __m256, "x", "vfmadd231ps %2, %1, %0")
PEAK_LOOP(fma_zmm, "avx512f", __m512, "v", "vfmadd231ps %2, %1, %0")
PEAK_LOOP(dpbf16_zmm, "avx512f,avx512bf16", __m512, "v", "vdpbf16ps %2, %1, %0")
PEAK_LOOP(madd_ymm, "avx2", __m256i, "x", "vpmaddwd %2, %1, %%ymm15\n vpaddd %%ymm15, %0, %0")
PEAK_LOOP(madd_zmm, "avx512bw", __m512i, "v", "vpmaddwd %2, %1, %%zmm15\n vpaddd %%zmm15, %0, %0")
PEAK_LOOP(dpbusd_ymm, "avx2", __m256i, "x", "%{vex%} vpdpbusd %2, %1, %0")
PEAK_LOOP(dpbusd_zmm, "avx512f,avx512vnni", __m512i, "v", "vpdpbusd %2, %1, %0")
#undef PEAK_LOOP

void madd_xmm(int64_t turns) {
  __m128i a = _mm_set1_epi16(0x3d), b = _mm_set1_epi16(0x2b), sum[kSums] = {};
  for (; turns > 0; --turns) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      asm volatile("movdqa %1, %%xmm15\n pmaddwd %2, %%xmm15\n paddd %%xmm15, %0"
                   : "+x"(sum[i])
                   : "x"(a), "x"(b)
                   : "xmm15");
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Six sums and two inputs. The thread's own configuration is put back: kernels may rely on it.
#define TILE_LOOP(loop, isa, multiply)                                   \
  __attribute__((target("amx-tile," isa))) void loop(int64_t turns) {    \
    TileConfig before, ours;                                             \
    alignas(64) uint8_t data[1024];                                      \
    std::memset(data, 0x3d, sizeof data);                                \
    asm volatile("sttilecfg %0" : "=m"(before)::"memory");               \
    asm volatile("ldtilecfg %0" ::"m"(ours));                            \
    _tile_loadd(6, data, 64);                                            \
    _tile_loadd(7, data, 64);                                            \
    for (; turns > 0; --turns) {                                         \
      multiply(0, 6, 7);                                                 \
      multiply(1, 6, 7);                                                 \
      multiply(2, 6, 7);                                                 \
      multiply(3, 6, 7);                                                 \
      multiply(4, 6, 7);                                                 \
      multiply(5, 6, 7);                                                 \
    }                                                                    \
    asm volatile("tilerelease");                                         \
    if (before.palette != 0) asm volatile("ldtilecfg %0" ::"m"(before)); \
  }

TILE_LOOP(tile_bf16, "amx-bf16", _tile_dpbf16ps)
TILE_LOOP(tile_int8, "amx-int8", _tile_dpbssd)
#undef TILE_LOOP

// Linux gives tiles to processes that ask.
bool may_use_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

#endif

std::vector<Peak> find_peaks() {
  std::vector<Peak> found = {{"mul + add, 128 bits", "f32", "generic", kSums * 8, mul_add}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const auto add = [&](bool has, Peak peak) {
    if (has) found.push_back(peak);
  };
  add(avx2, {"vfmadd231ps ymm", "f32", "avx2", kSums * 16, fma_ymm});
  add(avx512, {"vfmadd231ps zmm", "f32", "avx512", kSums * 32, fma_zmm});
  add(avx512 && __builtin_cpu_supports("avx512bf16"),
      {"vdpbf16ps zmm", "bf16", "avx512_bf16", kSums * 64, dpbf16_zmm});
  // Without dot products of bytes they are widened to 16 bits.
  add(true, {"pmaddwd + paddd xmm", "int8", "generic", kSums * 16, madd_xmm});
  add(avx2, {"vpmaddwd + vpaddd ymm", "int8", "avx2", kSums * 32, madd_ymm});
  add(avx2 && __builtin_cpu_supports("avxvnni"),
      {"vpdpbusd ymm", "int8", "avx_vnni", kSums * 64, dpbusd_ymm});
  add(avx512, {"vpmaddwd + vpaddd zmm", "int8", "avx512", kSums * 64, madd_zmm});
  add(avx512 && __builtin_cpu_supports("avx512vnni"),
      {"vpdpbusd zmm", "int8", "avx512_vnni", kSums * 128, dpbusd_zmm});
  const bool tiles = avx512 && may_use_tiles();
  add(tiles, {"tdpbf16ps", "bf16", "amx", 6 * 2 * 16 * 16 * 32, tile_bf16});
  add(tiles, {"tdpbssd", "int8", "amx", 6 * 2 * 16 * 16 * 64, tile_int8});
#else
  found.push_back({"mul + add of floats, 128 bits", "int8", "generic", kSums * 8, mul_add});
#endif
  return found;
}

// Whether table `isa` may use what comes with `of`. VEX-encoded VNNI is no part of AVX-512.
bool reaches(std::string_view isa, std::string_view of) {
  constexpr std::string_view kOrder[] = {"generic",     "avx2",        "avx_vnni", "avx512",
                                         "avx512_vnni", "avx512_bf16", "amx"};
  if (isa.empty() || of == isa) return true;
  const auto* table = std::find(std::begin(kOrder), std::end(kOrder), isa);
  internal_check(table != std::end(kOrder), "[bench] isa: expected one with a place, got ", isa);
  return of != "avx_vnni" && std::find(std::begin(kOrder), std::end(kOrder), of) < table;
}

// The least of three: a disturbance only ever adds.
double seconds_of(const Peak& peak, int64_t turns, int threads) {
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 3; ++i) {
    const double begin = now();
    parallel_for(threads, threads, [&](int64_t) { peak.loop(turns); });
    least = std::min(least, now() - begin);
  }
  return least;
}

// Operations a second of this thread's own time, which others cannot take away; the best of five.
double quiet_rate(const Peak& peak) {
  constexpr int64_t kTurns = 50000;
  std::clock_t least = std::numeric_limits<std::clock_t>::max();
  for (int i = 0; i < 5; ++i) {
    const std::clock_t begin = std::clock();
    peak.loop(kTurns);
    least = std::min(least, std::clock() - begin);
  }
  return peak.ops * kTurns / static_cast<double>(std::max<std::clock_t>(least, 1));
}

__attribute__((noinline)) void read_all(const char* p, int64_t bytes) {
  typedef uint64_t Words __attribute__((vector_size(64)));
  Words sum[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Words x;
      std::memcpy(&x, p + i + 64 * j, sizeof x);
      sum[j] |= x;
    }
  }
  use(static_cast<int64_t>((sum[0] | sum[1] | sum[2] | sum[3])[0]));
}

}  // namespace

double now() {
  timespec t;
  clock_gettime(clock_in_use, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void use_cpu_time(bool yes) { clock_in_use = yes ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC; }

const std::vector<Peak>& peaks() {
  static const std::vector<Peak> found = find_peaks();
  return found;
}

double gops(const Peak& peak, int threads) {
  static std::map<std::string, int64_t> turns_of;  // that take some milliseconds
  int64_t& turns = turns_of[peak.name];
  if (turns == 0) {
    for (turns = 1000; seconds_of(peak, turns, threads) < 2e-3;) turns *= 2;
  }
  return peak.ops * static_cast<double>(turns * threads) / seconds_of(peak, turns, threads) * 1e-9;
}

const Peak& best_peak(std::string_view isa, std::string_view type) {
  static std::map<std::string, const Peak*> known;
  const Peak*& best = known[cat(isa, " ", type)];
  double rate = 0;
  if (best != nullptr) return *best;
  for (const Peak& peak : peaks()) {
    const bool counts = peak.type == type || (type == "bf16" && peak.type == std::string("f32"));
    if (!counts || !reaches(isa, peak.isa)) continue;
    if (const double mine = quiet_rate(peak); mine > rate) {
      rate = mine;
      best = &peak;
    }
  }
  internal_check(best != nullptr, "[bench] peak of ", type, ": expected one for ", isa);
  return *best;
}

StreamingRead::StreamingRead(int64_t bytes) : memory_(bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(memory_.data() + 4095) & ~uintptr_t{4095};
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes - 4096), MADV_HUGEPAGE);
#endif
  std::memset(memory_.data(), 1, static_cast<size_t>(bytes));
}

double StreamingRead::gb_per_second(int threads) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t part = memory_.size() / 4, pieces = part / kPiece;
  const char* from = memory_.data() + next_ * part;
  next_ = (next_ + 1) % 4;
  const double begin = now();
  parallel_for(pieces, threads, [&](int64_t i) { read_all(from + i * kPiece, kPiece); });
  return static_cast<double>(pieces * kPiece) / (now() - begin) * 1e-9;
}

double l2_gb_per_second(int threads) {
  constexpr int64_t kBytes = 128 << 10, kTurns = 256;
  Buffer<char> memory(2 * kBytes * threads);
  std::memset(memory.data(), 1, static_cast<size_t>(memory.size()));
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const double begin = now();
    parallel_for(threads, threads, [&](int64_t t) {
      char* const half = memory.data() + 2 * kBytes * t;
      for (int64_t turn = 0; turn < kTurns; ++turn) {
        std::memcpy(half + (turn % 2) * kBytes, half + (turn + 1) % 2 * kBytes, kBytes);
        asm volatile("" ::"r"(half) : "memory");
      }
    });
    const double bytes = 2.0 * kBytes * kTurns * threads;
    best = std::max(best, bytes / (now() - begin) * 1e-9);
  }
  return best;
}

#if defined(__x86_64__)
namespace {

bool has_clflushopt() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 23 & 1) != 0;
}

__attribute__((target("clflushopt"))) void flush(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_clflushopt(const_cast<char*>(p + i));
  _mm_mfence();
}

void flush_in_order(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_clflush(p + i);
  _mm_mfence();
}

}  // namespace

bool evict(const void* p, int64_t bytes, int threads) {
  static const auto drop = has_clflushopt() ? flush : flush_in_order;
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t pieces = (bytes + kPiece - 1) / kPiece;
  parallel_for(pieces, threads, [&](int64_t i) {
    drop(static_cast<const char*>(p) + i * kPiece, std::min(kPiece, bytes - i * kPiece));
  });
  return true;
}
#else
bool evict(const void*, int64_t, int) { return false; }
#endif

}  // namespace bicache::bench
