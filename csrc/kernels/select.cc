#include <cstdlib>
#include <string_view>

#include "base/check.h"
#include "kernels/kernels.h"

namespace bicache {

namespace generic {
extern const Kernels kKernels;
}

#if BICACHE_HAVE_X86  // the build has kernels_avx2.cc and kernels_avx512.cc
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

const Kernels* const kBuilt[] = {
    &generic::kKernels,
#if BICACHE_HAVE_X86
    &avx2::kKernels,
    &avx512::kKernels,
#endif
};

#if defined(__x86_64__)
// What the two files are compiled with.
bool cpu_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#else
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
#endif

}  // namespace

bool cpu_has(const char* isa) {
  const std::string_view name = isa;
  if (name == "avx2") return cpu_has_avx2();
  if (name == "avx512") return cpu_has_avx512();
  return name == "generic";
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables;
  for (const Kernels* k : kBuilt) {
    if (cpu_has(k->isa)) tables.push_back(k);
  }
  return tables;
}

const Kernels& choose_kernels(const char* forced) {
  const std::vector<const Kernels*> tables = available_kernels();
  if (forced == nullptr || *forced == '\0') return *tables.back();
  std::string names;
  for (const Kernels* k : tables) {
    if (std::string_view(k->isa) == forced) return *k;
    names += names.empty() ? k->isa : cat(", ", k->isa);
  }
  const char* reason = "no such instruction set";
  for (const char* known : {"avx2", "avx512"}) {
    if (std::string_view(known) == forced) {
      reason = cpu_has(known) ? "not in this build" : "this CPU lacks it";
    }
  }
  fail("[kernels] BICACHE_ISA: expected one of ", names, ", got ", forced, " (", reason, ")");
}

const Kernels& kernels() {
  static const Kernels& table = choose_kernels(std::getenv("BICACHE_ISA"));
  return table;
}

}  // namespace bicache
