#include <cstdlib>
#include <string_view>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "base/check.h"
#include "kernels/kernels.h"

namespace bicache {

namespace generic {
extern const Kernels kKernels;
}

#if BICACHE_HAVE_X86  // the build has the files of the others
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx_vnni {
extern const Product kInt8;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_vnni {
extern const Product kInt8;
}
namespace avx512_bf16 {
extern const Product kBf16;
extern const Attention kAttention;
}  // namespace avx512_bf16
namespace amx {
extern const Product kBf16, kInt8;
}
namespace amx_attention {
extern const Attention kAttention;
}
#endif

namespace {

#if defined(__x86_64__)
// What the files are compiled with.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The kernel hands out the tile registers on request, once per process.
bool has_amx() {
  static const bool granted = [] {
    if (!has_avx512_bf16() || !__builtin_cpu_supports("amx-tile") ||
        !__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8"))
      return false;
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return granted;
}

// Intel's vdpbf16ps does half the work of two fused multiply-adds in the same time.
bool slow_bf16_dot() { return __builtin_cpu_is("intel"); }
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx_vnni() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
bool slow_bf16_dot() { return false; }
#endif

struct Isa {
  const char* name;
  bool (*runs)();
};

constexpr Isa kIsas[] = {
    {"generic", [] { return true; }},
    {"avx2", has_avx2},
    {"avx_vnni", has_avx_vnni},
    {"avx512", has_avx512},
    {"avx512_vnni", has_avx512_vnni},
    {"avx512_bf16", has_avx512_bf16},
    {"amx", has_amx},
};

// The tables of this build, in the order of kIsas.
const std::vector<Kernels>& built() {
  static const std::vector<Kernels> tables = [] {
    std::vector<Kernels> all = {generic::kKernels};
#if BICACHE_HAVE_X86
    const auto derive = [&](const char* isa) -> Kernels& {
      all.push_back(all.back());
      all.back().isa = isa;
      return all.back();
    };
    all.push_back(avx2::kKernels);
    derive("avx_vnni").int8 = avx_vnni::kInt8;
    all.push_back(avx512::kKernels);
    derive("avx512_vnni").int8 = avx512_vnni::kInt8;
    Kernels& pairs = derive("avx512_bf16");
    pairs.bf16 = avx512_bf16::kBf16;
    pairs.attention_bf16 = avx512_bf16::kAttention;
    Kernels& amx = derive("amx");
    amx.bf16 = amx::kBf16;
    amx.attention_bf16 = amx_attention::kAttention;
    amx.int8 = amx::kInt8;
#endif
    return all;
  }();
  return tables;
}

const Kernels& best(const std::vector<const Kernels*>& tables) {
  const Kernels* last = tables.back();
  const bool avoid = std::string_view(last->isa) == "avx512_bf16" && slow_bf16_dot();
  return avoid ? *tables[tables.size() - 2] : *last;
}

}  // namespace

bool cpu_has(const char* isa) {
  for (const Isa& known : kIsas) {
    if (std::string_view(known.name) == isa) return known.runs();
  }
  return false;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> tables;
  for (const Kernels& k : built()) {
    if (cpu_has(k.isa)) tables.push_back(&k);
  }
  return tables;
}

const Kernels& choose_kernels(const char* forced) {
  const bool any = forced == nullptr || *forced == '\0';
  for (const Kernels& k : built()) {  // asks the CPU, and for tiles the system, of this one only
    if (!any && std::string_view(k.isa) == forced && cpu_has(k.isa)) return k;
  }
  const std::vector<const Kernels*> tables = available_kernels();
  if (any) return best(tables);
  std::string names;
  for (const Kernels* k : tables) {
    names += names.empty() ? k->isa : cat(", ", k->isa);
  }
  const char* reason = "no such instruction set";
  for (const Isa& known : kIsas) {
    if (std::string_view(known.name) == forced)
      reason = known.runs() ? "not in this build" : "this CPU lacks it, or the system withholds it";
  }
  fail("[kernels] BICACHE_ISA: expected one of ", names, ", got ", forced, " (", reason, ")");
}

const Kernels& kernels() {
  static const Kernels& table = choose_kernels(std::getenv("BICACHE_ISA"));
  return table;
}

}  // namespace bicache
